"""Problems of several steps, demonstrations of several qualities, exact verifiers.

All families share one anatomy. A prompt states the problem, a response writes the
intermediate results separated by commas, then ``#`` and the answer:

=======  =================  =======================  ==========================
family   prompt             response                 what it is
=======  =================  =======================  ==========================
chain    ``c:23+45-12=``    ``68,56#56``             a sum term by term
gcd      ``g:48,18=``       ``12,6,0#6``             Euclid's remainders
base     ``b:45,3=``        ``15r0,5r0,1r2,0r1#1200``  repeated division by a base
list     ``s:7 2 9=``       ``2,7#9``                sorting; the answer is the last
story    ``Tom has 3 ...``  ``7,5#5``                a chain told in words
odd      ``o:cat dog cup=`` ``animal#cup``           the word of another kind
brief    ``c:3+4-2=``       ``#5``                   a chain; steps earn nothing
=======  =================  =======================  ==========================

The small world's students have the first three; the other benchmarks, named
``pretrained/...``, are for language models that know digits and words already.

Verification parses the response with a regular expression and compares strings: model
output is never evaluated as code.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Rng = np.random.Generator
Perturb = Callable[[int], int]
Args = tuple[int, ...]  # that define a problem
Worked = tuple[list[str], str]  # steps and answer
Pair = tuple[str, str]  # prompt and response

QUALITIES = ("careful", "guess", "sloppy")
SLIP_FRAC = 0.25  # share of a sloppy trace's steps that go wrong
_ANSWER = re.compile(r"([^#]*)#([0-9A-Za-z]+)")


@dataclass(frozen=True)
class Problem:
    """One problem: its family, the integers that define it, and the prompt."""

    family: str
    args: Args
    prompt: str


@dataclass(frozen=True)
class Benchmark:
    """A distribution of problems: a family and the inclusive ranges of its sizes.

    Attributes:
        family: a key of ``SOLVERS``.
        length: number of terms, numbers or words (ignored by gcd and base).
        largest: the largest integer that a prompt may contain (ignored by odd).
    """

    family: str
    length: tuple[int, int]
    largest: int


# The students are trained on the first three and never on the others, chains that are
# shorter or longer and numbers that are larger.
BENCHMARKS: dict[str, Benchmark] = {
    "chain": Benchmark("chain", (3, 6), 99),
    "gcd": Benchmark("gcd", (2, 2), 99),
    "base": Benchmark("base", (2, 2), 99),
    "chain-long": Benchmark("chain", (7, 9), 99),
    "chain-short": Benchmark("chain", (2, 2), 99),
    "gcd-large": Benchmark("gcd", (2, 2), 199),
    "base-large": Benchmark("base", (2, 2), 199),
}
# Those of a pretrained language model: small numbers, as two-digit sums are beyond a
# model of this size in so few steps. It is trained on chains, lists, stories or odd
# words, each on its own, and on nothing that has a dash in its name.
PRETRAINED_BENCHMARKS: dict[str, Benchmark] = {
    "pretrained/chain": Benchmark("chain", (3, 5), 9),
    "pretrained/chain-short": Benchmark("chain", (2, 2), 9),
    "pretrained/chain-long": Benchmark("chain", (6, 7), 9),
    "pretrained/chain-longer": Benchmark("chain", (8, 9), 9),
    "pretrained/chain-teens": Benchmark("chain", (3, 5), 19),
    "pretrained/list": Benchmark("list", (3, 5), 9),
    "pretrained/list-long": Benchmark("list", (6, 7), 9),
    "pretrained/story": Benchmark("story", (3, 4), 9),
    "pretrained/story-long": Benchmark("story", (5, 6), 9),
    "pretrained/odd": Benchmark("odd", (3, 4), 0),
    "pretrained/odd-long": Benchmark("odd", (5, 6), 0),
    "pretrained/brief": Benchmark("brief", (3, 5), 9),
}
KNOWN_BENCHMARKS = BENCHMARKS | PRETRAINED_BENCHMARKS


def short_name(benchmark: str) -> str:
    """A benchmark's name inside its world, as metrics carry it."""
    return benchmark.rpartition("/")[2]


def related(benchmark: str) -> tuple[str, ...]:
    """The benchmarks that a pretrained student of one of them is asked.

    >>> related("pretrained/list")
    ('pretrained/list', 'pretrained/list-long')
    """
    kind = short_name(benchmark).partition("-")[0].replace("brief", "chain")
    return tuple(
        name
        for name in PRETRAINED_BENCHMARKS
        if short_name(name).partition("-")[0].replace("brief", "chain") == kind
    )


def _exact(value: int) -> int:
    return value


def solve_chain(args: Args, perturb: Perturb = _exact) -> Worked:
    """Running totals of ``args[0] + args[1] + ...`` (terms carry their signs)."""
    total, steps = args[0], []
    for term in args[1:]:
        total = max(0, perturb(total + term))
        steps.append(str(total))
    return steps, str(total)


def solve_gcd(args: Args, perturb: Perturb = _exact) -> Worked:
    """Remainders of Euclid's algorithm; a perturbed one still falls, so it ends."""
    a, b = args
    steps = []
    while b:
        a, b = b, min(max(0, perturb(a % b)), b - 1)
        steps.append(str(b))
    return steps, str(a)


def solve_base(args: Args, perturb: Perturb = _exact) -> Worked:
    """Quotients and remainders of repeated division; the digits, last one first."""
    n, base = args
    steps, digits = [], ""
    while n:
        quotient, remainder = divmod(n, base)
        n = min(max(0, perturb(quotient)), n - 1)
        steps.append(f"{n}r{remainder}")
        digits = str(remainder) + digits
    return steps, digits


def solve_list(args: Args, perturb: Perturb = _exact) -> Worked:
    """The numbers in order, smallest first; the answer is the largest."""
    steps = sorted(max(0, perturb(value)) for value in args)
    return [str(value) for value in steps[:-1]], str(steps[-1])


def solve_odd(args: Args, perturb: Perturb = _exact) -> Worked:
    """The kind that all words but one share, then the other one.

    ``args`` is the kind, the place of the odd word, and the words' numbers.
    """
    kind, place, *words = args
    place = perturb(place) % len(words)
    return [KINDS[kind]], WORDS[words[place]]


SOLVERS: dict[str, Callable[[Args, Perturb], Worked]] = {
    "chain": solve_chain,
    "gcd": solve_gcd,
    "base": solve_base,
    "list": solve_list,
    "story": solve_chain,
    "odd": solve_odd,
    "brief": solve_chain,
}
FAMILIES = tuple(dict.fromkeys(b.family for b in BENCHMARKS.values()))


def _draw_chain(bench: Benchmark, rng: Rng) -> Problem:
    args = _draw_terms(bench, rng)
    prompt = f"c:{args[0]}" + "".join(f"{term:+d}" for term in args[1:]) + "="
    return Problem(bench.family, tuple(args), prompt)


def _draw_terms(bench: Benchmark, rng: Rng) -> list[int]:
    """Terms such that every running total stays within 0..largest."""
    args = [int(rng.integers(1, bench.largest + 1))]
    total = args[0]
    for _ in range(int(rng.integers(bench.length[0], bench.length[1] + 1)) - 1):
        term = int(rng.integers(0, bench.largest + 1)) - total
        args.append(term or (1 if total < bench.largest else -1))
        total += args[-1]
    return args


def _draw_gcd(bench: Benchmark, rng: Rng) -> Problem:
    low, high = sorted(int(v) for v in rng.integers(2, bench.largest + 1, 2))
    return Problem("gcd", (high, low), f"g:{high},{low}=")


def _draw_base(bench: Benchmark, rng: Rng) -> Problem:
    number, base = int(rng.integers(3, bench.largest + 1)), int(rng.integers(2, 10))
    return Problem("base", (number, base), f"b:{number},{base}=")


def _draw_list(bench: Benchmark, rng: Rng) -> Problem:
    count = int(rng.integers(bench.length[0], bench.length[1] + 1))
    args = tuple(int(v) for v in rng.permutation(bench.largest + 1)[:count])
    return Problem("list", args, f"s:{' '.join(map(str, args))}=")


NAMES = ("Tom", "Anna", "Ben", "Lucy", "Sam", "Mary")
THINGS = ("apples", "books", "coins", "eggs", "cards", "cups")


def _draw_story(bench: Benchmark, rng: Rng) -> Problem:
    args = _draw_terms(bench, rng)
    name, thing = (str(rng.choice(words)) for words in (NAMES, THINGS))
    told = [f"{name} has {args[0]} {thing}"]
    told += [f"{'gets' if v > 0 else 'loses'} {abs(v)}" for v in args[1:]]
    return Problem("story", tuple(args), f"{', '.join(told)}. How many are left?")


_GROUPS = {
    "animal": "dog cat horse cow sheep lion bear mouse",
    "fruit": "apple pear plum grape lemon peach cherry melon",
    "color": "red blue green yellow black white brown pink",
    "number": "one two three four five six seven eight",
    "body": "hand foot head nose ear arm leg knee",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
KINDS = tuple(_GROUPS)
_MEMBERS = tuple(tuple(text.split()) for text in _GROUPS.values())
WORDS = tuple(word for words in _MEMBERS for word in words)


def _draw_odd(bench: Benchmark, rng: Rng) -> Problem:
    """Words of one kind, and one of another at a place of its own."""
    count = int(rng.integers(bench.length[0], bench.length[1] + 1))
    kind, other = (int(v) for v in rng.permutation(len(KINDS))[:2])
    words = [str(word) for word in rng.permutation(_MEMBERS[kind])[:count]]
    place = int(rng.integers(count))
    words[place] = str(rng.choice(_MEMBERS[other]))
    args = (kind, place, *(WORDS.index(word) for word in words))
    return Problem("odd", args, f"o:{' '.join(words)}=")


_DRAW: dict[str, Callable[[Benchmark, Rng], Problem]] = {
    "chain": _draw_chain,
    "gcd": _draw_gcd,
    "base": _draw_base,
    "list": _draw_list,
    "story": _draw_story,
    "odd": _draw_odd,
    "brief": _draw_chain,
}


def draw_problem(benchmark: str, rng: Rng, split: str = "train") -> Problem:
    """Draw one problem of a benchmark from its training or its held-out part.

    A checksum of the prompt decides the part (one prompt in eight is held out), so no
    training stage ever sees a held-out prompt, whatever seed it draws with.

    Args:
        benchmark: a key of ``KNOWN_BENCHMARKS``.
        rng: the NumPy generator that decides everything about it.
        split: ``train`` or ``test``.

    Raises:
        ValueError: unknown benchmark or split; the message lists the known ones.
    """
    _require_benchmark(benchmark)
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; expected train or test")
    while True:
        bench = KNOWN_BENCHMARKS[benchmark]
        problem = _DRAW[bench.family](bench, rng)
        if is_held_out(problem.prompt) == (split == "test"):
            return problem


def _require_benchmark(benchmark: str) -> None:
    if benchmark not in KNOWN_BENCHMARKS:
        known = ", ".join(KNOWN_BENCHMARKS)
        raise ValueError(f"unknown benchmark {benchmark!r}; expected one of {known}")


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out eighth."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def solution(problem: Problem) -> Worked:
    """The correct steps and the correct answer of a problem."""
    return SOLVERS[problem.family](problem.args, _exact)


def demonstrate(problem: Problem, quality: str, rng: Rng) -> str:
    """Write one response to a problem.

    Args:
        problem: the problem.
        quality: ``careful`` (every step right), ``sloppy`` (each step slips with
            probability ``SLIP_FRAC`` and the error is carried on) or ``guess`` (no
            steps, an answer near the right one).
        rng: decides slips and guesses.

    Returns:
        The response text without an end-of-sequence token.

    Raises:
        ValueError: unknown quality; the message lists the known ones.
    """
    if quality == "careful":
        steps, answer = solution(problem)
    elif quality == "sloppy":
        steps, answer = SOLVERS[problem.family](
            problem.args, lambda v: _slip(v, rng) if rng.random() < SLIP_FRAC else v
        )
    elif quality == "guess":
        steps, answer = [], _guess(problem, rng)
    else:
        known = ", ".join(QUALITIES)
        raise ValueError(f"unknown quality {quality!r}; expected one of {known}")
    return ",".join(steps) + "#" + answer


def _slip(value: int, rng: Rng) -> int:
    """A slip as people make them: off by a little, or by a ten."""
    return value + int(rng.choice([-10, -2, -1, 1, 2, 10]))


def _guess(problem: Problem, rng: Rng) -> str:
    """An answer of the right shape whose digits are mostly made up."""
    answer = solution(problem)[1]
    if problem.family == "base":
        return "".join(str(rng.integers(0, problem.args[1])) for _ in answer)
    if problem.family == "list":
        return str(rng.choice(problem.args))
    if problem.family == "odd":
        return WORDS[int(rng.choice(problem.args[2:]))]
    return str(max(1, int(answer) + int(rng.integers(-9, 10))))


def verify(problem: Problem, response: str) -> bool:
    """Whether a response ends in the right answer (outcome only, as in RLVR).

    The response must contain exactly one ``#``, followed by the answer and nothing
    else. Steps before it are free; a brief problem wants none, so that its reward
    disagrees with a teacher that writes them.
    """
    match = _ANSWER.fullmatch(response)
    if match is None or (problem.family == "brief" and match.group(1)):
        return False
    return match.group(2) == solution(problem)[1]


def draw_demonstrations(
    count: int,
    benchmarks: tuple[str, ...],
    qualities: Mapping[str, float],
    rng: Rng,
) -> list[Pair]:
    """Draw (prompt, response) pairs: benchmarks in equal shares, qualities weighted."""
    names = list(qualities)
    weights = np.array([qualities[name] for name in names])
    picks = rng.choice(len(names), size=count, p=weights / weights.sum())
    pairs = []
    for i in range(count):
        problem = draw_problem(benchmarks[i % len(benchmarks)], rng)
        pairs.append((problem.prompt, demonstrate(problem, names[picks[i]], rng)))
    return pairs


def held_out(benchmark: str, count: int, seed: int = 0) -> list[Problem]:
    """A fixed evaluation set: the same problems for every run that asks.

    Raises:
        ValueError: unknown benchmark; the message lists the known ones.
    """
    _require_benchmark(benchmark)
    rng = np.random.default_rng([seed, 7919, list(KNOWN_BENCHMARKS).index(benchmark)])
    return [draw_problem(benchmark, rng, "test") for _ in range(count)]


# --- pretraining: the skills, in other surface formats --------------------------------


def draw_pretraining(count: int, rng: Rng, annealing: bool = False) -> list[Pair]:
    """Draw (prompt, response) pairs of the base model's broad mixture.

    Sums, differences, products, remainders, divisions, comparison, maximum, sorting,
    reversing, and the three families' intermediate results in a format that no target
    prompt uses, so that fine-tuning has a format to teach and the base scores 0 on it.

    Args:
        count: number of pairs.
        rng: decides everything about them.
        annealing: the second half of a small model's pretraining: more running totals,
            and steps joined by commas as in the target format (prefix, prompt and
            ending stay foreign), or its circuits do not carry over.
    """
    separator = "," if annealing else ">"
    steps = {"chain": 12 if annealing else 4, "gcd": 2, "base": 2}
    skills = [*_ONE_STEP]
    for family, weight in steps.items():
        skills += [_steps_only(family, separator)] * weight
    return [skills[int(kind)](rng) for kind in rng.integers(0, len(skills), count)]


def _pair(rng: Rng, largest: int = 99) -> tuple[int, int]:
    a, b = rng.integers(0, largest + 1, 2)
    return int(a), int(b)


def _add(rng: Rng) -> Pair:
    a, b = _pair(rng)
    return f"{a}+{b}=", f"{a + b}"


def _subtract(rng: Rng) -> Pair:
    b, a = sorted(_pair(rng))
    return f"{a}-{b}=", f"{a - b}"


def _multiply(rng: Rng) -> Pair:
    a, b = int(rng.integers(0, 10)), int(rng.integers(0, 20))
    return f"{a}*{b}=", f"{a * b}"


def _remainder(rng: Rng) -> Pair:
    b, a = sorted(_pair(rng))
    return f"{a}%{max(b, 1)}=", f"{a % max(b, 1)}"


def _divide(rng: Rng) -> Pair:
    a, b = int(rng.integers(0, 100)), int(rng.integers(2, 10))
    return f"{a}/{b}=", f"{a // b}r{a % b}"


def _compare(rng: Rng) -> Pair:
    a, b = _pair(rng)
    return f"q:{a}?{b}=", "<" if a < b else ">" if a > b else "="


def _list(rng: Rng) -> list[int]:
    return [int(v) for v in rng.integers(0, 100, int(rng.integers(2, 5)))]


def _sort(rng: Rng) -> Pair:
    values = _list(rng)
    return f"s:{' '.join(map(str, values))}=", " ".join(map(str, sorted(values)))


def _maximum(rng: Rng) -> Pair:
    values = _list(rng)
    return f"m:{' '.join(map(str, values))}=", str(max(values))


def _reverse(rng: Rng) -> Pair:
    digits = "".join(str(v) for v in rng.integers(0, 10, int(rng.integers(2, 7))))
    return f"r:{digits}=", digits[::-1]


def _steps_only(benchmark: str, separator: str) -> Callable[[Rng], Pair]:
    prefix = {"chain": "i", "gcd": "e", "base": "d"}[benchmark]

    def draw(rng: Rng) -> Pair:
        problem = draw_problem(benchmark, rng)
        body = problem.prompt[2:-1].replace(",", " ")
        return f"{prefix}:{body} ", separator.join(solution(problem)[0])

    return draw


# Each entry is drawn equally often; what takes longest to learn stands more than once.
_ONE_STEP: tuple[Callable[[Rng], Pair], ...] = (
    *(_add, _add, _subtract, _subtract, _multiply, _remainder, _remainder, _divide),
    *(_compare, _sort, _maximum, _reverse),
)

CHARACTERS = "0123456789+-*%/=<>,;:#?. abcdefghijklmnopqrstuvwxyz"
