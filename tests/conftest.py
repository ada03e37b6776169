"""Puts the repository root on the path, so that `pytest` finds what `python -m pytest` finds."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
