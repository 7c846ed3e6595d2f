"""One trial: a candidate trains on a long task, and every checkpoint that could be kept of it is judged."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.evidence.candidates import CANDIDATES, Candidate
from benchmarks.evidence.held_out import losses, score
from benchmarks.evidence.long_tasks import LONG_TASKS
from benchmarks.evidence.tasks import Batch, Data, Task
from benchmarks.evidence.training import batches, rate_at, training_batches
from benchmarks.evidence.trials import Setting, Trial
from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.combinations import make_combination
from slsam_ds.engines.guard import stepping
from slsam_ds.plan import StepResult
from slsam_ds.pricing.calibration import calibrate
from slsam_ds.pricing.cost import CostModel

MAX_GRAD_NORM = 1.0
_NUM_POINTS = 20
"""Of the validation curve, and so of early stopping."""
_AVERAGED, _AVERAGED_EVERY = 0.75, 10
"""The mean is of the weights after every so many steps, from this share of the run on."""


def run_trial(trial: Trial) -> dict[str, Any]:
    """Train and judge.

    Returns:
        For a line of JSON: loss on validation and test data of every checkpoint, accuracy of the chosen ones, FLOPs,
        seconds, how often each arm was updated, and the validation curve.
    """
    task, candidate, setting = LONG_TASKS[trial.task], CANDIDATES[trial.candidate], trial.setting
    data = task.load()
    steps = max(2, round(task.steps * setting.share))
    model = build(data, setting, trial.seed, lora=candidate.lora)
    slsam = wrap(model, candidate, setting, seed=trial.seed, steps=steps)
    loss_fn = loss_of(task)
    schedule = LambdaLR(slsam.engine.optimizer, lambda step: rate_at(step, steps))
    stops = {max(1, round(steps * point / _NUM_POINTS)) for point in range(1, _NUM_POINTS + 1)}
    judge = _Judge(task, data, model)
    costs: CostModel | None = None
    of_all_weights = 1.0
    average: dict[str, Tensor] = {}
    num_averaged, paid, seconds, updates = 0, 0.0, 0.0, [0] * len(slsam.layers)
    for step, batch in zip(range(1, steps + 1), training_batches(task, data, trial.seed), strict=False):
        window = divided(batch, candidate.num_micro_batches)
        if costs is None:
            costs = count(slsam, window[0], loss_fn)
            if candidate.lora:  # AdamW's step on all weights is 1, not that on the adapters
                whole = build(data, setting, trial.seed)
                of_all_weights = flops(model, window[0], loss_fn) / flops(whole, window[0], loss_fn)
        started = time.perf_counter()
        result = slsam.step(window, loss_fn)
        schedule.step()
        seconds += time.perf_counter() - started
        paid += price(slsam, costs, window, result) * of_all_weights
        for arm in result.active:
            updates[arm] += 1
        if step > steps * _AVERAGED and step % _AVERAGED_EVERY == 0:
            num_averaged += 1
            _add_to_mean(average, model, num_averaged)
        if step in stops:
            judge.look(step)
    found = judge.checkpoints()
    if average:
        model.load_state_dict(average)
    found["average"] = judge.now()
    return {
        "steps": steps,
        "price": paid / steps,
        "flops": paid / task.steps,
        "seconds": seconds,
        "updates": updates,
        "curve": judge.curve,
        "checkpoints": found,
    }


class _Judge:
    """Looks at a model on its way, and keeps its best weights. Test data is looked at in the end."""

    def __init__(self, task: Task, data: Data, model: nn.Module) -> None:
        self._model, self._predicts_tokens = model, task.predicts_tokens
        self._validation, self._test = batches(data, data.validation, 100), batches(data, data.test, 100)
        self.curve: list[dict[str, float]] = []
        self._best: dict[str, Tensor] = {}
        self._best_step, self._best_loss = 0, math.inf

    def look(self, step: int) -> None:
        """Note the validation loss, and keep what is the best so far."""
        loss = self._loss(self._validation)
        self.curve.append({"step": step, "loss": loss})
        if not loss >= self._best_loss:
            self._best_step, self._best_loss = step, loss
            self._best = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    def now(self) -> dict[str, float]:
        """Validation and test loss, and test accuracy, of the weights as they are."""
        test = score(self._model, self._test, predicts_tokens=self._predicts_tokens)
        return {"validation": self._loss(self._validation), "test": test.loss, "accuracy": test.accuracy}

    def checkpoints(self) -> dict[str, dict[str, float]]:
        """The last and the best; the model has the best weights then."""
        last = self.now()
        if self._best:  # no loss was finite otherwise
            self._model.load_state_dict(self._best)
        return {"last": last, "best": {"step": self._best_step, **self.now()}}

    def _loss(self, some: Sequence[Batch]) -> float:
        return score(self._model, some, predicts_tokens=self._predicts_tokens).loss


def build(data: Data, setting: Setting, seed: int, *, lora: int = 0) -> nn.Module:
    """The model at its start; of LoRA, with adapters of this rank at every product of the blocks, and the head."""
    model = data.build_model(seed)
    if lora:
        from peft import LoraConfig, get_peft_model

        at = ["query_key_value", "mix", "up", "down"]
        model = get_peft_model(
            model, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=at, modules_to_save=["head"])
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = setting.dropout
    torch.manual_seed(seed)
    return model.train()


def wrap(
    model: nn.Module,
    candidate: Candidate,
    setting: Setting,
    *,
    seed: int,
    steps: int,
    max_grad_norm: float | None = MAX_GRAD_NORM,
) -> SLSAM:
    """The candidate around a model and its AdamW."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay, fused=True
    )
    config = SLSAMConfig.from_dict({"seed": seed, "rho": setting.rho, **candidate.knobs})
    return SLSAM(model, optimizer, config, total_steps=steps, max_grad_norm=max_grad_norm)


def loss_of(task: Task) -> Any:
    """Mean cross-entropy of a batch, as `SLSAM.step` wants it."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return losses(model, batch, predicts_tokens=task.predicts_tokens)[0].mean()

    return loss_fn


def divided(batch: Batch, number: int) -> list[Batch]:
    """A step's samples as so many micro-batches."""
    parts = {name: tensor.chunk(number) for name, tensor in batch.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(number)]


def count(slsam: SLSAM, batch: Batch, loss_fn: Any) -> CostModel:
    """What the parts of a step cost, counted on such a batch."""
    with stepping():  # nothing is updated
        return calibrate(
            slsam.engine, slsam.model, slsam.layers, lambda: slsam.engine.backward(loss_fn(slsam.model, batch))
        )


def price(slsam: SLSAM, costs: CostModel, window: Sequence[Batch], result: StepResult) -> float:
    """FLOPs of a step that was taken, AdamW's on the same parameters being 1."""
    config = slsam.config
    ascended: set[int] = set()
    if result.rho > 0 and config.has_ascent_pass:
        reads_ascent = make_combination(config.descend_along).reads_ascent
        ascended = {*result.perturbed, *(result.active if reads_ascent else ())}
    return costs.price(ascended, result.active, slsam.workload(window))


def flops(model: nn.Module, batch: Batch, loss_fn: Any) -> float:
    """Of a forward and a backward."""
    with FlopCounterMode(display=False) as counter:
        loss_fn(model, batch).backward()
    model.zero_grad()
    return float(counter.get_total_flops())


@torch.no_grad()
def _add_to_mean(mean: dict[str, Tensor], model: nn.Module, number: int) -> None:
    for name, tensor in model.state_dict().items():
        if name in mean:
            mean[name].lerp_(tensor, 1 / number)
        else:
            mean[name] = tensor.clone()
