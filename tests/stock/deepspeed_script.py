"""Trains a small language model with DeepSpeed, the way its documentation shows."""

import argparse

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def add_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small language model")
    parser.add_argument("--local_rank", type=int, default=-1, help="local rank passed from the launcher")
    parser.add_argument("--epochs", type=int, default=3)
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def make_data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 64, (64, 1), generator=generator)
    tokens = (starts + torch.arange(12)) % 64
    return [{"input_ids": row, "labels": row} for row in tokens]


args = add_arguments()
deepspeed.init_distributed()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    use_cache=False,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

data = make_data()
engine, _, loader, _ = deepspeed.initialize(args=args, model=model, optimizer=optimizer, training_data=data)

losses = []
for epoch in range(args.epochs):
    for batch in loader:
        batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    if engine.global_rank == 0:
        print(f"epoch {epoch}: loss {losses[-1]:.3f}", flush=True)

engine.save_checkpoint("checkpoints")
if engine.global_rank == 0:
    print(f"steps {engine.global_steps}, loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
torch.distributed.destroy_process_group()
