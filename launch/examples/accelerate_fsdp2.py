"""A loop of your own with Accelerate and FSDP2: `torchrun --nproc_per_node 2 launch/examples/accelerate_fsdp2.py`.

With the plugin taken out, `accelerate launch` decides: DeepSpeed, FSDP2, or whole weights on every rank.
"""

import argparse

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, get_linear_schedule_with_warmup

import slsam_ds
from slsam_ds.integrations.accelerate import prepare

TINY = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, use_cache=False
)
STEPS = 60


def counting(num_samples: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count in strides: put your tokenized data here."""
    rows = [(torch.arange(24) * (1 + index % 4) + index) % 64 for index in range(num_samples)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", help="a folder or a hub id; default: a tiny model made on the spot")
    name = parser.parse_args().model_name_or_path
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(
        fsdp_plugin=plugin, gradient_accumulation_steps=2, cpu=not torch.accelerator.is_available()
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(name) if name else AutoModelForCausalLM.from_config(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5 if name else 1e-3)
    # Accelerate moves a scheduler on once for every rank.
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, STEPS * accelerator.num_processes)
    loader = DataLoader(counting(STEPS * accelerator.num_processes * 8), batch_size=4, shuffle=True)
    knobs = {"rho": 0.02, "active_layers": 0.25}
    slsam, model, optimizer, loader, scheduler = prepare(
        accelerator, model, optimizer, loader, scheduler, slsam=knobs, max_grad_norm=1.0
    )
    losses = []
    for window in slsam_ds.windows(loader, accelerator.gradient_accumulation_steps):
        out = slsam.step(window)
        scheduler.step()
        losses.append(out.ascent_loss)
    accelerator.print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
    accelerator.save_state("outputs/accelerate_fsdp2")  # SL-SAM's state included
    accelerator.end_training()


if __name__ == "__main__":
    main()
