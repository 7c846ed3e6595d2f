"""What a plain loop has: a `model` that returns logits, an `optimizer`, a `loader` and a `loss_fn`."""

import torch
from torch import nn


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, inputs):
        for block in self.blocks:
            inputs = inputs + block(inputs).relu()
        return self.head(inputs)


model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = [(torch.randn(4, 8), torch.randint(0, 2, (4,))) for _ in range(3)]


def loss_fn(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)
