"""Training and diagnostic utilities for the geometry of on-policy distillation."""

__version__ = "0.1.0"
