"""Torch computes on one thread here, as on the ranks of tests: models are tiny, and tests run side by side."""

import torch

torch.set_num_threads(1)
