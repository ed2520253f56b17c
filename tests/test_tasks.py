import math
import re
from collections import Counter

import numpy as np
import pytest

from opd_geometry.training import tasks
from opd_geometry.training.tasks import (
    BENCHMARKS,
    FAMILIES,
    KNOWN_BENCHMARKS,
    PRETRAINED_BENCHMARKS,
    QUALITIES,
    Problem,
)

CHAIN = Problem("chain", (23, 45, -12), "c:23+45-12=")


def draws(benchmark: str, count: int = 300, split: str = "train") -> list[Problem]:
    rng = np.random.default_rng(5)
    return [tasks.draw_problem(benchmark, rng, split) for _ in range(count)]


# --- problems and solutions -------------------------------------------------------


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_answers_agree_with_python(benchmark: str) -> None:
    for problem in draws(benchmark):
        answer = tasks.solution(problem)[1]
        if problem.family == "chain":
            assert int(answer) == sum(problem.args)
        elif problem.family == "gcd":
            assert int(answer) == math.gcd(*problem.args)
        else:
            number, base = problem.args
            assert int(answer, base) == number
        assert answer == answer.lstrip("0") or answer == "0"


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_steps_are_the_algorithm_s_own(benchmark: str) -> None:
    for problem in draws(benchmark, 50):
        steps, answer = tasks.solution(problem)
        if problem.family == "chain":
            totals = np.cumsum(problem.args)[1:].tolist()
            assert steps == [str(total) for total in totals]
            assert min(totals) >= 0
            assert answer == steps[-1]
        elif problem.family == "gcd":
            values = [*problem.args, *map(int, steps)]
            assert values[-1] == 0
            assert answer == str(values[-2])
            for a, b, rest in zip(values, values[1:], values[2:], strict=False):
                assert rest == a % b
        else:
            n, base = problem.args
            digits = []
            for step in steps:
                quotient, rest = map(int, step.split("r"))
                assert quotient * base + rest == n
                n = quotient
                digits.append(str(rest))
            assert n == 0
            assert answer == "".join(reversed(digits))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_prompts_state_the_problem_within_the_benchmark_s_ranges(
    benchmark: str,
) -> None:
    bench = BENCHMARKS[benchmark]
    for problem in draws(benchmark):
        assert problem.family == bench.family
        body = re.fullmatch(r"([cgb]):(.*)=", problem.prompt)
        assert body is not None
        assert body[1] == problem.family[0]
        numbers = tuple(map(int, re.findall(r"[+-]?[0-9]+", body[2])))
        assert numbers == problem.args
        assert max(map(abs, numbers)) <= bench.largest
        if bench.family == "chain":
            assert bench.length[0] <= len(numbers) <= bench.length[1]
            assert all(0 <= total <= bench.largest for total in np.cumsum(numbers))
            assert 0 not in numbers
        elif bench.family == "gcd":
            assert numbers[0] >= numbers[1] >= 2
        else:
            assert 2 <= numbers[1] <= 9


def test_every_length_of_chain_is_drawn() -> None:
    lengths = Counter(len(problem.args) for problem in draws("chain", 600))
    assert sorted(lengths) == [3, 4, 5, 6]
    assert min(lengths.values()) > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_solvers_end_whatever_goes_wrong(family: str) -> None:
    rng = np.random.default_rng(0)
    for problem in draws(family, 100):
        steps, answer = tasks.SOLVERS[family](
            problem.args, lambda value: value + int(rng.integers(-200, 200))
        )
        assert re.fullmatch(r"[0-9]+", answer)
        assert all(re.fullmatch(r"[0-9]+(r[0-8])?", step) for step in steps)


# --- the verifier -----------------------------------------------------------------


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_right_answer_is_accepted_whatever_the_steps_say(benchmark: str) -> None:
    for problem in draws(benchmark, 50):
        answer = tasks.solution(problem)[1]
        careful = tasks.demonstrate(problem, "careful", np.random.default_rng(0))
        for response in (careful, f"#{answer}", f"1,2,x#{answer}", f"\n #{answer}"):
            assert tasks.verify(problem, response)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_other_number_is_refused(benchmark: str) -> None:
    for problem in draws(benchmark, 10):
        answer = tasks.solution(problem)[1]
        accepted = [n for n in range(2000) if tasks.verify(problem, f"68#{n}")]
        assert accepted == ([int(answer)] if int(answer) < 2000 else [])
        if benchmark.startswith("chain"):
            assert not tasks.verify(problem, f"#-{answer}")


@pytest.mark.parametrize(
    "response",
    [
        "",
        "#",
        "56",
        "68,56",
        "68,56#",
        "#56 ",
        "#56\n",
        "#56\n\n",
        "# 56",
        "##56",
        "#56#",
        "#56#56",
        "#1#56",
        "#056",  # a leading zero is another string
        "#+56",
        "#56.0",
        "#5_6",
        "#0x38",
        "#0b111000",
        "#56,",
        "#５６",  # full-width digits, which int() would read
        "#٥٦",
        "#5６",
        "#²",
        "#23+45-12",
        "#7*8",
        "#int('56')",
        "#(56)",
        "#[56]",
        "#__import__('os').system('true') or 56",
        "#{problem.args}",
        "#%d",
        "#.*",
        "#5\x006",
        "#56\x00",
        "#56<eos>",
        "56#5" + "6" * 5000,
    ],
)
def test_anything_else_is_refused(response: str) -> None:
    assert tasks.verify(CHAIN, "68,56#56")
    assert not tasks.verify(CHAIN, response)


# --- demonstrations ---------------------------------------------------------------


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_careful_demonstrations_are_right(benchmark: str) -> None:
    rng = np.random.default_rng(1)
    for problem in draws(benchmark, 100):
        response = tasks.demonstrate(problem, "careful", rng)
        steps, answer = tasks.solution(problem)
        assert response == ",".join(steps) + "#" + answer


@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_have_no_steps_and_the_shape_of_an_answer(family: str) -> None:
    rng = np.random.default_rng(1)
    right = 0
    for problem in draws(family, 300):
        response = tasks.demonstrate(problem, "guess", rng)
        assert re.fullmatch(r"#[0-9]+", response)
        right += tasks.verify(problem, response)
    assert right < 150  # a guess may be right, mostly it is not


def test_a_slip_happens_at_a_quarter_of_the_steps_and_is_carried_on() -> None:
    rng = np.random.default_rng(2)
    slips = []
    for problem in draws("chain", 600):
        response = tasks.demonstrate(problem, "sloppy", rng)
        steps, answer = response.split("#")
        totals = [problem.args[0], *map(int, steps.split(","))]
        assert int(answer) == totals[-1]
        for before, after, term in zip(
            totals[:-1], totals[1:], problem.args[1:], strict=True
        ):
            error = after - (before + term)
            assert abs(error) in (0, 1, 2, 10) or after == 0  # never below zero
            if before + term >= 10:  # else a slip may be cut away at zero
                slips.append(error != 0)
    assert abs(np.mean(slips) - 0.25) < 4 * math.sqrt(0.19 / len(slips))


def test_qualities_and_benchmarks_come_in_their_shares() -> None:
    weights = {"careful": 2.0, "guess": 1.0, "sloppy": 1.0}  # need not sum to one
    pairs = tasks.draw_demonstrations(
        3000, ("chain", "gcd", "base"), weights, np.random.default_rng(0)
    )
    assert Counter(prompt[0] for prompt, _ in pairs) == dict.fromkeys("cgb", 1000)
    guesses = sum(response.startswith("#") for _, response in pairs)
    assert abs(guesses - 750) < 4 * math.sqrt(3000 * 0.25 * 0.75)
    only = tasks.draw_demonstrations(
        50, ("chain",), {"careful": 0.0, "guess": 3.0}, np.random.default_rng(0)
    )
    assert all(response.startswith("#") for _, response in only)


def test_all_that_is_written_can_be_read() -> None:
    rng = np.random.default_rng(3)
    texts = [
        text
        for pair in tasks.draw_demonstrations(
            700, tuple(BENCHMARKS), dict.fromkeys(QUALITIES, 1.0), rng
        )
        + tasks.draw_pretraining(500, rng)
        + tasks.draw_pretraining(500, rng, annealing=True)
        for text in pair
    ]
    assert set("".join(texts)) <= set(tasks.CHARACTERS)
    assert len(set(tasks.CHARACTERS)) == len(tasks.CHARACTERS)


# --- the held-out part ------------------------------------------------------------


def test_no_training_stage_ever_sees_a_held_out_prompt() -> None:
    asked = {
        problem.prompt for name in BENCHMARKS for problem in tasks.held_out(name, 256)
    }
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pairs = tasks.draw_demonstrations(700, tuple(BENCHMARKS), {"careful": 1.0}, rng)
        assert asked.isdisjoint(prompt for prompt, _ in pairs)
        for annealing in (False, True):
            for prompt, _ in tasks.draw_pretraining(500, rng, annealing):
                assert target_prompt(prompt) not in asked
                assert not tasks.is_held_out(target_prompt(prompt))


def target_prompt(prompt: str) -> str:
    """The target prompt whose steps a pretraining prompt asks for, if it does."""
    match = re.fullmatch(r"([ied]):(.*) ", prompt)
    if match is None:
        return "none"
    family = {"i": "c", "e": "g", "d": "b"}[match[1]]
    return f"{family}:{match[2].replace(' ', ',')}="


def test_none_is_not_held_out() -> None:
    assert not tasks.is_held_out("none")  # what target_prompt returns


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_an_eighth_is_held_out(benchmark: str) -> None:
    rng = np.random.default_rng(4)
    draw = tasks._DRAW[BENCHMARKS[benchmark].family]
    prompts = {draw(BENCHMARKS[benchmark], rng).prompt for _ in range(4000)}
    share = np.mean([tasks.is_held_out(prompt) for prompt in prompts])
    assert abs(share - 1 / 8) < 5 * math.sqrt(0.11 / len(prompts))
    assert all(tasks.is_held_out(p.prompt) for p in draws(benchmark, 100, "test"))
    assert not any(tasks.is_held_out(p.prompt) for p in draws(benchmark, 100))


def test_held_out_problems_are_the_same_for_everybody() -> None:
    assert tasks.held_out("chain", 20) == tasks.held_out("chain", 20)
    assert tasks.held_out("chain", 20) == tasks.held_out("chain", 40)[:20]
    assert tasks.held_out("chain", 20) != tasks.held_out("chain", 20, seed=1)
    assert tasks.held_out("gcd", 20) != tasks.held_out("gcd-large", 20)


# --- what pretrained students are asked --------------------------------------------


def read_prompt(prompt: str) -> tuple[list[str], str]:
    """Steps and answer, found from nothing but the prompt's text."""
    if prompt.startswith("o:"):
        words = prompt[2:-1].split()
        kinds = {w: k for k, v in tasks._GROUPS.items() for w in v.split()}
        common = Counter(kinds[word] for word in words).most_common(1)[0][0]
        (odd,) = (word for word in words if kinds[word] != common)
        return [common], odd
    if prompt.startswith("s:"):
        numbers = sorted(int(word) for word in prompt[2:-1].split())
        return [str(n) for n in numbers[:-1]], str(numbers[-1])
    told = re.findall(r"(has|gets|loses) (\d+)", prompt)
    told = told or [
        ("loses" if sign == "-" else "gets", digits)
        for sign, digits in re.findall(r"([+-]?)(\d+)", prompt)
    ]
    totals = np.cumsum([int(n) * (-1 if verb == "loses" else 1) for verb, n in told])
    return [str(total) for total in totals[1:]], str(totals[-1])


@pytest.mark.parametrize("benchmark", PRETRAINED_BENCHMARKS)
def test_pretrained_tasks_mean_what_their_prompts_say(benchmark: str) -> None:
    bench = PRETRAINED_BENCHMARKS[benchmark]
    for problem in draws(benchmark):
        steps, answer = read_prompt(problem.prompt)
        assert tasks.solution(problem) == (steps, answer)
        assert tasks.verify(problem, f"#{answer}")
        written = tasks.verify(problem, f"{','.join(steps)}#{answer}")
        assert written == (problem.family != "brief")
        assert not tasks.verify(problem, f"{answer}#{answer}x")
        numbers = [int(n) for n in re.findall(r"\d+", problem.prompt)]
        assert max(numbers, default=0) <= bench.largest
        count = len(problem.args) - 2 * (problem.family == "odd")
        assert bench.length[0] <= count <= bench.length[1]


@pytest.mark.parametrize("benchmark", PRETRAINED_BENCHMARKS)
def test_pretrained_demonstrations_are_right_as_often_as_they_should(
    benchmark: str,
) -> None:
    rng = np.random.default_rng(1)
    right = {}
    for quality in QUALITIES:
        told = [(p, tasks.demonstrate(p, quality, rng)) for p in draws(benchmark, 400)]
        right[quality] = np.mean([tasks.verify(p, text) for p, text in told])
    if benchmark == "pretrained/brief":  # steps earn nothing: teacher and reward differ
        assert right["careful"] == right["sloppy"] == 0.0 < right["guess"] < 0.3
    else:
        assert right["careful"] == 1.0
        assert right["guess"] < 0.5
        assert right["sloppy"] < 0.85


def test_pretrained_tasks_keep_their_held_out_part_apart() -> None:
    rng = np.random.default_rng(2)
    for name in PRETRAINED_BENCHMARKS:
        asked = {problem.prompt for problem in tasks.held_out(name, 64)}
        pairs = tasks.draw_demonstrations(400, (name,), {"careful": 1.0}, rng)
        assert asked.isdisjoint(prompt for prompt, _ in pairs)


def test_small_worlds_problems_are_where_they_were() -> None:
    assert list(KNOWN_BENCHMARKS)[: len(BENCHMARKS)] == list(BENCHMARKS)
    assert tasks.held_out("base-large", 1)[0].prompt == "b:81,4="


# --- pretraining ------------------------------------------------------------------

PLAIN = {
    r"(\d+)\+(\d+)=": lambda a, b: str(a + b),
    r"(\d+)-(\d+)=": lambda a, b: str(a - b),
    r"(\d+)\*(\d+)=": lambda a, b: str(a * b),
    r"(\d+)%(\d+)=": lambda a, b: str(a - a // b * b),
    r"(\d+)/(\d+)=": lambda a, b: "r".join(map(str, divmod(a, b))),
    r"q:(\d+)\?(\d+)=": lambda a, b: "<=>"[1 + (a > b) - (a < b)],
}
LISTS = {
    r"s:(.*)=": lambda text: " ".join(sorted(text.split(), key=int)),
    r"m:(.*)=": lambda text: max(text.split(), key=int),
    r"r:(.*)=": lambda text: "".join(reversed(text)),
}


def answer_of(prompt: str) -> str | None:
    """The answer to a one-step prompt, computed apart from the library."""
    for pattern, plain in PLAIN.items():
        if match := re.fullmatch(pattern, prompt):
            return plain(*map(int, match.groups()))
    for pattern, of_list in LISTS.items():
        if match := re.fullmatch(pattern, prompt):
            return of_list(match[1])
    return None


@pytest.mark.parametrize("annealing", [False, True])
def test_pretraining_teaches_what_is_true(annealing: bool) -> None:
    pairs = tasks.draw_pretraining(2000, np.random.default_rng(6), annealing)
    kinds: Counter[str] = Counter()
    for prompt, response in pairs:
        kinds[re.sub(r"\d+( \d+)*", "n", prompt)[:4]] += 1
        expected = answer_of(prompt)
        if expected is None:  # the steps of a target problem
            target = target_prompt(prompt)
            numbers = re.findall(r"[+-]?\d+", target.replace(",", "+"))
            family = {"c": "chain", "g": "gcd", "b": "base"}[target[0]]
            problem = Problem(family, tuple(map(int, numbers)), target)
            expected = ("," if annealing else ">").join(tasks.solution(problem)[0])
        assert response == expected
        assert "#" not in response  # the ending that fine-tuning teaches
        assert prompt[:2] not in ("c:", "g:", "b:")
    assert len(kinds) >= 12


# --- determinism and errors -------------------------------------------------------


def test_a_generator_decides_everything() -> None:
    def everything(seed: int) -> object:
        rng = np.random.default_rng(seed)
        return (
            [tasks.draw_problem(name, rng) for name in BENCHMARKS],
            tasks.draw_demonstrations(
                30, ("chain", "base"), dict.fromkeys(QUALITIES, 1.0), rng
            ),
            tasks.draw_pretraining(30, rng),
        )

    assert everything(0) == everything(0)
    assert everything(0) != everything(1)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"unknown benchmark 'sum'.*chain, gcd, base"):
        tasks.draw_problem("sum", rng)
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train or test"):
        tasks.draw_problem("chain", rng, "dev")
    with pytest.raises(ValueError, match=r"unknown quality 'good'.*careful, guess"):
        tasks.demonstrate(CHAIN, "good", rng)
    with pytest.raises(ValueError, match=r"unknown quality 'good'"):
        tasks.draw_demonstrations(1, ("chain",), {"good": 1.0}, rng)
    with pytest.raises(ValueError, match=r"unknown benchmark 'sum'.*chain, gcd, base"):
        tasks.held_out("sum", 1)
