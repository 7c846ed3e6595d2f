"""The Hugging Face Trainer: `torchrun --nproc_per_node 2 launch/examples/trainer.py`."""

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

from slsam_ds.integrations.huggingface import SLSAMTrainer

TINY = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, use_cache=False
)


def counting(num_samples: int) -> list[dict[str, list[int]]]:
    """Sequences that count in strides: put your tokenized data here."""
    rows = [((torch.arange(24) * (1 + index % 4) + index) % 64).tolist() for index in range(num_samples)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", help="a folder or a hub id; default: a tiny model made on the spot")
    parser.add_argument("--deepspeed", help="a DeepSpeed JSON, for example ds_configs/zero2.json")
    given = parser.parse_args()
    name = given.model_name_or_path
    args = TrainingArguments(
        output_dir="outputs/trainer",
        deepspeed=given.deepspeed,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=60,
        learning_rate=2e-5 if name else 1e-3,
        logging_steps=10,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=30,
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
    )
    torch.manual_seed(0)
    trainer = SLSAMTrainer(
        model=AutoModelForCausalLM.from_pretrained(name) if name else AutoModelForCausalLM.from_config(TINY),
        args=args,
        slsam={"rho": 0.02, "active_layers": 0.25},
        train_dataset=counting(1024),
        eval_dataset=counting(32),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"loss: {before:.3f} -> {after:.3f}", flush=True)
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
