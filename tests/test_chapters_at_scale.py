"""Chapters executed by papermill at profile gpu, on stand-ins for what a GPU has.

All of them: ``make at-scale``.
"""

from pathlib import Path

import at_scale
import nbformat
import pytest
from children import Child

# The first trains the profile's three arms, the second compares two stand-ins.
CHAPTERS = ("03_rank.ipynb", "09_your_checkpoints.ipynb")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-ins, their runs, and the chapters that were executed."""
    place = tmp_path_factory.mktemp("chapters")
    (place / "data").mkdir()
    assert Child(place / "data", at_scale.main, str(place), *CHAPTERS).result() == 0
    return place


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_is_executed_at_profile_gpu(name: str, executed: Path) -> None:
    chapter = nbformat.read(executed / name, as_version=4)
    said = [out for cell in chapter.cells for out in cell.get("outputs", [])]
    assert not [out.evalue for out in said if out.output_type == "error"]
    ran = [c.execution_count for c in chapter.cells if c.cell_type == "code"]
    assert ran == [*range(1, len(ran) + 1)]
    told = "\n".join(str(out.get("data", {}).get("text/markdown", "")) for out in said)
    given = chapter.metadata.papermill.parameters
    if "profile" in given:
        assert given["profile"] in told
    else:  # a chapter on checkpoints that are named
        assert given["before"] == str(executed / "student")
        assert given["after"] == str(executed / "teacher")
    assert any("image/png" in out.get("data", {}) for out in said)


def test_its_runs_were_trained_on_the_stand_ins(executed: Path) -> None:
    trained = {
        path.parent.name.split("-")[0]
        for path in (executed / "data" / "runs").glob("*-s0-*/done.json")
    }
    assert {"sft", "opd", "rlvr"} <= trained
