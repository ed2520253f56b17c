"""Is a printed number more than a distance? What one printed number says of another.

For pairs of numbers that one work prints: how far an update without place must go to
give the first, and what it then gives for the second.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.stats

from opd_geometry.analysis.exclusions import joint, printed, printed_shares
from opd_geometry.analysis.unplaced import origins as og
from opd_geometry.analysis.unplaced import printed as pr
from opd_geometry.analysis.unplaced.origins import Origin
from opd_geometry.geometry import gram, spectra
from opd_geometry.geometry import unplaced as closed

TOLERANCE = 1e-5  # the absolute one of arXiv:2606.13657
SPREADS = (0.015, 0.025, 0.04)  # of the entries of language models' weights
CONFINED = 0.10  # an overlap with so narrow a range says nothing of place
ONE, MORE, ORDER = "one distance", "not one distance", "order of magnitude only"


# --- which printed numbers can say something -----------------------------------------


def possible_overlap(density: float, alpha: float) -> tuple[float, float]:
    """Between which bounds an overlap must lie, whatever the update.

    max(0, 1 - (1 - alpha) / d) <= o <= min(1, alpha / d)

    Exact for one matrix, and for counts pooled over matrices.

    Args:
        density: d, share of the entries that change, between 0 and 1.
        alpha: share of the entries in the mask.

    Returns:
        The smallest and the largest overlap.

    Raises:
        ValueError: a share outside (0, 1).

    >>> [round(x, 3) for x in possible_overlap(0.8, 0.5)]
    [0.375, 0.625]
    """
    og.check_densities([density, alpha])
    return max(0.0, 1.0 - (1.0 - alpha) / density), min(1.0, alpha / density)


def weights_table(
    densities: Mapping[str, float], overlaps: Mapping[tuple[str, str], float]
) -> pd.DataFrame:
    """What each printed overlap could have been, and whether it can tell anything.

    Args:
        densities: arm to density.
        overlaps: (arm, metric) to printed overlap.

    Returns:
        arm, metric, printed, low, high (the bounds), ``says`` (``something`` or
        ``nothing``: its range is narrower than ``CONFINED``).
    """
    rows = []
    for (arm, metric), value in overlaps.items():
        low, high = possible_overlap(densities[arm], og.ALPHA)
        says = "something" if high - low > CONFINED else "nothing"
        rows.append((arm, metric, value, low, high, says))
    columns = ["arm", "metric", "printed", "low", "high", "says"]
    return pd.DataFrame(rows, columns=columns)


def alpha_interval() -> tuple[float, float]:
    """Which shares of the entries SFT's two printed overlaps leave to a mask.

    Returns:
        The smallest and the largest alpha, for pooled counts.
    """
    shares = printed_shares()
    ends = joint(shares[shares["arm"] == "sft"])
    return ends["low"], ends["high"]


# --- Table 1 against Figure 3 --------------------------------------------------------

# Qwen3-8B: width, layers, vocabulary, of its configuration; embeddings are not tied.
WIDTH, LAYERS, VOCABULARY = 4096, 36, 151_936
SHAPES = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (12288, 4096),
    "up": (12288, 4096),
    "down": (4096, 12288),
}


def embedding_share() -> float:
    """Share of Qwen3-8B's parameters that are embeddings and the output head."""
    inside = LAYERS * sum(rows * columns for rows, columns in SHAPES.values())
    outside = 2 * WIDTH * VOCABULARY
    return outside / (inside + outside)


def embedding_density(weighted: float, layers: float) -> float:
    """The density of the embeddings that would explain a weighted mean.

    d_e = (d_w - (1 - s) d_l) / s, s the embeddings' share of the parameters

    Args:
        weighted: of all parameters.
        layers: of the layers' matrices.

    Returns:
        A density if embeddings can explain it; outside [0, 1] if they cannot.
    """
    share = embedding_share()
    return (weighted - (1 - share) * layers) / share


def two_means(origins: Sequence[Origin], by_arm: Mapping[str, float]) -> pd.DataFrame:
    """Table 1's and Figure 3's densities, and what one step size makes of them.

    Args:
        origins: matrices of unlike sizes.
        by_arm: plain means, Figure 3.

    Returns:
        arm, weighted (100 minus Table 1's sparsity, as share), plain, difference,
        ``one_scale`` (the difference if all matrices take steps of one size: Gaussian),
        ``embeddings`` (their density if they alone made the difference), ``mlp_gain``
        (of ``gain_between``, which makes it without embeddings).
    """
    table = printed("table_1").set_index("arm")["value"]
    wholes = [origin.whole for origin in origins]
    sizes = np.array([whole.n for whole in wholes], float)
    rows = []
    for arm, plain in by_arm.items():
        weighted = 1 - float(table[arm]) / 100
        scale = pr.one_scale(wholes, plain, "Gaussian")
        each = np.array([closed.expected_density(w, scale) for w in wholes])
        one = float(each @ sizes / sizes.sum() - each.mean())
        embeddings = embedding_density(weighted, plain)
        gain = gain_between(origins, plain, weighted)
        rows.append((arm, weighted, plain, weighted - plain, one, embeddings, gain))
    columns = ["arm", "weighted", "plain", "difference", "one_scale", "embeddings"]
    return pd.DataFrame(rows, columns=[*columns, "mlp_gain"])


def gain_between(origins: Sequence[Origin], plain: float, weighted: float) -> float:
    """How far MLP matrices must step, attention ones 1, to make two printed means.

    Steps are Gaussian, of one size in each of the two kinds.

    Args:
        origins: matrices of unlike sizes.
        plain: mean density over matrices.
        weighted: mean density over entries.

    Returns:
        The ratio of the step sizes; NaN if none between 1/20 and 20 does.
    """
    wholes = [origin.whole for origin in origins]
    sizes = np.array([whole.n for whole in wholes], float)
    large = np.array([origin.role in ("gate", "up", "down") for origin in origins])

    def each(log_gain: float) -> np.ndarray:
        gains = np.exp(log_gain * large)

        def densities(log_scale: float) -> np.ndarray:
            scales = np.exp(log_scale) * gains
            pairs = zip(wholes, scales, strict=True)
            return np.array([closed.expected_density(w, s) for w, s in pairs])

        middle = np.log(pr.one_scale(wholes, plain, "Gaussian"))
        found = scipy.optimize.brentq(
            lambda x: float(densities(x).mean()) - plain, middle - 4, middle + 4
        )
        return densities(found)

    def gap(log_gain: float) -> float:
        return float(each(log_gain) @ sizes / sizes.sum()) - weighted

    ends = -np.log(20), np.log(20)
    if gap(ends[0]) * gap(ends[1]) > 0:
        return float("nan")
    return float(np.exp(scipy.optimize.brentq(gap, *ends, xtol=1e-4)))


# --- one distance? -------------------------------------------------------------------


def stored_norm(
    origins: Sequence[Origin], density: float, law: str, seed: int
) -> float:
    """Norm of the stored difference of an unplaced update, all matrices together.

    Args:
        origins: the matrices, moved with one step size.
        density: share of all entries that change.
        law: a key of ``origins.LAWS``.
        seed: of the update.
    """
    pooled = closed.pooled([origin.whole for origin in origins])
    scale = closed.scale_at_density(pooled, density, og.LAWS[law])
    rng, square = np.random.default_rng((seed, 7)), 0.0
    for origin in origins:
        after = origin.w + scale * og.drawn(law, origin.w.shape, rng)
        moved = after.bfloat16().double() - origin.w.bfloat16().double()
        square += float(moved.square().sum())
    return square**0.5


def absolute_sparsity(
    origins: Sequence[Origin], sparsity: float, spread: float, law: str, seed: int
) -> float:
    """Sparsity under an absolute tolerance of the update with a given bf16 sparsity.

    Args:
        origins: the matrices; only the form of their entries' law is used.
        sparsity: of bf16, all matrices together.
        spread: standard deviation of the entries of each matrix.
        law: a key of ``origins.LAWS``.
        seed: of the update.
    """
    rng, within, size = np.random.default_rng((seed, 7)), 0, 0
    for origin in origins:
        factor = spread / float(origin.w.double().std())
        w = (origin.w * factor).bfloat16().float()
        whole = closed.magnitudes(w)
        scale = closed.scale_at_density(whole, 1 - sparsity, og.LAWS[law])
        after = (w + scale * og.drawn(law, w.shape, rng)).bfloat16().float()
        within += int(((after - w).abs() <= TOLERANCE).sum())
        size += w.numel()
    return within / size


def step_sparsity(origins: Sequence[Origin], rate: float) -> float:
    """Share of the entries that one step of Adam's usual size leaves as they are.

    Args:
        origins: the matrices, on the bf16 grid.
        rate: size of every entry's step.
    """
    pooled = closed.pooled([origin.whole for origin in origins])
    return closed.expected_sparsity(pooled, rate, "sign")


def isotropic_rank(shape: tuple[int, int]) -> tuple[float, float]:
    """Stable rank and top-16 energy of independent entries, in the large.

    m n / (sqrt(m) + sqrt(n))^2, and 16 over it

    Args:
        shape: (m, n).

    >>> [round(x, 3) for x in isotropic_rank((400, 400))]
    [100.0, 0.16]
    """
    m, n = shape
    rank = m * n / (m**0.5 + n**0.5) ** 2
    return rank, min(1.0, 16 / rank)


class Pair(NamedTuple):
    """Two numbers that one work prints, and what one distance makes of the second.

    Attributes:
        work, given, then: in words.
        value: the second number, as printed.
        low, high: the second number without place, over what is not printed.
        order: whether it is printed as an order of magnitude.
    """

    work: str
    given: str
    then: str
    value: float
    low: float
    high: float
    order: bool = False


def pairs_table(pairs: Sequence[Pair]) -> pd.DataFrame:
    """Each pair with its reading.

    Args:
        pairs: of ``pairs``.

    Returns:
        work, given, then, printed, low, high, reading: ``ONE`` if the number lies
        within, ``ORDER`` if it is printed as an order and lies within half a decade,
        ``MORE`` otherwise.
    """
    rows = []
    for pair in pairs:
        slack = 10**0.5 if pair.order else 1.0
        inside = pair.low / slack <= pair.value <= pair.high * slack
        reading = (ORDER if pair.order else ONE) if inside else MORE
        rows.append((*pair[:6], reading))
    columns = ["work", "given", "then", "printed", "low", "high", "reading"]
    return pd.DataFrame(rows, columns=columns)


def related_pairs(
    sets: Sequence[Sequence[Origin]], nss: Mapping[str, tuple[float, float]]
) -> list[Pair]:
    """The pairs of the other works in ``data/paper/related.csv``.

    Args:
        sets: weights of several laws; none with exact zeros, which any step changes.
        nss: arm to spectral share, ||s(W+) - s(W0)|| / ||dW||, without place and with
            weight decay (smallest, largest).
    """
    table = printed("related")
    value = table.set_index(["item", "arm", "metric"])["value"].astype(float).to_dict()
    return [
        *_rank_pairs(value, sets),
        *_step_pairs(value, sets),
        *_spectral_pairs(value, nss),
        *_teacher_pairs(value, sets),
        *_offline_pairs(value),
        *_cell_pairs(value),
    ]


Printed = Mapping[tuple[str, str, str], float]  # (item, arm, metric) to the number
LAWS = ("Gaussian", "Laplace")  # of steps, where a pair asks for more than one


def _rank_pairs(value: Printed, sets: Sequence[Sequence[Origin]]) -> list[Pair]:
    """Sparsity by a fixed tolerance, and ranks, of OPD and two references."""
    work = "arXiv:2606.13657"
    deep = value["arXiv:2511.08567", "DeepScaleR", "sparsity"] / 100
    absolute = (
        absolute_sparsity(origins, deep, spread, law, 0)
        for origins in sets
        for spread in SPREADS
        for law in LAWS
    )
    found = [
        Pair(
            "2511.08567 and 2606.13657",
            "DeepScaleR: bf16 sparsity",
            "sparsity within 1e-5, if entries spread by 0.015 to 0.04",
            value[work, "DeepScaleR", "sparsity_absolute"] / 100,
            *_ends(absolute),
        )
    ]
    ranks, energies = zip(
        *map(isotropic_rank, ((8960, 1536), (256, 1536))), strict=True
    )
    for arm in ("DeepScaleR", "Qwen3-1.7B OPD", "Qwen-Math distill (offline)"):
        given = f"{arm}: any sparsity"
        rank = value[work, arm, "stable_rank"]
        found.append(Pair("2606.13657", given, "stable rank", rank, *_ends(ranks)))
        energy = value[work, arm, "top_16_energy"] / 100
        words = "energy in the top 16"
        found.append(Pair("2606.13657", given, words, energy, *_ends(energies)))
    return found


def _step_pairs(value: Printed, sets: Sequence[Sequence[Origin]]) -> list[Pair]:
    """Sparsity of single steps, from rates."""
    shown = value["arXiv:2602.03839", "steps of RL runs", "step_sparsity"] / 100
    ends = _ends(step_sparsity(o, rate) for o in sets for rate in (1e-6, 5e-6))
    given = "rates of 1e-6 to 5e-6"
    return [Pair("2602.03839", given, "sparsity of one step", shown, *ends)]


def _spectral_pairs(
    value: Printed, nss: Mapping[str, tuple[float, float]]
) -> list[Pair]:
    """Share of the update that moves singular values."""
    words = "share that moves singular values"
    return [
        Pair(
            "2607.19331",
            f"{arm}: any density",
            words,
            value["arXiv:2607.19331", arm, "spectral_share"] / 100,
            *nss[arm.lower()],
        )
        for arm in ("RLVR", "SFT")
    ]


def _teacher_pairs(value: Printed, sets: Sequence[Sequence[Origin]]) -> list[Pair]:
    """OPD against its own RL teacher: norms, and energy along its update."""
    work, found = "arXiv:2609.39405", []
    for task in ("Math", "Code"):
        densities = [
            value[work, f"{task}: {arm}", "density"] / 100 for arm in ("OPD", "RL")
        ]
        ratios = (
            stored_norm(origins, densities[0], law, 0)
            / stored_norm(origins, densities[1], law, 0)
            for origins in sets
            for law in LAWS
        )
        ratio = value[work, f"{task}: OPD over its RL teacher", "norm_ratio"] / 100
        apart = value[work, f"{task}: OPD against RL", "orthogonal_energy"] / 100
        for words, shown, ends in (
            ("norm of OPD over that of RL", ratio, _ends(ratios)),
            ("energy of OPD's update along RL's", 1 - apart, _along(sets, densities)),
        ):
            given = f"{task}: both densities"
            found.append(Pair("2609.39405", given, words, shown, *ends))
    return found


def _along(
    sets: Sequence[Sequence[Origin]], densities: Sequence[float]
) -> tuple[float, float]:
    """Squared cosine of two stored unplaced updates on one start."""
    shares = []
    for origins in sets:
        pooled = closed.pooled([origin.whole for origin in origins])
        moved = []
        for seed, density in enumerate(densities):
            scale = closed.scale_at_density(pooled, density, og.LAWS["Gaussian"])
            draw = pr.without_place(origins, "Gaussian", seed)
            parts = [
                (draw.after(i, scale).double() - origin.w.double()).ravel()
                for i, origin in enumerate(origins)
            ]
            moved.append(np.concatenate(parts))
        a, b = moved
        shares.append(float((a @ b) ** 2 / ((a @ a) * (b @ b))))
    return _ends(shares)


def _offline_pairs(value: Printed) -> list[Pair]:
    """Directions of offline objectives: two unplaced updates share none."""
    work = "arXiv:2606.23740"
    apart = value[work, "offline GRPO against SFT", "orthogonal_share"] / 100
    alike = value[work, "SFT and its variants", "cosine"]
    name = work.removeprefix("arXiv:")
    return [
        Pair(
            name,
            "offline GRPO against SFT: any distance",
            "orthogonal share",
            apart,
            1.0,
            1.0,
        ),
        Pair(name, "SFT and its variants: any distance", "cosine", alike, 0.0, 0.0),
    ]


def _cell_pairs(value: Printed) -> list[Pair]:
    """Energy in W_0's core, and cells that stand out, of a repository's notes."""
    work, found = "thunderingluck/rlvr-geometry", []
    for role, size in (("q", 1536**2), ("o", 1536**2), ("down", 1536 * 8960)):
        arm = f"DeepScaleR: {role} projection of block 13"
        shown, chance = value[work, arm, "core_energy"] / 100, 64 * 64 / size
        given = f"DeepScaleR, {role}: any distance"
        words = "energy in both top-64 subspaces"
        found.append(Pair("rlvr-geometry", given, words, shown, chance, chance))
    cells = int(value[work, "cells", "count"])
    low, high = scipy.stats.binom.interval(0.95, cells, scipy.stats.norm.sf(2) * 2)
    words = "cells beyond two standard errors"
    shown = value[work, words, "count"]
    given = f"{cells} cells: any distance"
    ends = float(low), float(high)
    return [*found, Pair("rlvr-geometry", given, words, shown, *ends)]


def _ends(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return min(known), max(known)


# --- spectral shift by size ----------------------------------------------------------


def expected_shift(distance: float, shape: tuple[int, int]) -> float:
    """Spectral shift of independent steps on independent weights.

    NSS^2 = e^2 / n + (e^2 / 2)^2,  n = max(shape)

    The first term is the variance of u_i^T D v_i, the second the growth of all singular
    values by sqrt(1 + e^2). It holds while steps are small beside the spacing of
    singular values, and within a factor of 1.3 beyond.

    Args:
        distance: e, norm of the update over that of the weights.
        shape: of the matrix.

    Source: ours.

    >>> round(expected_shift(0.001, (100, 10_000)), 8)
    1.001e-05
    """
    return float(np.hypot(distance / max(shape) ** 0.5, distance**2 / 2))


def shift_rows(
    densities: Mapping[str, float], shapes: Sequence[tuple[int, int]], seed: int = 0
) -> pd.DataFrame:
    """Spectral shift of unplaced updates on Gaussian weights, measured and expected.

    Args:
        densities: arm to density.
        shapes: of the matrices.
        seed: of weights and updates.

    Returns:
        arm, n (larger side), nss, expected, distance (of the stored difference).
    """
    rows = []
    for shape in shapes:
        (origin,) = og.synthetic("Gaussian", seed, {"q": shape})
        w = origin.w.double()
        old = gram.decompose(w, 1).spectrum
        draw = pr.without_place([origin], "Gaussian", seed)
        scales = draw.scales(list(densities.values()))[0]
        for arm, scale in zip(densities, scales, strict=True):
            after = draw.after(0, scale).double()
            distance = float((after - w).norm() / w.norm())
            new = gram.decompose(after, 1).spectrum
            shift = spectra.normalised_spectral_shift(old, new)
            expected = expected_shift(distance, shape)
            rows.append((arm, max(shape), shift, expected, distance))
    columns = ["arm", "n", "nss", "expected", "distance"]
    return pd.DataFrame(rows, columns=columns)


def at_8b(distances: Mapping[str, float]) -> dict[str, float]:
    """Expected spectral shift at Qwen3-8B's shapes, mean over the seven matrices.

    Args:
        distances: arm to norm of the stored difference over that of the weights.
    """
    return {
        arm: float(np.mean([expected_shift(e, shape) for shape in SHAPES.values()]))
        for arm, e in distances.items()
    }
