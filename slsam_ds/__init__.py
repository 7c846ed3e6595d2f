"""Sparse-Layer Sharpness-Aware Minimization for LLM fine-tuning under DeepSpeed ZeRO."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from slsam_ds.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Import the public names, and with them the modules that they need, when one is first asked for.

        They import torch, which takes seconds: `slsam --help` need not wait for it, and `slsam doctor` has something
        to say where it is missing.
        """
        public = importlib.import_module("slsam_ds.public")
        for home in (vars(public), globals()):  # the second has the modules, like `slsam_ds.bandit`
            if name in home:
                return home[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *importlib.import_module("slsam_ds.public").__all__})
