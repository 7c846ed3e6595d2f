"""A new run with `optimizer` and `scheduler`, taken over by SL-SAM; `path`, where its state goes."""

import torch

import slsam_ds

optimizer = torch.optim.AdamW(groups, lr=1e-4)  # noqa: F821
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1 / (1 + step)] * 2)
slsam = slsam_ds.SLSAM(model, optimizer, config, lr_scheduler=scheduler)  # noqa: F821
path = "stock.pt"
