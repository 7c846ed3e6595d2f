"""TRL's SFTTrainer with LoRA: `torchrun --nproc_per_node 2 launch/examples/trl_sft_lora.py` (`pip install trl`)."""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from slsam_ds.integrations.huggingface import SLSAMMixin

TINY = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, use_cache=False
)


class SLSAMSFTTrainer(SLSAMMixin, SFTTrainer):
    """All that it takes; DPOTrainer, KTOTrainer and RewardTrainer likewise."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    tokens = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .:"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", help="a folder or a hub id; default: a tiny model made on the spot")
    name = parser.parse_args().model_name_or_path
    words = ["red green blue", "one two three", "north south east west"]
    args = SFTConfig(
        output_dir="outputs/trl_sft_lora",
        per_device_train_batch_size=4,
        max_steps=60,
        learning_rate=1e-4 if name else 2e-2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        bf16=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),
    )
    torch.manual_seed(0)
    trainer = SLSAMSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(name) if name else AutoModelForCausalLM.from_config(TINY),
        args=args,
        slsam={"rho": 0.02, "active_layers": 0.5},
        train_dataset=Dataset.from_list([{"text": f"say: {words[index % 3]}"} for index in range(512)]),
        processing_class=AutoTokenizer.from_pretrained(name) if name else tiny_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
