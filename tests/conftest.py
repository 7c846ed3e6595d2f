"""Torch computes on one thread here, as on the ranks of tests: models are tiny, and tests run side by side."""

import os

import torch

from tests.ranks import DEVICE

torch.set_num_threads(1)
# Before DeepSpeed is imported, which then looks for an accelerator, here and in what is started from here.
os.environ.setdefault("DS_ACCELERATOR", DEVICE)
