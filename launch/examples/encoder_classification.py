"""A BERT or RoBERTa learns to classify: `torchrun --nproc_per_node 2 launch/examples/encoder_classification.py`.

The blocks take turns; the new head is trained in every step; the embeddings are frozen, so that steps stay cheap.
"""

import argparse

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, TrainingArguments

from slsam_ds.integrations.huggingface import SLSAMTrainer
from slsam_ds.records.files import read_steps

TINY = BertConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_labels=2
)


def directions(num_samples: int) -> list[dict[str, torch.Tensor | int]]:
    """Does it count up or down? Put your tokenized texts here."""
    rows = [(torch.arange(16) * (1 if index % 2 else -1) + 7 * index) % 60 + 4 for index in range(num_samples)]
    return [{"input_ids": row, "labels": index % 2} for index, row in enumerate(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", help="a folder or a hub id; default: a tiny model made on the spot")
    parser.add_argument("--preset", help="settings under one name, like paper_encoder: see python -m slsam_ds.recipes")
    given = parser.parse_args()
    name = given.model_name_or_path
    torch.manual_seed(0)
    if name:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    else:
        model = AutoModelForSequenceClassification.from_config(TINY)
    if not given.preset:
        model.base_model.embeddings.requires_grad_(False)
    own = {"rho": 0.02, "active_layers": 2, "other_parameters": "always"}
    args = TrainingArguments(
        output_dir="outputs/encoder_classification",
        per_device_train_batch_size=16,
        max_steps=60,
        learning_rate=2e-5 if name else 1e-3,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = SLSAMTrainer(
        model=model,
        args=args,
        slsam={"preset": given.preset} if given.preset else own,
        train_dataset=directions(2048),
        eval_dataset=directions(64),
        compute_metrics=lambda seen: {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"accuracy: {before['eval_accuracy']:.2f} -> {after['eval_accuracy']:.2f}", flush=True)
        print(f"loss: {before['eval_loss']:.3f} -> {after['eval_loss']:.3f}", flush=True)
        numels, steps = trainer.slsam.layers.numels, read_steps(args.output_dir)
        shares = [sum(numels[arm] for arm in step["active"]) / sum(numels) for step in steps]
        print(f"weights active in backward: {sum(shares) / len(shares):.0%} of those in layers", flush=True)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
