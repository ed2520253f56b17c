"""What changed between two checkpoints, a matrix at a time; knows no training."""
