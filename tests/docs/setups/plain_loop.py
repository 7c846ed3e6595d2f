"""What a loop of one's own has: `model`, `optimizer`, and a `window` of micro-batches."""

import torch

import slsam_ds  # noqa: F401
from tests.models import VOCABULARY, tiny_llama

model = tiny_llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows = torch.randint(0, VOCABULARY, (2, 4, 12))
window = [{"input_ids": row, "labels": row} for row in rows]
