"""`train.py`: a Trainer that evaluates, in a script that takes `--output_dir`."""

from pathlib import Path

SCRIPT = """\
import argparse

import torch
from transformers import Trainer, TrainingArguments

from tests.models import tiny_llama

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
folder = parser.parse_args().output_dir
data = [{"input_ids": row, "labels": row} for row in torch.arange(12).repeat(4, 1)]
args = TrainingArguments(folder, max_steps=2, save_strategy="no", report_to="none", use_cpu=True)
trainer = Trainer(model=tiny_llama(), args=args, train_dataset=data, eval_dataset=data)
trainer.train()
trainer.evaluate()
"""

Path("train.py").write_text(SCRIPT, encoding="utf-8")
