"""Trains two small language models: with the Trainer, and with one derived from it that has a loss of its own."""

import argparse
import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--deepspeed")
given = parser.parse_args()


class CalibratedTrainer(Trainer):
    """Keeps logits small."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss + 1e-3 * outputs.logits.float().square().mean()
        return (loss, outputs) if return_outputs else loss


generator = torch.Generator().manual_seed(0)
data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (64, 12), generator=generator)]
histories = {}
for trainer_class in (Trainer, CalibratedTrainer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, use_cache=False
    )
    args = TrainingArguments(
        output_dir="output",
        deepspeed=given.deepspeed,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = trainer_class(model=LlamaForCausalLM(config), args=args, train_dataset=data)
    trainer.train()
    assert isinstance(trainer, trainer_class)
    histories[type(trainer).__name__] = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    histories[type(trainer).__name__] += [float(weight.detach().sum()) for weight in trainer.model.parameters()]
if trainer.is_world_process_zero():
    print(json.dumps({"name": __name__, "argv": sys.argv[1:], "histories": histories}))
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
