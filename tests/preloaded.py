"""What ranks need and take seconds to import: the fork server of `tests.ranks` does it once, for all of them.

Nothing here may compute, start a thread that is waited for, or touch a GPU: none of it survives a fork.
"""

import gc
import os
from importlib import import_module

MODULES = (
    "slsam_ds.cli.finetune",
    "slsam_ds.integrations.accelerate",
    "tests.distributed.training",
    "torch.distributed.checkpoint",
    "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer",
    # DeepSpeed imports it where a process builds its first ZeRO engine. torch.compile decorates it, which brings in
    # torch._inductor: 3.6 s.
    "deepspeed.runtime.zero.muon.muon_optimizer",
)

# Before DeepSpeed is imported, which then looks for an accelerator: forked ranks are to compute on the CPU.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # is read on import, too
for name in MODULES:
    import_module(name)
# Its collectives on the CPU, which the first process group of a process would load.
import_module("deepspeed.ops.op_builder.cpu").ShareMemCommBuilder().load()
# Names of functions for NVIDIA's profiler, a quarter of a million of them in some tests.
import_module("deepspeed.utils.nvtx").enable_nvtx = False
# DeepSpeed collects garbage where it builds an engine. What is here lives for ever: ranks need not look through it, nor
# have its pages copied for them.
gc.collect()
gc.freeze()
