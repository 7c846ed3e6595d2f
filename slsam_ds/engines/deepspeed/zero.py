"""What the ZeRO engines have in common: DeepSpeed's own step, run over a view that holds the sampled groups alone.

The optimizer has one parameter group per arm, so a layer's gradients, master weights and optimizer state are whole
groups of the ZeRO optimizer. Reduction, clipping and stepping are DeepSpeed's own code, run over a view in which only
the sampled groups exist: what is not sampled is neither sent, nor zero-filled, nor stepped.
"""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from slsam_ds.engines.deepspeed.checkpoint import layout_of
from slsam_ds.engines.deepspeed.internals import INTERNALS, check_internals
from slsam_ds.engines.deepspeed.step import DeepSpeedStep, boundary, narrowed, overlaid
from slsam_ds.engines.deepspeed.support import check_split, refuse, unsupported_of
from slsam_ds.engines.placement import runs_within
from slsam_ds.engines.ranks import ProcessGroupRanks, share_deadline
from slsam_ds.model.layers import LayerMap
from slsam_ds.perturbation import scale_
from slsam_ds.protocol import ALWAYS, Piece, Run, Shard


class ZeroEngine(DeepSpeedStep):
    """SL-SAM's view of a DeepSpeedEngine with a ZeRO optimizer.

    A group is what the stage steps at once: an optimizer's parameter group, or a part of one.

    Args:
        engine: Initialised with one parameter group per arm (key "arm"), everything that may ever be active trainable.
        layer_map: The arms.

    Raises:
        ValueError: A DeepSpeed feature or layout that is not supported.
    """

    zero_class: ClassVar[type[ZeROOptimizer]]
    """Its table in `INTERNALS` says what it keeps per group."""

    reducing_hook: ClassVar[str]
    """What the optimizer's gradient hooks call to reduce a gradient: a method of it."""

    norm_finder: ClassVar[str]
    """What the optimizer's step calls to find the norm of the whole gradient: a method of it."""

    may_skip_modules = False

    _gradients_stay_local = False
    """Gradients are this rank's own business: see `Replicated`."""

    def __init__(self, engine: DeepSpeedEngine, layer_map: LayerMap) -> None:
        self._engine = engine
        self._zero: Any = engine.optimizer
        self._offloaded = self._is_offloaded()
        self._check_supported()
        internals = INTERNALS[self.zero_class.__name__]
        self._group_lists = internals.group_lists(offloaded=self._offloaded)
        self._group_dicts = internals.group_dicts(offloaded=self._offloaded)
        self._members: Sequence[Sequence[nn.Parameter]] = self._find_members()
        self._groups_of = self._groups_by_arm(layer_map)
        self._numbers = layer_map.numbers()
        self._start_with(self._groups_of)
        self.device = torch.device(engine.device)
        share_deadline(self._zero.dp_process_group, self.device)
        self.ranks = ProcessGroupRanks(self._zero.dp_process_group, self.device)
        # DeepSpeed adds up micro-batches in float32 only in its reduced partitions: where it is asked to, the
        # reduction cannot be held back until the window ends.
        self._reduces_every_micro_batch = self._zero.gradient_accumulation_dtype != self._zero.dtype

    @property
    def sends_during_backward(self) -> bool:
        return self._reduces_every_micro_batch

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        inner: torch.optim.Optimizer = self._zero.optimizer
        return inner

    @property
    def loss_scale(self) -> float:
        return float(self._zero.loss_scale)

    @abstractmethod
    def begin_micro_batch(self, *, last: bool) -> None: ...

    def backward(self, loss: Tensor) -> None:
        with self._reduction_held():
            self._run_backward(loss)
        if self._reduces_every_micro_batch and not self._gradients_stay_local:
            self._flush()

    def reduce(self) -> list[Shard]:
        if not self._reduces_every_micro_batch:
            self._flush()
        return self._reduced()

    def pieces(self, arms: Collection[int]) -> list[Piece]:
        return [piece for arm in sorted(arms) for group in self._groups_of[arm] for piece in self._pieces(arm, group)]

    def runs(self, piece: Piece) -> list[Run]:
        return runs_within(self._runs_of_stepped[piece.stepped], piece)

    def scale_gradients(self, factor: float) -> None:
        if factor != 1:
            scale_([shard.gradient for shard in self._reduced() if shard.gradient.numel() > 0], factor)

    def update(
        self,
        arms: Collection[int],
        *,
        num_micro_batches: int,
        learning_rate_scale: Mapping[int, float],
        grad_norm: float,
        skip: bool,
    ) -> bool:
        # By which DeepSpeed clips. It would reduce a norm for each group, and where the optimizer is offloaded take
        # them from when gradients were copied, which `scale_gradients` has scaled since. It stays on the host, which
        # asks of each group whether the norm is finite, and would wait for the device.
        found = self._as_found(torch.tensor(grad_norm * self.loss_scale, dtype=torch.float32))
        with (
            overlaid(self._zero, self.norm_finder, lambda *_, **__: found),
            overlaid(self._zero, "has_overflow", lambda *_, **__: False),
        ):
            return super().update(
                arms,
                num_micro_batches=num_micro_batches,
                learning_rate_scale=learning_rate_scale,
                grad_norm=grad_norm,
                skip=skip,
            )

    def discard(self) -> None:
        for parameter in self._parameters_of(self._groups_of):
            parameter.grad = None

    @abstractmethod
    def live_weights(self, arms: Collection[int]) -> list[Tensor]: ...

    @abstractmethod
    def publish(self, arms: Collection[int]) -> None: ...

    @abstractmethod
    def _as_found(self, norm: Tensor) -> Any:
        """What the method that finds the norm of the gradient returns. The loss scale is in it. Shape (), float32."""

    @abstractmethod
    def _is_offloaded(self) -> bool:
        """Whether the optimizer's state is on the host."""

    @abstractmethod
    def _find_members(self) -> Sequence[Sequence[nn.Parameter]]:
        """The parameters of each group."""

    @abstractmethod
    def _param_group(self, group: int) -> int:
        """Which of the inner optimizer's parameter groups a group belongs to."""

    @abstractmethod
    def _reduce_held(self) -> None:
        """Reduce the gradients that are on the parameters of all groups there are, as DeepSpeed's hooks would."""

    @functools.cached_property
    def _runs_of_stepped(self) -> dict[Tensor, list[Run]]:
        """Where this rank's partitions are in the model, by the partition."""
        layout, rank = layout_of(self._engine), self.ranks.rank
        numbers = {
            name: self._numbers[parameter]
            for parameter, name in self._engine.param_names.items()
            if parameter in self._numbers
        }
        return {
            stepped: [
                Run(fragment.offset, numbers[fragment.name] + fragment.start, fragment.stop - fragment.start)
                for fragment in layout.fragments(group, rank)
            ]
            for group, stepped in enumerate(self._partitions())
        }

    @abstractmethod
    def _partitions(self) -> Sequence[Tensor]:
        """What the inner optimizer steps, of every group."""

    @abstractmethod
    def _pieces(self, arm: int, group: int) -> Iterator[Piece]:
        """This rank's part of a group."""

    @abstractmethod
    def _shards(self, arm: int, group: int) -> Iterator[Shard]:
        """This rank's pieces of a group whose gradient was reduced."""

    def _unsupported_features(self) -> dict[str, bool]:
        """DeepSpeed features that are not supported, by what people call them, and whether they are on."""
        zero = self._zero
        return {
            "torch_autocast with a gradient scaler": zero.torch_autocast_gradscaler is not None,
            "zero_optimization.zenflow": bool(zero.zenflow),
            "the Muon optimizer": "muon" in type(zero.optimizer).__name__.lower(),
            **unsupported_of(self._engine),
            "sequence parallelism": zero.sequence_parallel_size > 1,
        }

    def _check_supported(self) -> None:
        """Refuse at construction what would otherwise be a silent dense or wrong step.

        Raises:
            ValueError: Naming the feature and what to do.
        """
        zero, name = self._zero, self.zero_class.__name__
        if type(zero) is not self.zero_class:
            raise ValueError(
                f"DeepSpeed ZeRO stage {int(self._engine.zero_optimization_stage())} with {type(zero).__name__}: not "
                "supported yet; use ZeRO stage 1, 2 or 3 in float32 or bf16 without data_types.grad_accum_dtype (with "
                "stage 2 or 3 it may be fp32)"
            )
        check_internals(self._engine, "DeepSpeedEngine")
        check_internals(zero, name, offloaded=self._offloaded)
        refuse(self._unsupported_features(), remedy="switch it off")

    def _groups_by_arm(self, layer_map: LayerMap) -> dict[int, list[int]]:
        check_split(self._zero.optimizer.param_groups)
        groups: dict[int, list[int]] = {}
        for group in range(len(self._members)):
            param_group = self._zero.optimizer.param_groups[self._param_group(group)]
            groups.setdefault(param_group["arm"], []).append(group)
        expected = {layer.index: {id(parameter) for _, parameter in layer.parameters} for layer in layer_map}
        if layer_map.always:
            expected[ALWAYS] = {id(parameter) for _, parameter in layer_map.always}
        held = {arm: {id(p) for group in members for p in self._members[group]} for arm, members in groups.items()}
        if held != expected:
            raise ValueError("the engine's parameter groups do not hold the layers of this model: rebuild the engine")
        return groups

    def _parameters_of(self, arms: Iterable[int]) -> Iterator[nn.Parameter]:
        for group in self._groups(arms):
            yield from self._members[group]

    def _reduced(self) -> list[Shard]:
        """What the last reduction gave."""
        return [
            shard
            for arm in sorted(self._active)
            for group in self._groups_of[arm]
            for shard in self._shards(arm, group)
        ]

    def _groups(self, arms: Iterable[int]) -> list[int]:
        return sorted(group for arm in arms for group in self._groups_of[arm])

    def _run_backward(self, loss: Tensor) -> None:
        try:
            self._engine.backward(loss, scale_wrt_gas=False)
        except BaseException:
            self._zero.exit_backward()  # DeepSpeed would believe itself in the middle of a backward for ever
            raise

    @contextlib.contextmanager
    def _reduction_held(self) -> Iterator[None]:
        """Within, backward leaves local gradients on the parameters and sends nothing.

        `DeepSpeedEngine.coalesce_grad_reduction` does the same since 0.19, but reduces on the way out even when the
        pass raised, and then hangs the ranks where it did not.
        """
        with overlaid(self._zero, self.reducing_hook, _keep), overlaid(self._engine, "inside_no_sync_ctxt", True):
            yield

    def _flush(self) -> None:
        """Let DeepSpeed average what the backward passes left on the parameters of the active arms."""
        with self._narrowed_to(self._active), boundary(self._engine, True):
            self._reduce_held()

    @contextlib.contextmanager
    def _narrowed_to(self, arms: Collection[int]) -> Iterator[None]:
        """Within, the ZeRO optimizer and its inner optimizer consist of these arms' groups alone, renumbered from 0."""
        zero, groups = self._zero, self._groups(arms)
        param_groups = sorted({self._param_group(group) for group in groups})
        place_of = {group: place for place, group in enumerate(groups)}
        positions = getattr(zero, "grad_position", {})  # of a parameter: its group, and where in the group it is
        shown = {key: [place_of[group], *rest] for key, (group, *rest) in positions.items() if group in place_of}
        with (
            narrowed(zero, groups, lists=self._group_lists, dicts=self._group_dicts),
            narrowed(zero.optimizer, param_groups, lists=["param_groups"]),
            overlaid(zero, "grad_position", shown) if positions else contextlib.nullcontext(),
        ):
            yield


def _keep(*args: Any) -> None:
    """In the place of what would reduce a gradient."""
