"""What every direction has."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from slsam_ds.gradient import Gradient
from slsam_ds.protocol import Engine, Piece


class Direction:
    """Says along what the perturbed arms climb. Prices, memory estimates and checkpoints ask its class what it needs.

    Args:
        engine: Where the weights and the optimizer's state are.

    Attributes:
        for_all_ranks: Whether it is one direction for all ranks, so that an ascent of each rank by itself has no place.
        needs_pass: Whether a forward and backward at the weights come first, whose gradient `climb` is given.
        is_gradient: Whether what it climbs along is made of the gradient of one window, so that its squares say on
            which elements the loss depends most.
        kept: What the direction remembers between steps, of the size of the weights: key and dtype. It lies in the
            optimizer's state under that key, beside the moments, so that whatever saves, loads, reshards or offloads
            those takes it along.
    """

    for_all_ranks: ClassVar[bool] = False
    needs_pass: ClassVar[bool] = False
    is_gradient: ClassVar[bool] = False
    kept: ClassVar[Mapping[str, torch.dtype]] = {}

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def climb(self, arms: tuple[int, ...], ascent: Gradient | None, *, seed: int) -> Gradient | None:
        """What these arms climb along; None where there is nothing yet: the step is then taken unperturbed.

        Every rank calls it with the same arms; it may reduce a few numbers over ranks.

        Args:
            arms: The perturbed arms, ascending.
            ascent: Their gradient at the weights, with `needs_pass`; else None.
            seed: Of what is drawn in this step; the same on every rank.
        """
        raise NotImplementedError

    def observe(self, descent: Gradient, sq_norms: Mapping[int, float]) -> None:
        """See the gradient that the optimizer is about to be given. Called in steps whose numbers are all finite.

        Args:
            descent: Of the updated arms.
            sq_norms: Its squared norm by arm, over all ranks, not scaled.
        """

    def start(self) -> None:
        """A step begins: what an earlier one, which was skipped or raised, has left pending is dropped."""

    def keep(self, *, ascent_is_finite: bool) -> None:
        """The optimizer has stepped: what `climb` and `observe` saw counts from here on.

        Args:
            ascent_is_finite: So were the numbers of the ascent. A step is taken without, where its part of the window
                has no labels.
        """

    def claims(self) -> Any:
        """What of its state the ranks must agree on; anything with a `repr`."""
        return ()

    def state_dict(self) -> dict[str, float] | None:
        """What a checkpoint holds besides `kept`, as JSON-serialisable values."""
        return None

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        """Continue from `state_dict`."""

    def forget_lost(self, pieces: Iterable[Piece]) -> None:
        """After a resume: drop what did not come along with the optimizer's state.

        Args:
            pieces: All of the model's.
        """
