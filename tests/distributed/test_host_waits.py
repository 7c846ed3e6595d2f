"""What a step of each engine would do beside an accelerator: the host waits for it once, for the step's numbers, and no
collective is given a tensor that lies on the host.

On the host are step counters and what was made of Python's numbers, until `Tensor.to` with a device moves it.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import slsam_ds.slsam
from tests.distributed.training import Setup, Training, slow
from tests.ranks import run_on_ranks

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
TO = Tensor.to
SAMPLE = [3, 8, 12, 20, 25, 30, 32]


class Reads(TorchDispatchMode):
    """Counts what Python reads of tensors, but for what the model reads, and what lies on the host.

    Args:
        on_host: Tensors that do.
    """

    def __init__(self, on_host: list[Tensor]) -> None:
        super().__init__()
        self._on_host: Any = WeakIdKeyDictionary(dict.fromkeys(on_host, True))
        self.counts: Counter[str] = Counter()
        self.in_model = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        is_host = operator is torch.ops.aten.lift_fresh.default or (given and all(map(self._is_on_host, given)))
        if operator in WAITS and not is_host and not self.in_model:
            self.counts[str(operator)] += 1
        if operator.namespace == "c10d" and any(map(self._is_on_host, given)):
            self.counts["collectives of what lies on the host"] += 1
        for each in tree_leaves(made) if is_host and operator.namespace != "c10d" else ():
            if isinstance(each, Tensor):
                self._on_host[each] = True
        return made

    def _is_on_host(self, tensor: Tensor) -> bool:
        return tensor in self._on_host

    def moved(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to`, but that it moves."""
        made = TO(tensor, *args, **kwargs)
        if any(isinstance(each, torch.device) for each in (*args, *kwargs.values())):
            made = made.clone() if made is tensor else made
            self._on_host.pop(made, None)
        return made

    def of_model(self, function: Any) -> Any:
        def quietly(*args: Any, **kwargs: Any) -> Any:
            self.in_model = True
            try:
                return function(*args, **kwargs)
            finally:
                self.in_model = False

        return quietly


def count_reads(setup: Setup) -> dict[str, int]:
    """In the third step."""
    training = Training(setup)
    for step in (1, 2):
        training.step(training.window(step), active=SAMPLE)
    engine, take_step, tolist = training.slsam.engine, slsam_ds.slsam.take_step, Tensor.tolist
    counters = [state["step"] for state in engine.optimizer.state.values() if isinstance(state.get("step"), Tensor)]
    reads = Reads(counters)

    def counted(tensor: Tensor) -> Any:  # it passes the dispatcher by
        reads.counts["numbers of the step" if tensor.is_floating_point() else "other hosts' answers"] += 1
        return tolist(tensor)

    def watched(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch, reads:
            patch.setattr(Tensor, "tolist", counted)
            patch.setattr(Tensor, "to", lambda tensor, *args, **kwargs: reads.moved(tensor, *args, **kwargs))
            return take_step(*args, **kwargs)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = reads.of_model(model)(**batch).loss
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "backward", reads.of_model(engine.backward))
        patch.setattr(slsam_ds.slsam, "take_step", watched)
        assert not training.step(training.window(3), loss_fn, active=SAMPLE).skipped
    return dict(reads.counts)


@pytest.mark.parametrize("clip", [slow(0.0), 1.0])
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("local", torch.float32),
        ("fsdp2", torch.float32),
        slow("zero0", torch.float32),
        ("zero0", torch.bfloat16),
        slow("zero1", torch.float32),
        ("zero2", torch.bfloat16),
        slow("zero2", torch.float32),
        slow("zero2", torch.float16),
        ("zero3", torch.bfloat16),
        slow("zero3", torch.float16),
    ],
)
def test_the_host_waits_for_the_numbers_of_the_step_alone(engine: str, dtype: torch.dtype, clip: float) -> None:
    """And, on a stream aside, for what other hosts say: that all take the same step, and which blocks they skip."""
    setup = Setup(engine=engine, dtype=dtype, clip=clip, model={"num_blocks": 32}, slsam={"active_layers": 7})
    answers = 2 if engine in ("fsdp2", "zero3") else 1
    assert run_on_ranks(2, count_reads, setup) == [{"numbers of the step": 1, "other hosts' answers": answers}] * 2
