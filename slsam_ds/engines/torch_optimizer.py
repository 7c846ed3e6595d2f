"""What engines have in common whose parameters a torch optimizer steps directly."""

import functools
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from slsam_ds.engines.arms import SwitchesArms
from slsam_ds.engines.autocast import AutocastWatch
from slsam_ds.engines.placement import runs_within
from slsam_ds.engines.ranks import ProcessGroupRanks
from slsam_ds.model.layers import LayerMap
from slsam_ds.model.param_groups import joined, scaled_learning_rates, stepped_parameters
from slsam_ds.model.state_home import by_group
from slsam_ds.perturbation import scale_
from slsam_ds.protocol import ALWAYS, Piece, Run, Shard
from slsam_ds.shards import local_elements


class TorchOptimizerEngine(SwitchesArms):
    """Arms are switched by `requires_grad`, and the optimizer leaves alone what has no gradient.

    Args:
        model: The module; its forward may run in autocast.
        optimizer: Its parameter groups carry the key "arm", one arm per group.
        layer_map: The arms. Their parameters are on one device.
    """

    may_skip_modules = True
    loss_scale = 1.0

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, layer_map: LayerMap) -> None:
        self._autocast = AutocastWatch(model, layer_map)
        self._optimizer = optimizer
        self._parameters = {layer.index: [parameter for _, parameter in layer.parameters] for layer in layer_map}
        if layer_map.always:
            self._parameters[ALWAYS] = [parameter for _, parameter in layer_map.always]
        self._numbers = layer_map.numbers()
        self._start_with(self._parameters)
        self.device = self._parameters[layer_map[0].index][0].device
        self.ranks = ProcessGroupRanks(None, self.device)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def discard(self) -> None:
        for parameters in self._parameters.values():
            for parameter in parameters:
                parameter.grad = None

    def update(
        self,
        arms: Collection[int],
        *,
        num_micro_batches: int,
        learning_rate_scale: Mapping[int, float],
        grad_norm: float,
        skip: bool,
    ) -> bool:
        if not skip:
            home = self.optimizer_state_home
            with (
                scaled_learning_rates(self._optimizer.param_groups, learning_rate_scale),
                self._masters.fetched(stepped_parameters(self._optimizer, arms)),
                joined(self._optimizer, arms, across_arms=home is None),
            ):
                by_group(self._optimizer, self._optimizer.step, home=home)()
        self.discard()
        return not skip

    def reduce(self) -> list[Shard]:
        active = list(self._gradients())
        self._average([gradient for _, _, gradient in active])
        return [Shard(self._piece(arm, parameter), local_elements(gradient)) for arm, parameter, gradient in active]

    def pieces(self, arms: Collection[int]) -> list[Piece]:
        return [self._piece(arm, parameter) for arm in sorted(arms) for parameter in self._parameters[arm]]

    def runs(self, piece: Piece) -> list[Run]:
        return runs_within(self._runs_of_stepped[piece.stepped], piece)

    def live_weights(self, arms: Collection[int]) -> list[Tensor]:
        return [local_elements(parameter.detach()) for parameter in self._parameters_of(arms)]

    @abstractmethod
    def _piece(self, arm: int, parameter: nn.Parameter) -> Piece:
        """This rank's share of a parameter."""

    @abstractmethod
    def _local_runs(self, parameter: nn.Parameter) -> tuple[Tensor, Iterable[Run]]:
        """What is stepped that holds this rank's share of a parameter, and where the share is in it."""

    @functools.cached_property
    def _runs_of_stepped(self) -> dict[Tensor, list[Run]]:
        found: dict[Tensor, list[Run]] = {}
        for parameter in self._parameters_of(self._parameters):
            stepped, runs = self._local_runs(parameter)
            found.setdefault(stepped, []).extend(runs)
        return found

    @abstractmethod
    def _average(self, gradients: Sequence[Tensor]) -> None:
        """Average the gradients of all that is active over ranks, in place."""

    def scale_gradients(self, factor: float) -> None:
        if factor != 1:
            scale_([local_elements(gradient) for _, _, gradient in self._gradients()], factor)

    def _parameters_of(self, arms: Iterable[int]) -> Iterable[nn.Parameter]:
        return (parameter for arm in arms for parameter in self._parameters[arm])

    def _read_dtype(self, parameter: nn.Parameter) -> torch.dtype | None:
        return self._autocast.read_dtype(parameter)

    def _gradients(self) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
        """Arm, parameter and gradient of all that is active, in the same order on every rank.

        A parameter that took no part has a gradient of zeros, as on the ranks where it did; one that is not active
        loses whatever it has, so that the optimizer leaves it alone.
        """
        for arm, parameters in sorted(self._parameters.items()):
            for parameter in parameters:
                if arm not in self._active:
                    parameter.grad = None
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                yield arm, parameter, parameter.grad
