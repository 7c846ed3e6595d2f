"""Fine-tunes a small language model with the Hugging Face Trainer, the way its documentation shows."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

generator = torch.Generator().manual_seed(0)
starts = torch.randint(0, 64, (64, 1), generator=generator)
data = [{"input_ids": row, "labels": row} for row in (starts + torch.arange(12)) % 64]

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_cache=False,
    )
)
args = TrainingArguments(
    output_dir="output",
    deepspeed=sys.argv[-1],
    num_train_epochs=3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=5e-3,
    logging_steps=1,
    report_to="none",
    use_cpu=not torch.accelerator.is_available(),
)
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
trainer.save_model()
torch.distributed.destroy_process_group()
