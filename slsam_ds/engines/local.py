"""One device, or plain data parallelism: every rank holds whole weights and a whole optimizer."""

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slsam_ds.engines.param_groups import scaled_learning_rates
from slsam_ds.engines.ranks import ProcessGroupRanks
from slsam_ds.layers import LayerMap
from slsam_ds.protocol import ALWAYS, Shard


class LocalEngine:
    """Weights, gradients and optimizer state live whole on every rank; gradients are averaged over ranks.

    No DDP wrapper is needed, and none is accepted: its hooks would reduce what the ascent pass keeps to itself.

    Args:
        model: The unwrapped module.
        optimizer: Its parameter groups carry the key "arm", one arm per group.
        layer_map: The arms.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, layer_map: LayerMap) -> None:
        self._optimizer = optimizer
        self._parameters = {layer.index: [parameter for _, parameter in layer.parameters] for layer in layer_map}
        if layer_map.always:
            self._parameters[ALWAYS] = [parameter for _, parameter in layer_map.always]
        self._active = set(self._parameters)
        self.device = next(model.parameters()).device
        self.ranks = ProcessGroupRanks(None, self.device)

    def activate(self, arms: Collection[int] | None) -> None:
        wanted = set(self._parameters) if arms is None else set(arms)
        for arm in wanted ^ self._active:
            for parameter in self._parameters[arm]:
                parameter.requires_grad_(arm in wanted)
        self._active = wanted

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def reduce(self) -> list[Shard]:
        shards = []
        for arm in sorted(self._active):
            for parameter in self._parameters[arm]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if self.ranks.world_size > 1:
                    dist.all_reduce(parameter.grad.div_(self.ranks.world_size))
                weight = parameter.detach().view(-1)
                shards.append(Shard(arm, weight, weight, parameter.grad.view(-1), owner=0))
        return shards

    def discard(self) -> None:
        for parameters in self._parameters.values():
            for parameter in parameters:
                parameter.grad = None

    def live_weights(self, arms: Collection[int]) -> list[Tensor]:
        return [parameter for arm in arms for parameter in self._parameters[arm]]

    def publish(self, arms: Collection[int]) -> None:
        """Every rank perturbed its own whole copy."""

    def update(
        self, arms: Collection[int], *, num_micro_batches: int, learning_rate_scale: Mapping[int, float], skip: bool
    ) -> bool:
        if not skip:
            # Frozen arms have no gradient, and torch optimizers leave a parameter without gradient alone.
            with scaled_learning_rates(self._optimizer.param_groups, learning_rate_scale):
                self._optimizer.step()
        self.discard()
        return not skip
