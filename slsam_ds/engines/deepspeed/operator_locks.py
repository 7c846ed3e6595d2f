"""Locks that killed runs leave behind, for which the next run would wait without end and without a word.

DeepSpeed's operators are built, and each time loaded, by torch under a file named `lock`, which whoever is killed then
leaves (FileBaton in torch/utils/file_baton.py, torch 2.13).
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger(__name__)


def operators_folder() -> Path:
    """Where torch builds operators."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def abandoned_locks() -> list[Path]:
    """Those that no process of this machine holds open; one of another machine may, if the folder is shared."""
    root = operators_folder()
    locks = {lock.resolve() for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)}
    held = set(_open_files()) if locks else set()
    # Looked for once more: it may have been given back while all those files were listed.
    return sorted(lock for lock in locks if str(lock) not in held and lock.exists())


def warn_of_abandoned_locks() -> None:
    """To be called before DeepSpeed loads an operator."""
    for lock in abandoned_locks():
        logger.warning(
            "%s: no process on this machine holds this lock; a run that was killed may have left it, and DeepSpeed "
            "would wait for it forever: if no other machine is building there, remove it",
            lock,
        )


def _open_files() -> Iterator[str]:
    """Of all processes that may be looked at; none where there is no /proc."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            yield os.readlink(descriptor)
