"""The step hands its work to the device without waiting for it, but once."""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slsam_ds.slsam
import slsam_ds.step
from slsam_ds import SLSAM, SLSAMConfig
from tests.models import tiny_llama, window

# What makes an accelerator's host wait: one number of a tensor, or a shape that depends on numbers.
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class HostReads(TorchDispatchMode):
    """Counts how often Python asks what a tensor holds, but for what the model asks."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._in_model = False

    def loss(self, model: Any, batch: Any, factor: float = 1.0) -> Tensor:
        self._in_model = True
        loss: Tensor = model(**batch).loss * factor
        self._in_model = False
        return loss

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator in WAITS and not self._in_model
        return operator(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """`tolist` passes the dispatcher by."""
        tolist = Tensor.tolist

        def counting(tensor: Tensor) -> Any:
            self.count += 1
            return tolist(tensor)

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(Tensor, "tolist", counting)
            yield


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> HostReads:
    """Of the two-pass steps: a single rank's bandit computes on the host anyway."""
    counter, take_step = HostReads(), slsam_ds.slsam.take_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        with counter.counted():
            return take_step(*args, **kwargs)

    monkeypatch.setattr(slsam_ds.slsam, "take_step", counted)
    return counter


def trained(**settings: Any) -> SLSAM:
    model: nn.Module = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)  # AdamW reads its step counters, which are on the host
    return SLSAM(model, optimizer, SLSAMConfig(active_layers=2, **settings), max_grad_norm=1.0, total_steps=8)


@pytest.mark.parametrize(
    "settings",
    [
        {"rho": 0.0},
        {},
        {"ascent_scope": "rank"},
        {"ascent_scope": "micro_batch"},
        {"ascent_fraction": 0.5},
        {"ascent_source": "previous"},
        {"descend_along": "renormalised"},
        {"ascend_when": {"every": 2}},
        {"mask": "fisher", "mask_every": 2},
        {"mask": "dynamic", "mask_every": 2},
    ],
    ids=str,
)
def test_the_host_waits_once_per_step(settings: dict[str, Any], reads: HostReads) -> None:
    slsam = trained(**settings)
    slsam.step(window(0, 0, 1), active=[1, 3])  # the first pass of all looks which buffers it changes
    reads.count = 0
    for step in (1, 2, 3):
        slsam.step(window(step, 0, 3), reads.loss, active=[1, 3])
        assert reads.count == step


def test_a_bad_step_waits_no_more_often(reads: HostReads) -> None:
    slsam = trained()
    slsam.step(window(0, 0, 1), active=[1, 3])
    reads.count = 0
    assert slsam.step(window(1, 0, 2), partial(reads.loss, factor=torch.nan), active=[1, 3]).skipped
    assert reads.count == 1


def test_the_example_in_the_docstring() -> None:
    assert slsam_ds.step.__doc__ is not None
    (example,) = re.findall(r"```python\n(.*?)```", slsam_ds.step.__doc__, re.DOTALL)
    variables: dict[str, Any] = {"torch": torch}
    exec(example, variables)
    assert variables["x"].tolist() == pytest.approx([2.67, 3.56])
    weights = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    model = nn.Sequential(*(nn.Linear(2, 1, bias=False) for _ in range(2)))  # blocks, of which the first is trained
    model[0].weight = weights
    slsam = SLSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), SLSAMConfig(rho=0.5, update_scale="none"))
    slsam.step([None], loss_fn=lambda model, _: (model[0].weight ** 2).sum() / 2, active=[0])
    assert weights[0].tolist() == pytest.approx([2.67, 3.56])


@pytest.mark.parametrize("settings", [{}, {"ascent_scope": "rank"}, {"descend_along": "renormalised"}], ids=str)
def test_a_climbing_part_without_a_label_is_not_climbed_on(settings: dict[str, Any]) -> None:
    """Its mean loss is no number; that of all samples is one."""
    (batch,) = window(1, 0, 1)
    labels = batch["labels"].clone()
    labels[0] = -100
    slsam = trained(ascent_fraction=0.5, **settings)
    plain = trained(rho=0.0)
    result = slsam.step([{**batch, "labels": labels}], active=[1, 3])
    expected = plain.step([{**batch, "labels": labels}], active=[1, 3])
    assert not result.skipped
    assert result.ascent_loss is None
    assert result.loss == pytest.approx(expected.loss)
    assert result.perturbation_norm == 0
    assert all(map(torch.equal, slsam.model.parameters(), plain.model.parameters()))
    assert slsam.step([{**batch, "labels": torch.full_like(labels, -100)}], active=[1, 3]).skipped
