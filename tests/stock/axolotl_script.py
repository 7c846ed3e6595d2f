"""Trains as axolotl does: the plugin by its name, then a trainer that knows nothing of it. axolotl is a stand-in."""

import importlib
import sys
from types import ModuleType

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
    sys.modules[name] = ModuleType(name)
sys.modules["axolotl.integrations.base"].BasePlugin = object
cfg = {"plugins": ["slsam_ds.integrations.axolotl.SLSAMPlugin"], "slsam": {"rho": 0.02, "active_layers": 2}}


class OffloadingMixin(Trainer):
    """As axolotl's mixins: each is a trainer, and one wraps the step."""

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


class AxolotlTrainer(OffloadingMixin, Trainer):
    """What axolotl trains with."""


module, _, name = cfg["plugins"][0].rpartition(".")
plugin = getattr(importlib.import_module(module), name)()
plugin.register(cfg)
plugin.pre_model_load(cfg)

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
args = TrainingArguments(output_dir="output", max_steps=3, save_strategy="no", report_to="none", use_cpu=True)
data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (32, 12))]
AxolotlTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=data).train()
