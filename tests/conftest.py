"""Tests import the modules from the folder above, wherever pytest was started."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # tiny models: threads that wait for each other cost more than they bring
