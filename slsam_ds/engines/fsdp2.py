"""FSDP2 (`fully_shard`): every rank holds a shard of each parameter, and modules gather theirs while they run.

FSDP2 reduces what has a gradient and nothing else, its backward ends at the lowest active layer, and a torch optimizer
steps the shards. What is left to do here: reduce once per window, let nothing gathered outlive a change of the shards
and what does not change stay for the second pass, and tell which ranks hold the same shard.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from slsam_ds.engines.placement import Sharded, as_many_as_fit
from slsam_ds.engines.torch_optimizer import TorchOptimizerEngine
from slsam_ds.model.layers import LayerMap
from slsam_ds.protocol import MAX_KEPT_BYTES, Piece, Run
from slsam_ds.shards import local_elements


class FSDP2Engine(Sharded, TorchOptimizerEngine):
    """A module sharded by `fully_shard`, over one mesh dimension or over two (hybrid: replicate x shard).

    Args:
        model: It, or a module inside it, is the root that `fully_shard` was applied to last. Everything that may ever
            be active is trainable.
        optimizer: Built on the sharded parameters; groups carry the key "arm", one arm per group.
        layer_map: The arms.

    Raises:
        ValueError: A layout or policy that is not supported.
    """

    sends_during_backward = True  # weights in every backward, gradients in the window's last

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, layer_map: LayerMap) -> None:
        self._root = _find_root(model)
        super().__init__(model, optimizer, layer_map)
        self._inner = _initialize(self._root)
        _check_supported(layer_map, self._inner)
        self._owners = {id(each): _owner(each) for each in self._parameters_of(self._parameters)}
        self._find_depths(model, layer_map)
        found = (self._inner.get(id(parameter)) for parameter in self._upwards)
        self._groups_upwards = list(dict.fromkeys(inner.group for inner in found if inner is not None))
        self._own_prefetch: list[tuple[Any, list[Any]]] = []
        self._kept: list[tuple[Any, Any]] = []  # groups that stay gathered, and how their user has them after a forward
        # A rank whose data never touches a parameter takes part in its reduction all the same.
        self._root.set_reduce_scatter_unused_params(True)

    def begin_step(self, ascended: Collection[int], updated: Collection[int]) -> None:
        super().begin_step(ascended, updated)
        self._reshard()
        self._keep_gathered([])

    def begin_ascent(self) -> None:
        super().begin_ascent()
        self._keep_gathered(self._groups_unchanged())

    def end_step(self) -> None:
        super().end_step()
        self._reshard()
        self._keep_gathered([])

    def begin_micro_batch(self, *, last: bool) -> None:
        # Until the last, gradients stay whole on the modules' gathered parameters; then all of it is reduced at once,
        # each module's while backward goes on below it.
        self._root.set_requires_gradient_sync(last)

    def discard(self) -> None:
        _drop_unreduced_gradients(self._inner.values())
        super().discard()

    def publish(self, arms: Collection[int]) -> None:
        for group in {self._inner[id(parameter)].group for arm in arms for parameter in self._parameters[arm]}:
            group.reshard()

    def _average(self, gradients: Sequence[Tensor]) -> None:
        """Backward has done so."""

    def _piece(self, arm: int, parameter: nn.Parameter) -> Piece:
        weight = local_elements(parameter.detach())
        gathered_as = self._inner[id(parameter)].read_dtype
        read_dtype = gathered_as if gathered_as != torch.float32 else self._read_dtype(parameter)
        return Piece(arm, weight, weight, parameter, self._owners[id(parameter)], read_dtype=read_dtype)

    def _local_runs(self, parameter: nn.Parameter) -> tuple[Tensor, Iterator[Run]]:
        return parameter, _runs_of_shard(parameter, self._numbers[parameter])

    def _end_prefetch_at(self, arm: int | None) -> None:
        """Keep backward from gathering what is below this arm, where nothing is left to do.

        FSDP2 gathers the next module down while the backward of one runs. One that is told to gather itself instead,
        which it has done already, gathers nothing; and if backward does go on below, modules gather when it arrives.
        Private state, so that the user's own choice survives: FSDPState in _fsdp_state.py, torch 2.13.
        """
        for state, own in self._own_prefetch:
            state._states_to_backward_prefetch = own
        self._own_prefetch = []
        if arm is None or arm <= 0:  # below arm 0 is nothing, and ALWAYS may be anywhere
            return
        for state in {self._inner[id(parameter)].state for parameter in self._parameters[arm]}:
            self._own_prefetch.append((state, state._states_to_backward_prefetch))
            state._states_to_backward_prefetch = [state]

    def _switch_to(self, arms: Iterable[int]) -> None:
        self._root.set_requires_gradient_sync(True)
        super()._switch_to(arms)
        self._end_prefetch_at(None if self._active == self._all_arms else min(self._active))

    def _groups_unchanged(self) -> list[Any]:
        """Groups that hold only what the descent reads as it is, as many as `MAX_KEPT_BYTES` have room for."""
        unchanged = {id(parameter) for parameter in self._unchanged(self._ascended, self._updated)}
        members = {
            group: [id(parameter.sharded_param) for parameter in group.fsdp_params] for group in self._groups_upwards
        }
        sized = (
            (group, sum(self._inner[member].num_bytes for member in members[group]))
            for group in self._groups_upwards
            if unchanged.issuperset(members[group])
        )
        return as_many_as_fit(sized, MAX_KEPT_BYTES)

    def _keep_gathered(self, groups: list[Any]) -> None:
        """Let these, and no others that were kept before, stay gathered until the step ends.

        Between the passes the activations are gone, and what is held then is no less while there are some.
        `FSDPModule` has setters for whole modules only; private state: FSDPParamGroup in _fsdp_param_group.py, torch
        2.13.
        """
        for group, after_forward in self._kept:
            group.post_forward_mesh_info, group.reshard_after_backward = after_forward, True
        self._kept = [(group, group.post_forward_mesh_info) for group in groups if group.reshard_after_backward]
        for group, _ in self._kept:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False

    def _reshard(self) -> None:
        """End whatever pass or evaluation is under way, also one that raised: the next forward gathers anew.

        A module that stayed gathered would go on with the old weights, and with the old `requires_grad`.
        """
        self._root.reset_iter_state()


def _owner(parameter: Tensor) -> int:
    """The rank that speaks for this rank's shard: with hybrid sharding, the first of those that hold it."""
    assert isinstance(parameter, DTensor)
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    dimensions = zip(parameter.placements, coordinate, strict=True)
    place = tuple(0 if placement.is_replicate() else index for placement, index in dimensions)
    return int(parameter.device_mesh.mesh[place])


def _runs_of_shard(parameter: Tensor, number: int) -> Iterator[Run]:
    """This rank's shard of a parameter whose first element has this number: one run, if it is cut along its rows.

    FSDP2 cuts as `torch.chunk` does.
    """
    assert isinstance(parameter, DTensor)
    mesh_dim = parameter.device_mesh.ndim - 1
    placement: Any = parameter.placements[mesh_dim]
    dim = placement.dim
    size = parameter.shape[dim]
    chunk = -(-size // parameter.device_mesh.size(mesh_dim))
    first = min(parameter.device_mesh.get_local_rank(mesh_dim) * chunk, size)
    inner, held = math.prod(parameter.shape[dim + 1 :]), parameter.to_local().shape[dim]
    for row in range(math.prod(parameter.shape[:dim]) if held else 0):
        yield Run(row * held * inner, number + (row * size + first) * inner, held * inner)


def _find_root(model: nn.Module) -> FSDPModule:
    roots: list[FSDPModule] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # parents come before their children
        if isinstance(module, FSDPModule):
            if module not in inside:
                roots.append(module)
            inside.update(module.modules())
    if len(roots) != 1:
        raise ValueError(
            f"{type(model).__name__}: {len(roots)} modules went through fully_shard side by side; "
            "apply it to the whole model too, after its blocks"
        )
    return roots[0]


@dataclass(frozen=True, slots=True)
class _Inner:
    """What FSDP2 keeps about a sharded parameter.

    Attributes:
        state: FSDPState of the module that gathers it.
        group: FSDPParamGroup, what is gathered together.
        parameter: FSDPParam, the parameter's own.
    """

    state: Any
    group: Any
    parameter: Any

    @property
    def read_dtype(self) -> torch.dtype:
        """Dtype to which the shard is cast when it is gathered."""
        dtype: torch.dtype = self.parameter.param_dtype or self.parameter.orig_dtype
        return dtype

    @property
    def num_bytes(self) -> int:
        """Of the whole parameter, gathered."""
        return int(self.parameter.sharded_param.numel()) * self.read_dtype.itemsize


def check_version() -> None:
    """Refuse a torch whose FSDP2 lacks what the engine calls.

    Raises:
        ValueError: Saying which versions are supported.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(f"FSDP2 needs torch 2.13 or later here; found {torch.__version__}")


def _initialize(root: FSDPModule) -> dict[int, _Inner]:
    """Run FSDP2's lazy initialisation while everything that may be sampled is trainable.

    It settles the dtypes of each module's gradients by looking at its trainable parameters. With mixed precision a
    module without any would crash when its layer is first sampled, so this is also done again where a forward ran
    before. Private state: FSDPState in torch/distributed/fsdp/_fully_shard/_fsdp_state.py and FSDPParamGroup in
    _fsdp_param_group.py, torch 2.13.

    Returns:
        What FSDP2 keeps of every sharded parameter, by the parameter's id.
    """
    check_version()
    root_state = root._get_fsdp_state()
    root_state._lazy_init()
    inner: dict[int, _Inner] = {}
    for state in root_state._state_ctx.all_states:
        for group in state._fsdp_param_groups:
            group._init_mp_dtypes()
            inner |= {id(parameter.sharded_param): _Inner(state, group, parameter) for parameter in group.fsdp_params}
    return inner


def _drop_unreduced_gradients(inner: Iterable[_Inner]) -> None:
    """Forget what backward left on gathered parameters without reducing it; `reset_iter_state` only means to.

    Private state: FSDPParam in torch/distributed/fsdp/_fully_shard/_fsdp_param.py, torch 2.13.
    """
    for parameter in (entry.parameter for entry in inner):
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):
            parameter._unsharded_param.grad = None


def _check_supported(layer_map: LayerMap, inner: Mapping[int, _Inner]) -> None:
    """Refuse at construction what would be wrong or is untested.

    Raises:
        ValueError: Naming the parameter, what it has and what to do.
    """
    num_ranks = dist.get_world_size()
    for name, parameter in [entry for layer in layer_map for entry in layer.parameters] + list(layer_map.always):
        if id(parameter) not in inner or not isinstance(parameter, DTensor):
            raise ValueError(f"{name}: not sharded by fully_shard; apply it to the whole model, after its blocks")
        *outer, innermost = parameter.placements
        replicated = all(placement.is_replicate() for placement in outer)
        if not (replicated and innermost.is_shard() and parameter.device_mesh.size() == num_ranks):
            raise ValueError(
                f"{name}: placed as {parameter.placements} on {parameter.device_mesh.size()} of {num_ranks} ranks; "
                "use a mesh over all ranks, shard or replicate x shard, without tensor parallelism"
            )
        found = inner[id(parameter)]
        if found.read_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: forward reads it as {found.read_dtype}; use float32 or bfloat16")
        if type(parameter.to_local()) is not Tensor:
            raise ValueError(f"{name}: shards of type {type(parameter.to_local()).__name__}; use plain tensors")
        if found.parameter.offload_to_cpu:
            raise ValueError(f"{name}: CPUOffloadPolicy is not supported yet; leave offload_policy out")
