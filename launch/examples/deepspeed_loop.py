"""A DeepSpeed loop of your own: `deepspeed launch/examples/deepspeed_loop.py` (no GPU: `--num_accelerators 2`)."""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import slsam_ds

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2},
    "slsam": {"rho": 0.02, "active_layers": 0.25},
}
TINY = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, use_cache=False
)


def counting(num_samples: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count in strides: put your tokenized data here."""
    rows = [(torch.arange(24) * (1 + index % 4) + index) % 64 for index in range(num_samples)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", help="a folder or a hub id; default: a tiny model made on the spot")
    parser.add_argument("--local_rank", help="the launcher's")
    name = parser.parse_args().model_name_or_path
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(name) if name else AutoModelForCausalLM.from_config(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5 if name else 1e-3)
    engine, _, loader, _ = slsam_ds.initialize(
        model=model, optimizer=optimizer, config=CONFIG, training_data=counting(1024)
    )
    losses = []
    for window in slsam_ds.windows(loader, engine.gradient_accumulation_steps()):
        out = engine.train_step(window)
        losses.append(out.ascent_loss)
        if out.step % 10 == 0 and engine.global_rank == 0:
            print(f"step {out.step}: loss {out.ascent_loss:.3f}, layers {out.active}", flush=True)
    if engine.global_rank == 0:
        print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
    engine.save_checkpoint("outputs/deepspeed_loop")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
