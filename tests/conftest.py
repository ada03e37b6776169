"""Puts the repository root on the path, so that `pytest` finds what `python -m pytest` finds."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder is refused at once, network or not
