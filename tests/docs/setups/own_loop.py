"""What a plain loop has: a `model` that returns logits, an `optimizer`, a `loader` and a `loss_fn`."""

import torch
from torch import nn

blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
model = nn.Sequential(*blocks, nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = [(torch.randn(4, 8), torch.randint(0, 2, (4,))) for _ in range(3)]


def loss_fn(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)
