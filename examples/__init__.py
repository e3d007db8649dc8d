"""Runnable examples."""

import os

# At import transformers names what image processing would gain from torchvision, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
