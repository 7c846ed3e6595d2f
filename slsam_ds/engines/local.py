"""One device, or plain data parallelism: every rank holds whole weights and a whole optimizer."""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn

from slsam_ds.engines.placement import Replicated
from slsam_ds.engines.torch_optimizer import TorchOptimizerEngine
from slsam_ds.protocol import Piece, Run


class LocalEngine(TorchOptimizerEngine, Replicated):
    """Weights, gradients and optimizer state live whole on every rank; gradients are averaged over ranks.

    No DDP wrapper is needed, and none is accepted: its hooks would reduce what the ascent pass keeps to itself.
    """

    sends_during_backward = False

    def begin_micro_batch(self, *, last: bool) -> None:
        """Every micro-batch is treated alike."""

    def publish(self, arms: Collection[int]) -> None:
        """Every rank perturbed its own whole copy."""

    def _active_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        return ((arm, parameter) for arm in sorted(self._active) for parameter in self._parameters[arm])

    def _piece(self, arm: int, parameter: nn.Parameter) -> Piece:
        stepped, offset = self._stepped_as(parameter)
        master = stepped.detach().view(-1)[offset : offset + parameter.numel()]
        weight, read_dtype = parameter.detach().view(-1), self._read_dtype(parameter)
        return Piece(arm, weight, master, stepped, owner=0, offset=offset, read_dtype=read_dtype)

    def _average(self, gradients: Sequence[Tensor]) -> None:
        self.ranks.average(gradients)

    def _local_runs(self, parameter: nn.Parameter) -> tuple[Tensor, list[Run]]:
        stepped, offset = self._stepped_as(parameter)
        return stepped, [Run(offset, self._numbers[parameter], parameter.numel())]

    def _stepped_as(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """What the optimizer steps that holds the parameter in full precision, and where in it that begins."""
        return parameter, 0
