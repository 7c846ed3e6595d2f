"""The plugin for axolotl: `plugins: [slsam_ds.integrations.axolotl.SLSAMPlugin]`, and the knobs under `slsam:`."""

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from slsam_ds.config import SLSAMConfig
from slsam_ds.integrations.interception import convert_trainers

_GENERATING = ("grpo", "gdpo", "ebft")
_INTERFERING = ("relora", "lisa_n_layers")
_PARALLEL = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")


class SLSAMArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    slsam: dict[str, Any] | None = None
    """SL-SAM's knobs; None: the `slsam` block of the DeepSpeed JSON, or the defaults."""


class SLSAMPlugin(BasePlugin):
    """Makes the trainer that axolotl chooses, whichever it is, an SL-SAM one.

    Not by axolotl's `get_trainer_cls`: with it axolotl gives preference trainers no model (0.19), and treats a derived
    class unlike the one it comes from.
    """

    def get_input_args(self) -> str:
        """Where axolotl finds what the plugin adds to its configuration."""
        return f"{__name__}.{SLSAMArgs.__name__}"

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Refuse, before anything is loaded, what cannot work.

        Raises:
            ValueError: Bad knobs, or settings of axolotl's that SL-SAM cannot follow.
        """
        SLSAMConfig.of(cfg.get("slsam"))
        if cfg.get("rl") in _GENERATING:
            raise ValueError(
                f"rl: {cfg['rl']}: generates its data while it steps, which two passes over the same data cannot "
                "follow; leave out SLSAMPlugin, or use dpo, ipo, kto, orpo or simpo"
            )
        for name in _INTERFERING:
            if cfg.get(name):
                raise ValueError(
                    f"{name}: {cfg[name]}: restarts or freezes what SL-SAM trains; leave out this setting or SL-SAM"
                )
        for name in _PARALLEL:
            if (cfg.get(name) or 1) > 1:
                raise ValueError(f"{name}: {cfg[name]}: not supported; slsam_ds supports data parallelism only")

    def pre_model_load(self, cfg: Mapping[str, Any]) -> None:
        """Convert whatever trainer is made from now on."""
        knobs = cfg.get("slsam")
        convert_trainers(lambda block: SLSAMConfig.of(knobs, block))
