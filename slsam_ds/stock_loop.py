"""A stock DeepSpeed loop as it stands: `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`.

Each forward runs where the loop calls it, without a graph, for the loss that the loop sees. What it was called with is
kept, and the step at the window's end runs it again for each pass: on the same inputs, with the same random numbers, in
the same autocast. So weights are those of `SLSAMEngine.train_step` on the same micro-batches, to the bit, for the price
of that one forward more. What cannot be run again is refused: a loss that was made of what the model returned.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from slsam_ds.engines.guard import is_stepping, stepping
from slsam_ds.model.forward_state import Snapshot
from slsam_ds.model.micro_batches import check_loss
from slsam_ds.model.nests import map_tensors, tensors_in
from slsam_ds.passes import ForwardBackward
from slsam_ds.plan import StepResult
from slsam_ds.rng import RandomState
from slsam_ds.slsam import SLSAM


@dataclass(frozen=True, slots=True)
class _Call:
    """A forward as the loop called it.

    Attributes:
        inputs: A copy: a loop may fill the same tensors with the next batch.
        random_state: Before it.
        autocasts: Around it: device type, whether it was on, and the dtype.
    """

    inputs: dict[str, Any]
    random_state: RandomState
    autocasts: tuple[tuple[str, bool, torch.dtype], ...]

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Within, everything but the weights is as it was when the loop called."""
        self.random_state.replay()
        with contextlib.ExitStack() as stack:
            for device, on, dtype in self.autocasts:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=on))
            yield


class StockLoop:
    """The calls of a window, from its first forward to the step.

    Args:
        engine: The DeepSpeedEngine.
        slsam: SL-SAM around it.
    """

    def __init__(self, engine: Any, slsam: SLSAM) -> None:
        self._engine, self._slsam = engine, slsam
        self._returned = WeakIdKeyDictionary()  # losses that nobody holds any more take their inputs along
        self._window: list[tuple[_Call, float]] = []  # and what its loss is divided by
        self._begin: Snapshot | None = None  # what the window's first forward found

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the engine returns; in training, without a graph."""
        engine, inputs = self._engine, {"args": args, "kwargs": kwargs}
        in_training = torch.is_grad_enabled() and engine.module.training and not is_stepping()
        if not in_training or any(tensor.requires_grad for tensor in tensors_in(inputs)):
            return engine(*args, **kwargs)
        if self._begin is None:
            self._begin = self._slsam.forwards.capture()
        call = _Call(map_tensors(inputs, torch.clone), self._slsam.forwards.random(), self._autocasts())
        with torch.no_grad():
            output = engine(*args, **kwargs)
        loss = _loss_of(output)
        if isinstance(loss, Tensor) and loss.ndim == 0:
            self._returned[loss] = call
        return output

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> Tensor:
        """Take a loss that `forward` has returned into the window.

        Raises:
            RuntimeError: It is not one of those.
        """
        call = self._returned.pop(loss, None) if isinstance(loss, Tensor) else None
        if call is None:
            raise RuntimeError(
                "engine.backward(loss): not a loss that engine(...) has returned since the last step, as a tensor, as "
                "`.loss` or as the first of a tuple: SL-SAM computes the loss again, and cannot repeat what was done "
                "to it; call engine.train_step(window, loss_fn=...) in place of forward, backward and step"
            )
        divisor = self._engine.gradient_accumulation_steps() if scale_wrt_gas else 1
        self._window.append((call, divisor))
        return loss / divisor

    def step(self, lr_kwargs: Any = None) -> StepResult | None:
        """Count a micro-batch; at the window's end, take the whole step.

        Raises:
            RuntimeError: No backward came before it.
        """
        engine = self._engine
        if not self._window:
            raise RuntimeError(
                "engine.step(): no engine.backward(loss) came before it; or call engine.train_step(window) in place of "
                "forward, backward and step"
            )
        if not engine.is_gradient_accumulation_boundary():
            with stepping():
                engine.step()
            return None
        if lr_kwargs:
            raise ValueError("engine.step(lr_kwargs): not supported; give the scheduler what it needs beforehand")
        micro_steps, timed = engine.micro_steps, engine.tput_timer.micro_step_count
        engine.tput_timer.stop()  # it has timed the loop's own forward; the step starts it again
        now = self._slsam.forwards.random()
        assert self._begin is not None
        self._begin.replay()
        try:
            result = self._slsam.step_with([call.inputs for call, _ in self._window], self._begin_pass)
        finally:
            now.replay()
            # The others of the window were counted when they came.
            engine.micro_steps, engine.tput_timer.micro_step_count = micro_steps, timed
            self._returned.clear()
            self._window.clear()
            self._begin = None
        engine.micro_steps += 1
        engine.tput_timer.micro_step_count += 1
        return result

    def _begin_pass(self, micro_batches: Sequence[Any]) -> ForwardBackward:
        # The ascent may take the first of them only, and of each the first samples only.
        calls = dict(zip(map(id, micro_batches), self._window, strict=False))

        def forward_backward(micro_batch: Any) -> Tensor:
            call, divisor = calls[id(micro_batch)]
            with call.around():
                loss = _loss_of(self._engine(*micro_batch["args"], **micro_batch["kwargs"]))
            loss = loss / (divisor * len(micro_batches) / len(self._window))
            check_loss(loss)
            self._slsam.engine.backward(loss)
            return loss.detach()

        return forward_backward

    def _autocasts(self) -> tuple[tuple[str, bool, torch.dtype], ...]:
        devices = {"cpu", self._slsam.engine.device.type}
        return tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in devices
            if torch.amp.is_autocast_available(device)
        )


def _loss_of(output: Any) -> Any:
    """What a loop takes for the loss: `.loss`, the first of a tuple, or all that the model returned."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return loss
    return output[0] if isinstance(output, (tuple, list)) and output else output
