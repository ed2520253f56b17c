"""The paper's sixteen claims: statement, numbers, quantity and rule, in our words.

The texts say what ``evidence`` computes; their margins come from there. They were
written before the runs that they judge.
"""

from collections.abc import Callable
from dataclasses import dataclass

from opd_geometry.analysis import evidence as ev
from opd_geometry.analysis.verdicts import Evidence

RATIO = "ratio"  # averaged as logarithms, shown as a factor
SHARE = "share of entries"
KEPT = "share of the gain"
THREE_ARMS = ("sft", "opd", "rlvr")
FALLING = ("rlvr", "opd", "sft")
BOTH = ("float32", "bf16")

GAUSSIAN = "Gaussian updates with the same Frobenius norm per matrix."
ENTRYWISE = (
    "Gaussian updates with the same Frobenius norm per matrix, and the run's own "
    "float32 updates with their entries shuffled."
)
SPECTRAL = (
    "Gaussian updates with the same Frobenius norm per matrix, and updates with the "
    "run's own singular values and random singular vectors (turned)."
)
NOISE = (
    "Gaussian updates, the run's own increments each turned by a rotation of its own, "
    "a walk with the run's own optimizer, rates and step norms, and rlvr-coin, trained "
    "on coin flips; in bf16 also rounding alone."
)
NOT_NOISE = "Gaussian updates: they keep one stable rank, whatever their norm."
YARDSTICK = f"{NOT_NOISE} And rlvr-coin, trained on coin flips."
MATCHED = (
    "sft-matched, sft-learns and ce-teacher: imitation from OPD's anchor, at OPD's "
    "learning rate, steps and batch, of mixed demonstrations, of the teacher's kind, "
    "and of the teacher's own texts."
)
RLVR_TOO = f"RLVR, the yardstick. {MATCHED}"
HOLM = "(if several parts could, by Holm's method)"

ORDER_RULE = (
    "Reproduced when {what} have a 95 % interval above {zero}, not reproduced when one "
    f"lies below {HOLM}. Explained when a null, or a matched arm in OPD's place, shows "
    "such a difference too, unless it is shown to be less than half of the arms' own."
)
BAND_RULE = (
    "Reproduced when OPD's highest over lowest lies below {band:.2f} (the paper's "
    "{of}), SFT grows{beyond} and by more than OPD, and RLVR shrinks and by more than "
    "OPD, each with its whole 95 % interval; not reproduced when an interval lies on "
    f"the other side {HOLM}. Explained when OPD's stable rank is more than half that "
    "of a Gaussian, when a walk, turned increments or rlvr-coin stay in the band too, "
    "or when a null, or a matched arm in OPD's place, shows half of a growth."
)
KEPT_RULE = (
    f"A trajectory is kept when its distance has a 95 % interval below a factor of "
    f"{ev.SAME_FACTOR:g}. Reproduced when {{what}}, not reproduced when one interval "
    f"lies on the other side {HOLM}. Explained when RLVR, the yardstick, or rlvr-coin "
    "or a matched arm keeps the trajectory too, or OPD's stable rank is more than half "
    "that of noise."
)


@dataclass(frozen=True)
class Shown:
    """Levels that are told beside a claim's printed numbers, in their unit.

    Attributes:
        metric: of matrices.
        arms: in the order in which the paper's numbers stand.
        unit: ``%`` for shares, else words after the number.
        roles: of the matrices averaged over.
        weighted: by the matrices' sizes.
        moment: ``last``, ``first``, or ``course``: the lowest to the highest mean.
    """

    metric: str
    arms: tuple[str, ...] = ("sft", "opd", "rlvr")
    unit: str = ""
    roles: tuple[str, ...] = ev.LAYERS
    weighted: bool = False
    moment: str = "last"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, and how it is judged.

    Attributes:
        id: its name in the book.
        paper_item: where it stands in arXiv:2606.07082.
        statement: the claim, in our words.
        paper_value: the numbers that the paper prints.
        quantity: what is computed, one number a seed.
        unit: of the effect.
        rule: how the seeds' numbers become a verdict.
        null, matched: what the claim is held against.
        arms, metrics: what the table must hold (arms may be shell patterns).
        evidence: tidy table, and the suffix of a readout, to parts and controls.
        control_arms: arms without which a claim that holds stays inconclusive.
        readouts: what the weights are read from, keys of ``evidence.READOUTS``; the
            first decides, the others are judged beside it.
        shown: levels in the unit of the paper's numbers, where it prints or draws any.
    """

    id: str
    paper_item: str
    statement: str
    paper_value: str
    quantity: str
    unit: str
    rule: str
    null: str
    matched: str
    arms: tuple[str, ...]
    metrics: tuple[str, ...]
    evidence: Callable[..., Evidence]
    control_arms: tuple[str, ...] = ev.MATCHED_ARMS
    readouts: tuple[str, ...] = ("float32",)
    shown: Shown | None = None


def _with_projected(*arms: str) -> tuple[str, ...]:
    return tuple(name for arm in arms for name in (arm, f"{arm}{ev.FORMS[0]}"))


CLAIMS = (
    Claim(
        id="sparsity-order",
        paper_item="Table 1",
        statement="Seen in bf16, OPD leaves more weights unchanged than SFT and fewer "
        "than RLVR.",
        paper_value="8.1 / 51.6 / 77.2 % (SFT / OPD / RLVR)",
        quantity="Share of entries unchanged at the end, weighted by the matrices' "
        "sizes: OPD minus SFT, RLVR minus OPD.",
        unit=SHARE,
        rule=ORDER_RULE.format(what="both differences", zero="0"),
        null=ENTRYWISE,
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("sparsity", "parameters"),
        readouts=("bf16",),
        shown=Shown("sparsity", unit="%", weighted=True),
        evidence=ev.final_order(
            "sparsity", rising=THREE_ARMS, nulls=ev.ENTRYWISE, weighted=True
        ),
    ),
    Claim(
        id="sparsity-robust",
        paper_item="Table 1",
        statement="OPD's sparsity hardly depends on the sizes of teacher and student, "
        "the data domain, or a mixture-of-experts teacher.",
        paper_value="48.6 to 57.1 % in six variants, 51.6 % in the main run",
        quantity="Size-weighted share of unchanged entries at the end: each variant "
        "minus OPD.",
        unit=SHARE,
        rule=f"Reproduced when every difference has a 95 % interval within "
        f"{ev.SPARSITY_MARGIN:g} either way (the paper's widest is 0.055), not "
        f"reproduced when one lies outside {HOLM}. Explained when a matched arm, or a "
        "Gaussian update with a variant's norm, stays within it too.",
        null=GAUSSIAN,
        matched=MATCHED,
        arms=("opd", *ev.VARIANT_ARMS),
        metrics=("sparsity", "parameters"),
        readouts=("bf16",),
        shown=Shown("sparsity", ("opd", *ev.VARIANT_ARMS), "%", weighted=True),
        evidence=ev.robust_sparsity,
    ),
    Claim(
        id="rotation-order",
        paper_item="Figure 2",
        statement="SFT rotates the principal subspaces of the weights most, OPD less, "
        "RLVR least.",
        paper_value="above 10, about 1, below 0.5 degrees (SFT, OPD, RLVR; one layer)",
        quantity="Largest principal angle at the end, mean of left and right and over "
        "matrices: SFT over OPD, OPD over RLVR.",
        unit=RATIO,
        rule=ORDER_RULE.format(what="both ratios", zero="1"),
        null=SPECTRAL,
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("angle_left_max_deg", "angle_right_max_deg"),
        shown=Shown("angle_left_mean_deg", unit="degrees"),
        evidence=ev.final_order(
            "angle_left_max_deg",
            "angle_right_max_deg",
            rising=FALLING,
            nulls=ev.SPECTRAL,
            log=True,
        ),
    ),
    Claim(
        id="drift-order",
        paper_item="Figure 2",
        statement="SFT shifts the singular values of the weights most, OPD less, RLVR "
        "least.",
        paper_value="NSS about 1e-3, 1e-4, 1e-5 (SFT, OPD, RLVR)",
        quantity="Normalised spectral shift at the end, mean over matrices: SFT over "
        "OPD, OPD over RLVR.",
        unit=RATIO,
        rule=ORDER_RULE.format(what="both ratios", zero="1"),
        null=SPECTRAL,
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("nss",),
        shown=Shown("nss"),
        evidence=ev.final_order("nss", rising=FALLING, nulls=ev.SPECTRAL, log=True),
    ),
    Claim(
        id="density-order",
        paper_item="Figure 3",
        statement="The share of visibly updated entries falls from SFT over OPD to "
        "RLVR.",
        paper_value="92.73 / 46.28 / 27.76 % (SFT / OPD / RLVR)",
        quantity="Share of entries changed in bf16 at the end, plain mean over "
        "matrices: SFT minus OPD, OPD minus RLVR.",
        unit=SHARE,
        rule=ORDER_RULE.format(what="both differences", zero="0"),
        null=ENTRYWISE,
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("density",),
        readouts=("bf16",),
        shown=Shown("density", unit="%"),
        evidence=ev.final_order("density", rising=FALLING, nulls=ev.ENTRYWISE),
    ),
    Claim(
        id="principal-depleted",
        paper_item="Figure 3",
        statement="From SFT over OPD to RLVR a falling share of the updated entries is "
        "principal ones, and for OPD and RLVR fewer than chance would give.",
        paper_value="29.66 / 27.31 / 26.65 % (SFT / OPD / RLVR), baseline 30 %",
        quantity="Overlap with the principal mask at the end, mean over matrices: SFT "
        f"minus OPD, OPD minus RLVR, the baseline {ev.MASK_ALPHA:g} minus OPD and "
        "minus RLVR.",
        unit=SHARE,
        rule=ORDER_RULE.format(what="all four differences", zero="0"),
        null=ENTRYWISE,
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("principal_overlap",),
        readouts=("bf16",),
        shown=Shown("principal_overlap", unit="%"),
        evidence=ev.principal_depleted,
    ),
    Claim(
        id="lowmag-enriched",
        paper_item="Figure 3",
        statement="From SFT over OPD to RLVR a rising share of the updated entries is "
        "of small magnitude.",
        paper_value="31.88 / 53.59 / 73.48 % (SFT / OPD / RLVR)",
        quantity="Overlap with the low-magnitude mask at the end, mean over matrices: "
        "OPD minus SFT, RLVR minus OPD.",
        unit=SHARE,
        rule=ORDER_RULE.format(what="both differences", zero="0"),
        null=ENTRYWISE,
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("low_magnitude_overlap",),
        readouts=("bf16",),
        shown=Shown("low_magnitude_overlap", unit="%"),
        evidence=ev.final_order(
            "low_magnitude_overlap", rising=THREE_ARMS, nulls=ev.ENTRYWISE
        ),
    ),
    Claim(
        id="rank-band",
        paper_item="Figure 4a",
        statement="Over training the stable rank of OPD's update stays in a narrow "
        "band, while SFT's expands and RLVR's contracts.",
        paper_value="OPD about 18 to 28, SFT up to about 75",
        quantity="Mean stable rank of the attention updates, last checkpoint over "
        "first: SFT, RLVR, SFT over OPD, OPD over RLVR; of OPD highest over lowest.",
        unit=RATIO,
        rule=BAND_RULE.format(band=ev.RANK_BAND, of="28 over 18", beyond=""),
        null=NOISE,
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("stable_rank",),
        control_arms=(ev.COIN, *ev.MATCHED_ARMS),
        readouts=BOTH,
        shown=Shown("stable_rank", roles=ev.ATTENTION, moment="course"),
        evidence=ev.regimes("stable_rank", ev.RANK_BAND, sft_growth=1.0),
    ),
    Claim(
        id="norm-decoupled",
        paper_item="Figure 4b",
        statement="OPD moves the weights well further than RLVR although both updates "
        "end at comparable stable rank.",
        paper_value="curves only",
        quantity="OPD over RLVR at the end, means over the attention updates: "
        "Frobenius norm, and stable rank.",
        unit=RATIO,
        rule=f"Reproduced when the norms' ratio has a 95 % interval above "
        f"{ev.COMPARABLE_FACTOR:g} and the stable ranks' one within that factor of 1, "
        f"not reproduced when an interval lies outside {HOLM}. Explained when the "
        "stable rank of either is more than half that of noise.",
        null=NOT_NOISE,
        matched="None: the two arms share anchor, learning rate, steps and batch.",
        arms=("opd", "rlvr"),
        metrics=("frobenius_norm", "stable_rank"),
        shown=Shown("frobenius_norm", ("opd", "rlvr"), roles=ev.ATTENTION),
        evidence=ev.norm_decoupled,
        control_arms=(),
        readouts=BOTH,
    ),
    Claim(
        id="hill-mild",
        paper_item="Figure 4c",
        statement="The Hill exponent of OPD's update drifts mildly, while SFT's rises "
        "sharply and RLVR's falls.",
        paper_value="OPD about 2.3 to 2.9",
        quantity="Mean Hill exponent of the attention updates, last checkpoint over "
        "first: SFT, RLVR, SFT over OPD, OPD over RLVR; of OPD highest over lowest.",
        unit=RATIO,
        rule=BAND_RULE.format(
            band=ev.HILL_BAND, of="2.9 over 2.3", beyond=" beyond that factor"
        ),
        null=NOISE,
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("hill_alpha", "stable_rank"),
        control_arms=(ev.COIN, *ev.MATCHED_ARMS),
        readouts=BOTH,
        shown=Shown("hill_alpha", roles=ev.ATTENTION, moment="course"),
        evidence=ev.regimes("hill_alpha", ev.HILL_BAND, sft_growth=ev.HILL_BAND),
    ),
    Claim(
        id="early-lock",
        paper_item="Figure 5",
        statement="At its first checkpoint OPD's update nearly spans its final top "
        "right subspace, while SFT and RLVR approach theirs gradually.",
        paper_value="curves only, on an axis from 0.4 to 1.0",
        quantity="Sim_K of first and last checkpoint, mean over the attention updates: "
        "OPD minus SFT, OPD minus RLVR, and OPD's own.",
        unit="Sim_K",
        rule=f"Reproduced when both differences have a 95 % interval above 0 and OPD's "
        f"own one above {ev.LOCKED:g}, not reproduced when one lies below {HOLM}. "
        "Explained when a null has half of OPD's level or of a difference, or a "
        "matched arm in OPD's place half of the difference from SFT, unless it is "
        "shown to be less.",
        null="Two random subspaces (K/n); the run's own increments, each turned by a "
        "rotation of its own; a walk with the run's own optimizer, rates and step "
        "norms; rlvr-coin, trained on coin flips; the end of another arm, of another "
        "seed, of the stage before, and the top subspace "
        "of W_0 in the place of the early one.",
        matched=MATCHED,
        arms=THREE_ARMS,
        metrics=("similarity_to_end",),
        control_arms=(ev.COIN, *ev.MATCHED_ARMS),
        readouts=BOTH,
        shown=Shown("similarity_to_end", roles=ev.ATTENTION, moment="first"),
        evidence=ev.early_lock,
    ),
    Claim(
        id="sufficient-opd",
        paper_item="Figures 6 and 8",
        statement="Confined, after a fifth of training, to the rank-K right subspace "
        "of its update so far, OPD performs as well as unconfined.",
        paper_value="curves and bars only (rank 16, five benchmarks)",
        quantity="Share that projected OPD keeps of what unprojected OPD gains on "
        "chain after the branch, by projected gradients and by projected updates; and "
        "sampled accuracy over all benchmarks, projected minus unprojected.",
        unit=KEPT,
        rule=f"Reproduced when both shares have a 95 % interval above {ev.KEPT:g} and "
        f"the difference one above -{ev.ACCURACY_MARGIN:g}, not reproduced when one "
        f"lies below {HOLM}. Explained when a random subspace, RLVR or a matched arm, "
        f"confined likewise, keeps {ev.KEPT:g} too and is not shown to keep less than "
        f"OPD. Without power is an arm whose "
        f"gain is not shown to exceed {ev.ACCURACY_MARGIN:g}.",
        null="A random subspace of the same rank (opd-projected-random, "
        "opd-projected-update-random).",
        matched="rlvr, the yardstick, sft-matched, sft-learns and ce-teacher, each "
        "projected onto its own early subspace.",
        arms=("opd", *(f"opd{form}" for form in ev.FORMS)),
        metrics=ev.CHAIN,
        evidence=ev.sufficient_opd,
        control_arms=(
            *(f"opd{form}-random" for form in ev.FORMS),
            *_with_projected("rlvr", *ev.MATCHED_ARMS),
        ),
    ),
    Claim(
        id="degrades-sft",
        paper_item="Figures 6 and 8",
        statement="The same projection, over the matched window, degrades SFT.",
        paper_value="curves and bars only (rank 16, five benchmarks)",
        quantity="Share that projected SFT keeps of what unprojected SFT gains on "
        "chain after the branch, by projected gradients and by projected updates; and "
        "OPD's share minus SFT's.",
        unit=KEPT,
        rule=f"Reproduced when both shares have a 95 % interval below {ev.KEPT:g}, and "
        "the difference one above 0; not reproduced when one lies on the other side "
        f"{HOLM}. Explained when a random subspace degrades SFT too and is not shown "
        f"to cost more, or when a matched arm keeps {ev.KEPT:g}. Without power is an "
        f"arm whose gain is not shown to exceed {ev.ACCURACY_MARGIN:g}.",
        null="A random subspace of the same rank (sft-projected-random).",
        matched="sft-matched, sft-learns and ce-teacher, each projected onto its own "
        "early subspace.",
        arms=("sft", *(f"sft{form}" for form in ev.FORMS), "opd", "opd-projected"),
        metrics=ev.CHAIN,
        evidence=ev.degrades_sft,
        control_arms=("sft-projected-random", *_with_projected(*ev.MATCHED_ARMS)),
    ),
    Claim(
        id="sparse-tokens",
        paper_item="Figures 7a and 9a",
        statement="Learning from only a half or a quarter of the tokens, chosen by gap "
        "or at random, keeps OPD's stable-rank trajectory.",
        paper_value="curves only (kept shares 0.5 and 0.25)",
        quantity="Distance of the stable-rank trajectory from OPD's as a factor, mean "
        "absolute log ratio over checkpoints: top-gap and random, 50 and 25 %.",
        unit=RATIO,
        rule=KEPT_RULE.format(what="all four arms keep it"),
        null=YARDSTICK,
        matched=RLVR_TOO,
        arms=("opd", *ev.TOKEN_ARMS),
        metrics=("stable_rank",),
        control_arms=(ev.COIN, "rlvr", *ev.MATCHED_ARMS),
        readouts=BOTH,
        evidence=ev.kept_trajectories(*ev.TOKEN_ARMS),
    ),
    Claim(
        id="off-policy",
        paper_item="Figures 7b and 9b",
        statement="Rollouts written by the teacher keep OPD's stable-rank trajectory, "
        "at a modestly larger norm.",
        paper_value="curves only",
        quantity="Distance of the stable-rank trajectory from OPD's as a factor, and "
        "the Frobenius norm at the end over OPD's; without an importance ratio, with "
        "that of student and teacher below 2 (the paper's clip of 1.0), and clipped.",
        unit=RATIO,
        rule=KEPT_RULE.format(
            what="in each of the three readings of the ratio it is kept and the norms' "
            f"ratio has a 95 % interval between 1 and {ev.MODEST_FACTOR:g}"
        ),
        null=YARDSTICK,
        matched=RLVR_TOO,
        arms=("opd", "off-policy"),
        metrics=("stable_rank", "frobenius_norm"),
        control_arms=(*ev.RATIO_ARMS[1:], ev.COIN, "rlvr", *ev.MATCHED_ARMS),
        readouts=BOTH,
        evidence=ev.off_policy,
    ),
    Claim(
        id="mixing",
        paper_item="Figures 7c and 9c",
        statement="Mixtures of OPD and RLVR that OPD dominates keep OPD's stable-rank "
        "trajectory; at a small share of OPD they depart from it.",
        paper_value="curves only (alpha = 0.75, 0.5, 0.25, 0.05, 0.01)",
        quantity="Distance of the stable-rank trajectory from OPD's as a factor, at "
        "alpha = 0.75, 0.5, 0.05 and 0.01.",
        unit=RATIO,
        rule=KEPT_RULE.format(
            what="it is kept at alpha = 0.75 and 0.5, and the interval lies above that "
            "factor at 0.05 and 0.01"
        ),
        null=YARDSTICK,
        matched=RLVR_TOO,
        arms=("opd", "mix-0.75", "mix-0.50", "mix-0.05", "mix-0.01"),
        metrics=("stable_rank",),
        control_arms=(ev.COIN, "rlvr", *ev.MATCHED_ARMS),
        readouts=BOTH,
        evidence=ev.mixing,
    ),
)

# Shell patterns of all arms that a rule may ask for, RLVR at the paper's ratio too.
ARMS = tuple(
    dict.fromkeys(
        [arm for claim in CLAIMS for arm in claim.arms + claim.control_arms]
        + ["rlvr-paper"]
    )
)


def claim_of(claim_id: str) -> Claim:
    """The claim of that id.

    Raises:
        ValueError: unknown id; the message lists the known ones.
    """
    for claim in CLAIMS:
        if claim.id == claim_id:
            return claim
    known = ", ".join(claim.id for claim in CLAIMS)
    raise ValueError(f"unknown claim {claim_id!r}; expected {known}")
