"""The groups that an optimizer was given, before they were split by arm: what stock code saves and loads."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

GIVEN = "given"
"""Key of a group that was split off: `Given`, as a plain tuple, so that a checkpoint that holds it runs no code."""

OWN_KEYS = ("params", "param_names", "arm", GIVEN)

# Per-group lists that schedulers of torch and DeepSpeed keep beside the optimizer's groups.
_PER_GROUP_SCHEDULER_LISTS = (
    "base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "delta_lrs", "base_momentums", "max_momentums",
)  # fmt: skip


class Given(NamedTuple):
    """Where the parameters of a group were when the optimizer was given them.

    Attributes:
        group: In which group.
        positions: Where in it, each.
        sizes: How many parameters each group had.
    """

    group: int
    positions: tuple[int, ...]
    sizes: tuple[int, ...]


def given_of(group: Mapping[str, Any]) -> Given:
    """Of a group that was split off."""
    return Given(*group[GIVEN])


def is_split(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether groups are split by arm."""
    return all("arm" in group for group in groups)


@contextlib.contextmanager
def given_groups(optimizer: torch.optim.Optimizer, lr_scheduler: Any = None) -> Iterator[None]:
    """Context manager in which the optimizer and its scheduler have their original groups, not split by layer.

    A loop without SL-SAM can load what is saved in this context. What such a loop has saved can be loaded in it.

    Args:
        optimizer: Torch's, of a plain module or one that `fully_shard` has sharded.
        lr_scheduler: Its scheduler, where that is saved or loaded, too.
    """
    pieces = list(optimizer.param_groups)
    absent: list[Tensor] = []  # what SL-SAM never trains has left the groups: empty tensors stand for it
    optimizer.param_groups[:] = _joined(pieces, optimizer.defaults, absent)
    try:
        with given_schedule(lr_scheduler, pieces):
            yield
    finally:
        joined = optimizer.param_groups
        optimizer.param_groups[:] = [_with_settings_of(joined[given_of(piece).group], piece) for piece in pieces]
        for tensor in absent:
            optimizer.state.pop(tensor, None)


@contextlib.contextmanager
def given_schedule(lr_scheduler: Any, pieces: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Within, a scheduler's lists per group are those of the groups that were given.

    Args:
        lr_scheduler: The scheduler, or None.
        pieces: The optimizer's groups, split by arm.
    """
    groups = [given_of(piece).group for piece in pieces]
    num_given = len(given_of(pieces[0]).sizes)
    first_pieces = [groups.index(group) if group in groups else 0 for group in range(num_given)]
    deal_out(lr_scheduler, first_pieces, num_groups=len(pieces))
    try:
        yield
    finally:
        deal_out(lr_scheduler, groups, num_groups=num_given)


def deal_out(lr_scheduler: Any, sources: Sequence[int], *, num_groups: int) -> None:
    """Change a scheduler's lists with an entry per group, where the groups have changed.

    Args:
        lr_scheduler: The scheduler, and with it those that it is made of; or None.
        sources: Of each group now: which of those before it comes from.
        num_groups: How many there were before.
    """
    for scheduler in _with_nested(lr_scheduler):
        for name in _PER_GROUP_SCHEDULER_LISTS:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == num_groups:
                setattr(scheduler, name, [values[source] for source in sources])


def _with_nested(lr_scheduler: Any) -> Iterator[Any]:
    if lr_scheduler is None:
        return
    yield lr_scheduler
    yield from _with_nested(getattr(lr_scheduler, "scheduler", None))  # within what Accelerate puts around one
    for nested in getattr(lr_scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        yield from _with_nested(nested)


def split_loaded(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Hook before `load_state_dict`: split what was saved with the groups that the optimizer was given.

    What was saved split may not say of which groups: an older slsam_ds did not ask.

    Raises:
        ValueError: It was saved with others.
    """
    pieces, saved = optimizer.param_groups, state_dict["param_groups"]
    if not is_split(pieces):
        return None
    if is_split(saved):
        groups = [{**group, GIVEN: piece[GIVEN]} for group, piece in zip(saved, pieces, strict=False)]
        return {**state_dict, "param_groups": groups} if len(groups) == len(saved) else None
    expected, found = list(given_of(pieces[0]).sizes), [len(group["params"]) for group in saved]
    if found != expected:
        raise ValueError(
            f"the optimizer's state to load is of groups of {found} parameters, this optimizer was given groups of "
            f"{expected}: build it with the groups of the run that saved the state, of the same trainable parameters"
        )
    groups = []
    for piece in pieces:
        source, positions, _ = given_of(piece)
        labels = [saved[source]["params"][position] for position in positions]
        groups.append({**_with_settings_of(saved[source], piece), "params": labels})
    kept = {label for group in groups for label in group["params"]}
    state = {label: value for label, value in state_dict["state"].items() if label in kept}
    return {**state_dict, "state": state, "param_groups": groups}


def _with_settings_of(joined: Mapping[str, Any], piece: Mapping[str, Any]) -> dict[str, Any]:
    return {**joined, **{key: piece[key] for key in OWN_KEYS if key in piece}}


def _joined(pieces: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], absent: list[Tensor]) -> list[Any]:
    """The groups that were given; each has the settings of the first that was split off it.

    Args:
        pieces: The groups that were split off.
        defaults: Settings of a group that nothing was split off.
        absent: Takes the tensors that stand for parameters in none of the pieces.
    """
    joined: list[dict[str, Any]] = []
    for index, size in enumerate(given_of(pieces[0]).sizes):
        own = [piece for piece in pieces if given_of(piece).group == index]
        settings = {key: value for key, value in (own or [defaults])[0].items() if key not in OWN_KEYS}
        at = {place: p for piece in own for place, p in zip(given_of(piece).positions, piece["params"], strict=True)}
        fillers = [torch.empty(0, requires_grad=True) for _ in range(size - len(at))]
        absent += fillers
        rest = iter(fillers)
        joined.append({**settings, "params": [at[place] if place in at else next(rest) for place in range(size)]})
    return joined
