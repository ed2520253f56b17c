"""Training and diagnostic utilities for the geometry of on-policy distillation."""

import warnings

__version__ = "0.1.0"

# tqdm asks for ipywidgets in every notebook; a book has no use for them.
warnings.filterwarnings("ignore", message="IProgress not found")
