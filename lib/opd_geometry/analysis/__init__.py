"""From tables of runs to comparisons, and from these to verdicts."""
