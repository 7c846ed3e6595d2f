"""Optimizer state and master weights that wait on the host until a step needs them: `offload_state`.

All that moves state from one device to another is here, so that a test without an accelerator can make it real.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

OWN_PREFIX = "slsam_"
"""Of what SL-SAM keeps in the optimizer's state, which no optimizer reads."""


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; itself where it is there.

    What leaves an accelerator goes into pinned memory: copies from and to it are several times faster.
    """
    if tensor.device.type not in ("cpu", "meta") and device.type == "cpu":
        return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def at_home(tensor: Tensor, home: torch.device | None) -> Tensor:
    """The tensor where state waits. `home` None: it stays where it is."""
    return tensor if home is None else place(tensor, home)


def by_group(
    optimizer: torch.optim.Optimizer, step: Callable[..., Any], *, home: torch.device | None
) -> Callable[..., None]:
    """What calls `step` for one parameter group after the other, whose state is on the parameters' device meanwhile.

    So that device has room for the state of one group, and not of all that a step updates. The tensors at home stay the
    same ones: others may hold on to them, and host memory that was never touched before is slow to write.

    Args:
        optimizer: The torch optimizer.
        step: Its `step`, or what stands in its place.
        home: Where state waits; None: it stays where it is, and `step` is called once.
    """
    if home is None:
        return step

    @functools.wraps(step)
    def step_by_group(*args: Any, **kwargs: Any) -> None:
        whole = list(optimizer.param_groups)
        try:
            for group in whole:
                stepped = [each for each in group["params"] if each.grad is not None]
                if stepped:
                    optimizer.param_groups[:] = [group]
                    with _fetched(optimizer, stepped, home):
                        step(*args, **kwargs)
        finally:
            optimizer.param_groups[:] = whole

    return step_by_group


@contextlib.contextmanager
def _fetched(optimizer: torch.optim.Optimizer, stepped: Collection[Tensor], home: torch.device) -> Iterator[None]:
    """Within, the state of these parameters is where they are; that of new ones goes home, too."""
    left: dict[tuple[Tensor, str], Tensor] = {}
    for parameter in stepped:
        state = optimizer.state.get(parameter, {})
        for name, value in _large(state):
            if not name.startswith(OWN_PREFIX):
                left[parameter, name] = value
                state[name] = place(value, parameter.device)
    try:
        yield
    finally:
        for parameter in stepped:
            state = optimizer.state.get(parameter, {})
            for name, value in _large(state):
                waiting = left.get((parameter, name))
                if waiting is None or waiting is value or (waiting.shape, waiting.dtype) != (value.shape, value.dtype):
                    state[name] = place(value, home)
                else:
                    state[name] = waiting.copy_(value)


class WaitingMasters:
    """Master weights beside the weights that forward reads; their data waits where it is out of the way.

    The tensors at home stay the same ones, as state does.

    Args:
        masters: What an optimizer steps that is not itself read by forward. Their data goes home at once.
        home: Where it waits.
    """

    def __init__(self, masters: Collection[Tensor], home: torch.device) -> None:
        self._device = {master: master.device for master in masters}
        self._waiting = {master: place(master.detach(), home) for master in masters}
        for master, waiting in self._waiting.items():
            master.data = waiting

    @contextlib.contextmanager
    def fetched(self, stepped: Collection[Tensor]) -> Iterator[None]:
        """Within, the data of these is where the optimizer steps it; those that are no masters are left alone."""
        moved = [each for each in stepped if each in self._waiting]
        for master in moved:
            master.data = place(self._waiting[master], self._device[master])
        try:
            yield
        finally:
            for master in moved:
                if master.data.data_ptr() != self._waiting[master].data_ptr():
                    master.data = self._waiting[master].copy_(master.data)


def send_home(optimizer: torch.optim.Optimizer, home: torch.device | None) -> None:
    """Bring all state to where it waits: what a checkpoint has brought, for example.

    Args:
        optimizer: The torch optimizer.
        home: Where state waits; None: it stays where it is.
    """
    if home is None:
        return
    for state in optimizer.state.values():
        for name, value in _large(state):
            state[name] = place(value, home)


def load_at_home(optimizer: torch.optim.Optimizer, home: torch.device | None) -> None:
    """From here on, `optimizer.load_state_dict` brings state to where it waits.

    Torch's own brings all of it to the parameters' device, where there may be no room for it.

    Args:
        optimizer: The torch optimizer.
        home: Where state waits; None: as torch does.
    """
    if home is None:
        return
    taken: list[tuple[Tensor, str, Tensor]] = []

    def before(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved, own = (
            [each for group in groups for each in group["params"]]
            for groups in (state_dict["param_groups"], optimizer.param_groups)
        )
        parameter_of = dict(zip(saved, own, strict=False))  # torch refuses another number of them
        states = {label: state for label, state in state_dict["state"].items() if label in parameter_of}
        taken[:] = [
            (parameter_of[label], name, value) for label, state in states.items() for name, value in _large(state)
        ]
        small = {
            label: {name: value for name, value in state.items() if not _is_large(value)}
            for label, state in states.items()
        }
        return {**state_dict, "state": {**state_dict["state"], **small}}

    def after(optimizer: torch.optim.Optimizer) -> None:
        for parameter, name, value in taken:
            cast = value.to(parameter.dtype) if parameter.is_floating_point() else value  # as torch does
            optimizer.state[parameter][name] = place(cast, home)
        taken.clear()

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


def _large(state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in state.items() if _is_large(value)]


def _is_large(value: Any) -> bool:
    """Step counters are not, and stay: torch keeps them where the kernel that reads them wants them."""
    return isinstance(value, Tensor) and value.dim() > 0
