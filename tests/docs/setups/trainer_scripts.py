"""`train.py` and the module `package.module`: a Trainer in a script that takes any arguments."""

from pathlib import Path

SCRIPT = """\
import torch
from transformers import Trainer, TrainingArguments

from tests.models import tiny_llama

data = [{"input_ids": row, "labels": row} for row in torch.arange(12).repeat(4, 1)]
args = TrainingArguments("output", max_steps=2, save_strategy="no", report_to="none", use_cpu=True)
Trainer(model=tiny_llama(), args=args, train_dataset=data).train()
"""

Path("package").mkdir()
for path in ("train.py", "package/module.py"):
    Path(path).write_text(SCRIPT, encoding="utf-8")
