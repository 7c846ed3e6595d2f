"""SL-SAM's part of a checkpoint: what it holds, and whether a run may resume from it.

It is written last and lists the checkpoint's other files, so what it is missing from was never finished.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from slsam_ds.config import SLSAMConfig
from slsam_ds.model.layers import LayerMap
from slsam_ds.selectors import make_selector
from slsam_ds.state.replacing import replace_text

STATE_FILE = "slsam_state.json"
STATE_VERSION = 3
SPLIT_VERSION = 2
"""With this one, the optimizer's file beside the state had a group for each layer, and did not say what was given."""


def write_state(
    checkpoint: str | Path, state: Mapping[str, Any], setup: Mapping[str, Any], *, unfinished: str = ""
) -> None:
    """Write SL-SAM's state, and what the checkpoint's other files are and depend on.

    Args:
        checkpoint: The folder.
        state: Of `SLSAM.state_dict`.
        setup: Settings that the other files only fit when they are the same, as JSON has them.
        unfinished: Names of files that other ranks may be writing still, as for `fnmatch`; of all others the size is
            noted.
    """
    folder = Path(checkpoint)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != STATE_FILE and not fnmatch(path.name, unfinished)
    }
    content = {**state, "setup": dict(setup), "files": files}
    replace_text(folder / STATE_FILE, json.dumps({**content, "checksum": _checksum(content)}))


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        ValueError: There is none, or it is not what was written.
    """
    path = Path(checkpoint, STATE_FILE)
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: no readable slsam state ({error}): resume from a checkpoint that slsam_ds saved completely"
        ) from None
    if not isinstance(state, dict) or state.pop("checksum", None) != _checksum(state):
        raise ValueError(
            f"{path}: is damaged, or was saved before slsam_ds wrote checksums: resume from another checkpoint"
        )
    return state


def check_state(checkpoint: str | Path, layer_map: LayerMap, config: SLSAMConfig, setup: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a run cannot resume from: it asks before anybody loads gigabytes into other shapes.

    Args:
        checkpoint: The folder.
        layer_map: The run's arms.
        config: The run's knobs.
        setup: What the checkpoint's other files depend on, as `write_state` was told.

    Raises:
        ValueError: A file is torn or missing, or it was saved with another model, another setup, or knobs that its
            state does not fit.
    """
    state = read_state(checkpoint)
    try:
        check_layers(state, layer_map)
        for name, here in setup.items():
            saved = state["setup"].get(name, here)
            if saved != here:
                raise ValueError(f"was saved with {name}={saved}, this run has {here}: resume with {saved}")
        selector = make_selector(config, len(layer_map), total_steps=1)  # any number of steps will do
        with naming_settings(state, config):
            selector.load_state_dict(state["selector"])
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    _check_files(Path(checkpoint), state["files"])


def check_layers(state: Mapping[str, Any], layer_map: LayerMap) -> None:
    """Refuse the state of other layers, or one that another slsam_ds has saved.

    Raises:
        ValueError: Saying what differs.
    """
    if state.get("version") not in (SPLIT_VERSION, STATE_VERSION):
        raise ValueError(
            f"has slsam state version {state.get('version')!r}, but this slsam_ds reads {SPLIT_VERSION} and "
            f"{STATE_VERSION}: resume with the slsam_ds that saved it"
        )
    if state["layers"] == layer_map.fingerprint():
        return
    saved, here = state["arms"], layer_map.outline()
    differences = (
        f"layer {index} is {old} with {old_numel:,} weights, this run's is {new} with {new_numel:,}"
        for index, ((old, old_numel), (new, new_numel)) in enumerate(zip(saved, here, strict=False))
        if (old, old_numel) != (new, new_numel)
    )
    if len(saved) != len(here):
        difference = f"it has {len(saved)} layers, this run {len(here)}"
    else:
        difference = next(differences, "its layers have parameters of other names")
    raise ValueError(
        f"was saved for other layers (another model, other trainable parameters, or another `layers` or "
        f"`other_parameters` setting): {difference}; resume with the setup of the saved run"
    )


def settings_that_differ(state: Mapping[str, Any], config: SLSAMConfig) -> str:
    """The knobs of the run that saved the state, and this run's, where they differ; empty where none do."""
    here = config.to_dict()
    return ", ".join(
        f"{name}={json.dumps(value)} (this run: {json.dumps(here[name])})"
        for name, value in state.get("settings", {}).items()
        if name in here and here[name] != value
    )


@contextlib.contextmanager
def naming_settings(state: Mapping[str, Any], config: SLSAMConfig) -> Iterator[None]:
    """Within, a state that does not fit the knobs is refused by the names of those that differ."""
    try:
        yield
    except ValueError as error:
        differences = settings_that_differ(state, config)
        if not differences:  # or nobody knows: a state of 0.1.0 does not have them
            raise
        raise ValueError(
            f"was saved with slsam settings that do not fit this run's: {differences}; "
            "resume with the settings of the saved run"
        ) from error


def check_files(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that was not finished, or of which a file is missing or torn.

    Raises:
        ValueError: Naming the file.
    """
    _check_files(Path(checkpoint), read_state(checkpoint)["files"])


def _check_files(folder: Path, files: Mapping[str, int]) -> None:
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            has = "is missing" if found is None else f"has {found:,} of {size:,} bytes"
            raise ValueError(f"{folder}: {name} {has}: resume from another checkpoint")


def check_contents(checkpoint: str | Path, *, rank: int, num_ranks: int) -> None:
    """Refuse damaged files, where they hold checksums (torch's do). Each rank reads its share of them, once.

    Raises:
        ValueError: Naming one.
    """
    for name in sorted(read_state(checkpoint)["files"])[rank::num_ranks]:
        path = Path(checkpoint, name)
        try:
            damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is not None
        except (OSError, zipfile.BadZipFile):
            damaged = True
        if damaged:
            raise ValueError(f"{checkpoint}: {name} is damaged: resume from another checkpoint")
