"""`checkpoint`, of a loop without SL-SAM over `groups`; and what goes on from it: `model`, and a `config` for it."""

import torch

import slsam_ds
from slsam_ds import SLSAM  # noqa: F401
from tests.models import VOCABULARY, tiny_llama

model = tiny_llama()
groups = [
    {"params": [parameter for parameter in model.parameters() if parameter.ndim > 1], "weight_decay": 0.1},
    {"params": [parameter for parameter in model.parameters() if parameter.ndim == 1], "weight_decay": 0.0},
]
stock = torch.optim.AdamW(groups, lr=1e-4)
stock_scheduler = torch.optim.lr_scheduler.LambdaLR(stock, [lambda step: 1 / (1 + step)] * 2)
rows = torch.randint(0, VOCABULARY, (4, 12))
model(input_ids=rows, labels=rows).loss.backward()
stock.step()
stock_scheduler.step()
checkpoint = {"optimizer": stock.state_dict(), "scheduler": stock_scheduler.state_dict()}
groups = [dict(group) for group in groups]
config = slsam_ds.SLSAMConfig(active_layers=2)
