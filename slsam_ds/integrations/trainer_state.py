"""SL-SAM's part of a Trainer checkpoint: what it holds, and whether a run may resume from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slsam_ds.bandit import make_selector
from slsam_ds.config import SLSAMConfig
from slsam_ds.layers import LayerMap

STATE_FILE = "slsam_state.json"


def write_state(checkpoint: str | Path, state: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
    """Write SL-SAM's state, and what the checkpoint's other files depend on."""
    Path(checkpoint, STATE_FILE).write_text(json.dumps({**state, "setup": dict(setup)}), encoding="utf-8")


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        ValueError: There is none, or it is not readable.
    """
    path = Path(checkpoint, STATE_FILE)
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: no readable slsam state ({error}); was this checkpoint saved by SLSAMTrainer?"
        ) from None
    return state


def check_state(checkpoint: str | Path, layer_map: LayerMap, config: SLSAMConfig, setup: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a run cannot resume from: it asks before anybody loads gigabytes into other shapes.

    Args:
        checkpoint: The folder.
        layer_map: The run's arms.
        config: The run's knobs.
        setup: What the checkpoint's other files depend on, as `write_state` was told.

    Raises:
        ValueError: It was saved with another model, another setup, or knobs that its state does not fit.
    """
    state = read_state(checkpoint)
    if state.get("layers") != layer_map.fingerprint():
        raise ValueError(
            f"{checkpoint}: was saved for other layers (another model, other trainable parameters, or another `layers` "
            "or `other_parameters` setting): resume with the setup of the saved run"
        )
    for name, here in setup.items():
        saved = state.get("setup", {}).get(name, here)
        if saved != here:
            raise ValueError(f"{checkpoint}: was saved with {name}={saved}, this run has {here}: resume with {saved}")
    selector = make_selector(config, len(layer_map), total_steps=1)  # any number of steps will do
    try:
        selector.load_state_dict(state["selector"])
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
