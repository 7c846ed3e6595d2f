"""Models that compute in bfloat16 with float32 weights: FSDP2 on a single rank."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from slsam_ds.layers import find_layers


def in_bfloat16(model: nn.Module) -> None:
    """Let it compute in bfloat16; its weights stay float32, and SL-SAM knows that they are rounded on their way."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    stack = find_layers(model).stack
    assert stack is not None
    for block in stack.children():
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def load_weights_of(sharded: nn.Module, plain: nn.Module) -> nn.Module:
    """The weights of one in a model that was built as it was, in float32."""
    plain.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
    return plain
