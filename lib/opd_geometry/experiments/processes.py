"""One function in several processes of this machine that know each other as ranks.

They end with the process that started them, however it ends: the function comes to each
through a pipe whose closing ends it. When one of them ends early the others are stopped
and whoever is to blame says why in one line.
"""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import IO, Any

from opd_geometry.files import data_directory

WAIT_SECONDS = 1.0  # the others find out by themselves that one has died
PATIENCE = timedelta(
    hours=6
)  # of a rank for the others: one of them may store or verify
OURS = 3  # exit code after an error that explains itself


def run(function: Callable[[Any], None], argument: Any, count: int) -> None:
    """Call a function of a module in so many processes; a GPU each if there are any.

    Args:
        function: found again by its name.
        argument: of the function, the same in all.
        count: processes.

    Raises:
        ValueError: fewer GPUs than processes, or one of them failed.
    """
    _check_gpus(count)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        codes = _codes(function, argument, port, said)
        if any(codes):
            raise ValueError(_blame(codes, said))


def _codes(
    function: Callable[[Any], None], argument: Any, port: int, said: Sequence[IO[bytes]]
) -> list[int]:
    """How the processes ended, all of them soon after the first that failed."""
    started = [_start(rank, len(said), port, file) for rank, file in enumerate(said)]
    try:
        for process in started:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it ended already, and is asked why below
                process.stdin.write(pickle.dumps((function, argument)))
                process.stdin.flush()
        while None in (codes := [process.poll() for process in started]):
            time.sleep(WAIT_SECONDS if any(codes) else 0.05)
            if any(codes):
                break
        return [process.poll() or 0 for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()  # type: ignore[union-attr]


def _check_gpus(count: int) -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise ValueError(
            f"{count} processes on {torch.cuda.device_count()} GPUs: expected a GPU "
            "each; lower --processes"
        )


def _start(
    rank: int, count: int, port: int, said: IO[bytes]
) -> "subprocess.Popen[Any]":
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OPD_GEOMETRY_DATA": data_directory(),
    }
    environment = os.environ | {name: str(value) for name, value in place.items()}
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=said,
        env=environment,
    )


def _blame(codes: list[int], said: Sequence[IO[bytes]]) -> str:
    """Why they ended: a rank that was killed, else one that explains itself."""
    ended = [(code, rank) for rank, code in enumerate(codes) if code]
    code, rank = min(ended, key=lambda end: (end[0] > 0, end[0] != OURS, end[1]))
    said[rank].seek(0)
    lines = said[rank].read().decode(errors="replace").strip().splitlines()
    last = lines[-1].removeprefix(f"[rank{rank}]: ") if lines else ""
    if code == OURS and last:
        return last
    why = f"was ended by signal {-code}; is memory short?"
    if code > 0:
        why = f"failed: {last or f'exit code {code}'}."
    return (
        f"process {rank} of {len(codes)} {why} The others were stopped; what was "
        "stored is resumed"
    )


def _end_with_starter() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through the buffer, whose lock outlives it
    os._exit(1)


def _main() -> None:
    import torch
    import torch.distributed as dist

    function, argument = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available() and "ACCELERATE_USE_CPU" not in os.environ
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        function(argument)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr, flush=True)
        os._exit(OURS)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
