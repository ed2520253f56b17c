"""Ranks, thresholds and roles, for those who read tables without torch, too."""

ANGLE_DIVISOR = 8  # k = 512 of 4096 in the paper
PRINCIPAL_DIVISOR = 64  # r = 64 of 4096 in the paper
HILL_DIVISOR = 8  # the paper does not state its k
MASK_ALPHA = 0.5
ETA = 1e-3

ATTENTION_ROLES = ("q", "k", "v", "o")
LAYER_ROLES = (*ATTENTION_ROLES, "gate", "up", "down")
EXPERT_ROLES = ("expert_gate", "expert_up", "expert_down", "expert_other")
