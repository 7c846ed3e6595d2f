"""What travels between ranks: bytes through torch.distributed, counted below every library."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, counts this rank's payload bytes of every collective, by kind.

    It sees the c10d operators, which the functions of torch.distributed, DeepSpeed and FSDP all end in.

    Attributes:
        bytes: "reduce" counts what goes into all-reduce, reduce and reduce-scatter; "gather" what comes out of
            all-gather and broadcast.
        calls: Number of collectives by operator name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.calls[name] += 1
            if "reduce" in name:
                self.bytes["reduce"] += _num_bytes(args[1] if "scatter" in name else args[0])
            elif "gather" in name or "broadcast" in name:
                self.bytes["gather"] += _num_bytes(args[0])
        return func(*args, **(kwargs or {}))


def _num_bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_num_bytes, tensors)) if isinstance(tensors, (list, tuple)) else 0
