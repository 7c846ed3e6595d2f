"""What a loop with Accelerate has: `accelerator`, `model`, `optimizer` and `loader`."""

import torch
from accelerate import Accelerator

from tests.models import VOCABULARY, tiny_llama

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
model = tiny_llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows = torch.randint(0, VOCABULARY, (16, 12))
loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4)
