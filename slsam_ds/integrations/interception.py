"""Every Trainer that is made in this process becomes an SL-SAM one, whoever makes it.

Imports nothing of transformers before others do: it reads the environment when it is imported, and many a script sets
`HF_HOME` in its first lines.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from slsam_ds.config import SLSAMConfig


def convert_trainers(choose: Callable[[Mapping[str, Any] | None], SLSAMConfig]) -> list[Any]:
    """Make SL-SAM trainers of all that are made in this process from now on.

    A class becomes the one that somebody would derive with `SLSAMMixin`, at the one place where all instances are made:
    `Trainer.__new__`. Classes that are defined, asked for their names or checked with `issubclass` stay as they are.

    Returns:
        The converted classes of what was made; grows as more are.
    """
    made: list[Any] = []

    def new(trainer_class: type, *args: Any, **kwargs: Any) -> Any:
        from slsam_ds.integrations.conversion import converted

        made.append(converted(trainer_class, choose))
        return object.__new__(made[-1])

    def install(trainer: ModuleType) -> None:
        trainer.Trainer.__new__ = staticmethod(new)

    _when_imported("transformers.trainer", install)
    return made


def _when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with a module as soon as it has been imported, now or later."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _ImportWatch(name, then))


class _ImportWatch(MetaPathFinder):
    """Waits for one module, which others find."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """Nothing of its own; the others' answer for the module, with `then` behind its execution."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
