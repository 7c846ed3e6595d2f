"""A training loop with Accelerate as a user writes it; started by `accelerate launch`, see test_accelerate.py.

Follows forced samples, goes back to a checkpoint half-way, and follows the rest again.
"""

import sys
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import slsam_ds
from slsam_ds.integrations.accelerate import prepare
from tests.distributed.training import ADAMW, whole
from tests.models import SAMPLES, micro_batch, tiny_llama

ACCUMULATION = 2
NUM_RANKS = 2
CLIP = 0.5
HALF = 5


def rows() -> list[dict[str, torch.Tensor]]:
    """In such an order that Accelerate deals every rank the micro-batches that the reference expects."""
    batches = [
        micro_batch(step, rank, index)
        for step in range(1, len(SAMPLES) + 1)
        for index in range(ACCUMULATION)
        for rank in range(NUM_RANKS)
    ]
    return [{name: tokens[row] for name, tokens in batch.items()} for batch in batches for row in range(2)]


def main(output_dir: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    with_deepspeed = accelerator.state.deepspeed_plugin is not None
    # Where weights are whole, ranks may start from others: those of the first count, as in plain data parallelism.
    replicated = not (accelerator.is_fsdp2 or (with_deepspeed and accelerator.state.deepspeed_plugin.zero_stage == 3))
    model = tiny_llama(seed=accelerator.process_index if replicated else 0)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    loader = DataLoader(rows(), batch_size=2)
    slsam, model, optimizer, loader, scheduler = prepare(
        accelerator,
        model,
        optimizer,
        loader,
        scheduler,
        slsam=None if with_deepspeed else {"rho": 0.02},
        max_grad_norm=None if with_deepspeed else CLIP,
    )
    windows = list(slsam_ds.windows(loader, ACCUMULATION))

    def follow(first: int, samples: Sequence[Sequence[int]]) -> list[float]:
        losses = []
        for window, sample in zip(windows[first:], samples, strict=False):
            losses.append(slsam.step(window, active=sample).ascent_loss)
            scheduler.step()
        return losses

    def weights() -> dict[str, torch.Tensor]:
        named = accelerator.unwrap_model(model).named_parameters()
        return {name: whole(parameter).clone() for name, parameter in named}

    losses = follow(0, SAMPLES[:HALF])
    accelerator.save_state(f"{output_dir}/checkpoint")
    losses += follow(HALF, SAMPLES[HALF:])
    trained = weights()
    accelerator.load_state(f"{output_dir}/checkpoint")
    assert slsam.num_steps == HALF
    follow(HALF, SAMPLES[HALF:])
    if accelerator.is_main_process:
        torch.save({"losses": losses, "trained": trained, "again": weights()}, f"{output_dir}/result.pt")
    elif type(slsam.engine).__name__ in ("FSDP2Engine", "ZeroStage3Engine"):
        weights()  # gathered by all
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
