"""What of SL-SAM outlives a process: its state, and checkpoints of what a torch optimizer steps."""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slsam_ds.config import SLSAMConfig
from slsam_ds.directions.previous import PreviousGradients, kept_in_optimizer
from slsam_ds.model.layers import LayerMap
from slsam_ds.pricing.cost import CostModel, Passes
from slsam_ds.protocol import ALWAYS, Engine
from slsam_ds.rewards import RewardScale
from slsam_ds.rng import RandomState, reseed
from slsam_ds.state.files import STATE_VERSION, check_layers, check_state, read_state, write_state

logger = logging.getLogger(__name__)

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"


class Resumable:
    """The part of `SLSAM` that saves and loads. Its attributes are `SLSAM`'s."""

    model: nn.Module
    config: SLSAMConfig
    layers: LayerMap
    engine: Engine
    selector: Any
    num_steps: int
    _fingerprint: str
    _optimizer: torch.optim.Optimizer | None
    _optimizer_is_checked: bool
    _num_updates: list[int]
    _num_skipped: int
    _rewards: RewardScale
    _previous: PreviousGradients | None
    _costs: CostModel | None
    _passes: Passes | None
    _chooses_by_cost: bool

    def _use_costs(self, costs: CostModel, passes: Passes) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """SL-SAM's own state as JSON-serialisable values; the same on every rank.

        Model, optimizer and scheduler are saved by whoever owns them. With `ascent_source="previous"` the optimizer's
        state holds the gradients to climb along.
        """
        return {
            "version": STATE_VERSION,
            "step": self.num_steps,
            "skipped_in_a_row": self._num_skipped,
            "layers": self._fingerprint,
            "arms": self.layers.outline(),
            "updates": list(self._num_updates),
            "previous": None if self._previous is None else {str(a): n for a, n in self._previous.sq_norms.items()},
            "selector": self.selector.state_dict(),
            "reward_maximum": self._rewards.maximum,
            "costs": self._costs and {"counted": asdict(self._costs), "passes": self._passes and asdict(self._passes)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: the same samples follow as in the uninterrupted run.

        Raises:
            ValueError: The state belongs to other layers, another selector or another version.
        """
        check_layers(state, self.layers)
        if self._chooses_by_cost and state.get("costs"):
            self._use_costs(CostModel.from_dict(state["costs"]["counted"]), Passes(**state["costs"]["passes"]))
        self.selector.load_state_dict(state["selector"])
        self._rewards.maximum = float(state["reward_maximum"])
        self.num_steps = int(state["step"])
        self._num_skipped = int(state["skipped_in_a_row"])
        self._num_updates = list(state["updates"])
        if self._previous is not None:
            self._previous.sq_norms = {int(arm): norm for arm, norm in (state["previous"] or {}).items()}
        self._optimizer_is_checked = False

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Save weights, optimizer, SL-SAM's and each rank's random state: all but scheduler and place in the data.

        Called by every rank. What `slsam_ds.initialize` returns saves checkpoints of its own.

        Args:
            folder: On a disk that all ranks share. A checkpoint that is there is replaced when this one is whole.

        Raises:
            ValueError: The disk is full or cannot be written; what was there still is.
        """
        from slsam_ds.engines.torch_checkpoint import save

        path, ranks = Path(folder), self.engine.ranks
        optimizer = self._torch_optimizer("save")
        # Beside the folder until it is whole: a checkpoint that is there already is lost only to a better one.
        unfinished, replaced = (path.with_name(path.name + suffix) for suffix in (_UNFINISHED, _REPLACED))
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        ranks.together(lambda: None)
        unfinished.mkdir(parents=True, exist_ok=True)
        self.save_random_state(unfinished)
        self.complete_optimizer_state()
        save(unfinished, self.model, optimizer)

        def finish() -> None:
            if ranks.rank == 0:  # `save` has waited for all ranks
                write_state(unfinished, self.state_dict(), {})
                shutil.rmtree(replaced, ignore_errors=True)
                if path.exists():
                    path.rename(replaced)
                unfinished.rename(path)
                shutil.rmtree(replaced, ignore_errors=True)

        ranks.together(finish)

    def load_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Continue from `save_checkpoint`, with any number of ranks.

        With as many as saved it, the run goes on to the last bit as if it had not stopped. Called by every rank.

        Raises:
            ValueError: The checkpoint is not whole, or that of another setup; nothing was changed.
        """
        from slsam_ds.engines.torch_checkpoint import load

        path, optimizer = Path(folder), self._torch_optimizer("load")
        replaced = path.with_name(path.name + _REPLACED)
        if not path.exists() and replaced.exists():  # killed in between
            path = replaced
        self.engine.ranks.together(lambda: check_state(path, self.layers, self.config, {}))
        self.complete_optimizer_state()
        load(path, self.model, optimizer)
        self.load_state_dict(read_state(path))
        self.load_random_state(path)

    def save_random_state(self, folder: Path) -> None:
        """Write this rank's random state into the folder of a checkpoint."""
        RandomState.capture(self.engine.device).save(folder, self.engine.ranks.rank)

    def load_random_state(self, folder: Path) -> None:
        """Go on with this rank's random numbers; begin new ones where other ranks saved the checkpoint.

        They are those of dropout. The samples of layers depend on step and seed alone.
        """
        ranks = self.engine.ranks
        saved = RandomState.saved(folder, ranks.rank, ranks.world_size, self.engine.device)
        if saved is not None:
            saved.replay()
        else:
            logger.warning("%s: was saved by another number of ranks: dropout goes on with new random numbers", folder)
            reseed(self.config.seed, self.num_steps, ranks.rank)

    def complete_optimizer_state(self) -> None:
        """Until the next step, give the optimizer state of every layer, as its first step would begin with.

        For `torch.distributed.checkpoint`, which saves and loads the state of all parameters or of none.
        """
        if self._optimizer is not None:
            from slsam_ds.engines.torch_checkpoint import complete_state

            complete_state(self._optimizer, also=kept_in_optimizer(self.config))
            self._optimizer_is_checked = False

    def _torch_optimizer(self, verb: str) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise ValueError(
                f"SLSAM.{verb}_checkpoint: a DeepSpeedEngine has its own; use {verb}_checkpoint of the engine that "
                "slsam_ds.initialize returned"
            )
        return self._optimizer

    def _check_optimizer(self) -> None:
        """Once after a resume, when optimizer and SL-SAM have loaded in either order: undo what loading made up.

        A layer never updated has no optimizer state. `torch.distributed.checkpoint` makes some, with a step counted
        that was never taken, and leaves it where the checkpoint has none (`allow_partial_load`).
        """
        pieces = self.engine.pieces([*range(len(self.layers)), *([ALWAYS] if self.layers.always else [])])
        for piece in pieces:
            if piece.arm != ALWAYS and self._num_updates[piece.arm] == 0:
                self.engine.optimizer_state.pop(piece.stepped, None)
        if self._previous is not None:
            self._previous.forget_lost(pieces)
        self._optimizer_is_checked = True
