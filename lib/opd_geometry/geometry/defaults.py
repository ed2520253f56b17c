"""Ranks, thresholds and roles, for those who read tables without torch, too."""

ANGLE_DIVISOR = 8  # k = 512 of 4096 in the paper
PRINCIPAL_DIVISOR = 64  # r = 64 of 4096 in the paper
HILL_DIVISOR = 8  # the paper does not state its k
MASK_ALPHA = 0.5
ETA = 1e-3
PRINTED_ALPHA = 0.3  # share of the masks that the paper's printed overlaps are of
PRINTED_DENSITIES = (0.9273, 0.4628, 0.2776)  # of SFT, OPD and RLVR, Figure 3

ATTENTION_ROLES = ("q", "k", "v", "o")
LAYER_ROLES = (*ATTENTION_ROLES, "gate", "up", "down")
EXPERT_ROLES = ("expert_gate", "expert_up", "expert_down", "expert_other")
# Of a sample: a matrix's stratum, how many that holds, how many of them are drawn.
STRATA = ("stratum", "stratum_size", "stratum_drawn")
# Names of diagnostics that both tensors and finished tables have.
ANGLES = (
    "angle_left_mean_deg",
    "angle_left_max_deg",
    "angle_right_mean_deg",
    "angle_right_max_deg",
)
# Where the squared update lies; its null is chance.
ENERGY = (
    "energy_top_left",
    "energy_top_right",
    "energy_bottom_left",
    "energy_bottom_right",
    "energy_principal",
    "energy_low_magnitude",
)
