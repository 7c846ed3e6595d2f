"""Trainers become SL-SAM's where nobody changes their code: in a script as it is, or in a framework that makes them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer

from slsam_ds.config import SLSAMConfig
from slsam_ds.integrations.huggingface import SLSAMMixin

Choose = Callable[[Mapping[str, Any] | None], SLSAMConfig]
"""The knobs, of the `slsam` block of the trainer's DeepSpeed JSON; None: there is none."""


class ConvertedTrainer(SLSAMMixin):
    """What stands before the class of a trainer that was made without a word of SL-SAM; see `converted`.

    Raises:
        ValueError: Bad knobs, or an engine or trainer that is not supported.
    """

    num_trained = 0
    """How many times a trainer of this class was trained."""

    _choose: Choose
    _original: type[Trainer]

    def _choose_knobs(self, given: Any, block: Mapping[str, Any] | None) -> SLSAMConfig:
        return type(self)._choose(block)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own.

        Raises:
            ValueError: A checkpoint that does not fit.
            RuntimeError: SL-SAM has not stepped: the trainer has a loop of its own.
        """
        output = super().train(*args, **kwargs)
        if self.state.global_step > 0 and (self.slsam is None or self.slsam.num_steps == 0):
            name = type(self).__name__
            raise RuntimeError(f"{name}: trained in a loop of its own, without SL-SAM; use slsam_ds.SLSAM in that loop")
        type(self).num_trained += 1
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the original class, which is the one to be found by its name; made anew, it is converted anew."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _make_anew, (self._original,), *state


@functools.cache
def converted(trainer_class: type[Trainer], choose: Choose) -> type[Trainer]:
    """The class with `SLSAMMixin` before it, as one would write it, and of the same name.

    Args:
        trainer_class: `Trainer` or derived from it. What was converted is returned as it is.
        choose: Its knobs.

    Raises:
        ValueError: It is an SL-SAM trainer by itself, with knobs of its own.
    """
    if issubclass(trainer_class, ConvertedTrainer):
        return trainer_class
    if issubclass(trainer_class, SLSAMMixin):
        raise ValueError(f"{trainer_class.__name__}: is an SL-SAM trainer already; pass its settings as slsam=...")
    same = {name: getattr(trainer_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"_choose": staticmethod(choose), "_original": trainer_class}
    return type(trainer_class.__name__, (ConvertedTrainer, trainer_class), same | own)


def _make_anew(trainer_class: Any) -> Trainer:
    """For `pickle` and `copy`: an instance without attributes, which they set."""
    made: Trainer = trainer_class.__new__(trainer_class)
    return made
