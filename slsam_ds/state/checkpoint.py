"""Checkpoints of a model and its torch optimizer with SL-SAM's state; DeepSpeed has checkpoints of its own."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slsam_ds.config import SLSAMConfig
from slsam_ds.model.layers import LayerMap
from slsam_ds.protocol import Engine
from slsam_ds.rng import RandomState, reseed
from slsam_ds.state.files import check_state, read_state, write_state

logger = logging.getLogger(__name__)

_UNFINISHED, _REPLACED = ".unfinished", ".replaced"


class TorchCheckpoint:
    """Saves and loads weights, optimizer state, SL-SAM's state and each rank's random state, in one folder.

    Args:
        engine: Knows the ranks.
        model: Plain or sharded by FSDP2.
        optimizer: Its torch optimizer.
        kept: What the optimizer's state holds besides its own: see `Direction.kept`.
        unpack: Called to put what waits elsewhere into the optimizer's state.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        kept: Mapping[str, torch.dtype],
        unpack: Callable[[], None],
    ) -> None:
        self._engine, self._model, self._optimizer = engine, model, optimizer
        self._kept, self._unpack = kept, unpack

    def save(self, folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
        """Called by every rank.

        Args:
            folder: On a disk that all ranks share. A checkpoint that is there is replaced when this one is whole.
            state: SL-SAM's.

        Raises:
            ValueError: The disk is full or cannot be written; what was there still is.
        """
        from slsam_ds.engines.torch_checkpoint import save

        path, ranks = Path(folder), self._engine.ranks
        # Beside the folder until it is whole: a checkpoint that is there already is lost only to a better one.
        unfinished, replaced = (path.with_name(path.name + suffix) for suffix in (_UNFINISHED, _REPLACED))
        if ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        ranks.check_together(lambda: None)
        unfinished.mkdir(parents=True, exist_ok=True)
        save_random_state(self._engine, unfinished)
        self.complete_optimizer_state()
        save(unfinished, self._model, self._optimizer)

        def finish() -> None:
            if ranks.rank == 0:  # `save` has waited for all ranks
                write_state(unfinished, state, {})
                shutil.rmtree(replaced, ignore_errors=True)
                if path.exists():
                    path.rename(replaced)
                unfinished.rename(path)
                shutil.rmtree(replaced, ignore_errors=True)

        ranks.check_together(finish)

    def load(self, folder: str | os.PathLike[str], layers: LayerMap, config: SLSAMConfig) -> dict[str, Any]:
        """What `save` wrote, by any number of ranks. Called by every rank.

        Args:
            folder: The checkpoint's.
            layers: The run's arms.
            config: The run's knobs.

        Returns:
            SL-SAM's state.

        Raises:
            ValueError: The checkpoint is not whole, or that of another setup; nothing was changed.
        """
        from slsam_ds.engines.torch_checkpoint import load

        path = Path(folder)
        replaced = path.with_name(path.name + _REPLACED)
        if not path.exists() and replaced.exists():  # the run was killed between the two renames of `save`
            path = replaced
        self._engine.ranks.check_together(lambda: check_state(path, layers, config, {}))
        self.complete_optimizer_state()
        load(path, self._model, self._optimizer)
        state = read_state(path)
        load_random_state(self._engine, path, seed=config.seed, step=state["step"])
        return state

    def complete_optimizer_state(self) -> None:
        """Give the optimizer state of every layer, as its first step would begin with.

        `torch.distributed.checkpoint` saves and loads the state of all parameters or of none.
        """
        from slsam_ds.engines.torch_checkpoint import complete_state

        complete_state(self._optimizer, also=self._kept, home=self._engine.optimizer_state_home)
        self._unpack()


def save_random_state(engine: Engine, folder: Path) -> None:
    """Write this rank's random state into the folder of a checkpoint."""
    RandomState.capture(engine.device).save(folder, engine.ranks.rank)


def load_random_state(engine: Engine, folder: Path, *, seed: int, step: int) -> None:
    """Go on with this rank's random numbers; begin new ones where other ranks saved the checkpoint.

    They are those of dropout. The samples of layers depend on the seed and the step alone.

    Args:
        engine: Knows the ranks.
        folder: The checkpoint's.
        seed: Of the new ones.
        step: Likewise.
    """
    ranks = engine.ranks
    saved = RandomState.saved(folder, ranks.rank, ranks.world_size, engine.device)
    if saved is not None:
        saved.replay()
    else:
        logger.warning("%s: was saved by another number of ranks: dropout continues with new random numbers", folder)
        reseed(seed, step, ranks.rank)
