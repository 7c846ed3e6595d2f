"""What a loop that writes records has: `slsam`, its `loader`, and a `folder`."""

import torch

import slsam_ds
from tests.models import VOCABULARY, tiny_llama

folder = "run"
model = tiny_llama()
slsam = slsam_ds.SLSAM(model, torch.optim.AdamW(model.parameters(), lr=1e-3), slsam_ds.SLSAMConfig())
rows = torch.randint(0, VOCABULARY, (8, 2, 12))
loader = [{"input_ids": row, "labels": row} for row in rows]
