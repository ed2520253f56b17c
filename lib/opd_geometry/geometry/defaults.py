"""Ranks and thresholds of the diagnostics, for those who read without torch, too."""

ANGLE_DIVISOR = 8  # k = 512 of 4096 in the paper
PRINCIPAL_DIVISOR = 64  # r = 64 of 4096 in the paper
HILL_DIVISOR = 8  # the paper does not state its k
MASK_ALPHA = 0.5
ETA = 1e-3
