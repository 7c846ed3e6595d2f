"""A vision transformer (ViT, DeiT) learns to classify: `torchrun --nproc_per_node 2 launch/examples/vision.py`.

The blocks take turns; the new head is trained in every step; the patch embeddings are frozen.
"""

import argparse

import torch
from transformers import AutoModelForImageClassification, TrainingArguments, ViTConfig

from slsam_ds.integrations.huggingface import SLSAMTrainer
from slsam_ds.records.files import read_steps

TINY = ViTConfig(
    image_size=32, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4
)


def tinted(num_samples: int, size: int) -> list[dict[str, torch.Tensor | int]]:
    """Which colour has the noise? Put your pixels here, as the model's image processor makes them."""
    samples = []
    for index in range(num_samples):
        pixels = torch.randn(3, size, size, generator=torch.Generator().manual_seed(index))
        pixels[index % 3] += 1.0
        samples.append({"pixel_values": pixels, "labels": index % 3})
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", help="a folder or a hub id; default: a tiny model made on the spot")
    parser.add_argument("--preset", help="settings under one name, like paper_vision: see python -m slsam_ds.recipes")
    given = parser.parse_args()
    name = given.model_name_or_path
    torch.manual_seed(0)
    if name:
        model = AutoModelForImageClassification.from_pretrained(name, num_labels=3, ignore_mismatched_sizes=True)
    else:
        TINY.num_labels = 3
        model = AutoModelForImageClassification.from_config(TINY)
    if not given.preset:
        model.base_model.embeddings.requires_grad_(False)
    own = {"rho": 0.02, "active_layers": 2, "other_parameters": "always"}
    size = model.config.image_size
    args = TrainingArguments(
        output_dir="outputs/vision",
        per_device_train_batch_size=16,
        max_steps=60,
        learning_rate=5e-5 if name else 1e-3,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = SLSAMTrainer(
        model=model,
        args=args,
        slsam={"preset": given.preset} if given.preset else own,
        train_dataset=tinted(1024, size),
        eval_dataset=tinted(64, size),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"loss: {before:.3f} -> {after:.3f}", flush=True)
        numels, steps = trainer.slsam.layers.numels, read_steps(args.output_dir)
        shares = [sum(numels[arm] for arm in step["active"]) / sum(numels) for step in steps]
        print(f"weights active in backward: {sum(shares) / len(shares):.0%} of those in layers", flush=True)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
