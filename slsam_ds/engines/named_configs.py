"""The configurations that come with the package, by name: `zero2` for `slsam_ds/ds_configs/zero2.json`.

The folder is a link to the repository's `ds_configs`; a wheel holds the files themselves.
"""

from pathlib import Path
from typing import Literal

_FOLDER = Path(__file__).parents[1] / "ds_configs"

Kind = Literal["zero", "fsdp"]
"""Whose configuration: DeepSpeed's, or that of `--fsdp_config`."""


def named_configs(kind: Kind) -> dict[str, Path]:
    """The files by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob(f"{kind}*.json"))}


def find_config(name: str | Path, kind: Kind) -> str | Path:
    """The package's own file where its name was given, and no file is called so; else what was given."""
    ours = named_configs(kind).get(str(name))
    return name if ours is None or Path(name).is_file() else ours
