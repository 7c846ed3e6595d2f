"""Published and own methods as settings under one name: the values of a block's key `preset`.

A new recipe is an entry in `RECIPES`. It says what it computes, where that comes from, and what of the source was read:
a method whose text or code was not read is offered under the name of its formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["PRESETS", "RECIPES", "Recipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A method.

    Attributes:
        knobs: What it sets; a knob given beside it wins.
        formula: What a step computes. g is the gradient at the weights, h the one at the perturbed weights, P who is
            perturbed and U who is updated.
        source: Who published it.
        read: What of the source was read.
        training: Settings of the trainer that belong to it; nothing here sets them.
    """

    knobs: Mapping[str, Any]
    formula: str
    source: str
    read: Literal["code", "abstract", "formula alone", "own"]
    training: Mapping[str, Any] = field(default_factory=dict)


_PLAIN: Mapping[str, Any] = {
    "perturb": "sample",
    "update": "sample",
    "ascent_source": "current",
    "ascend_when": "always",
    "metric": "euclidean",
    "mask": None,
    "descend_along": "perturbed",
}
"""SAM as published, of whatever is sampled."""
_WHOLE_ASCENT: Mapping[str, Any] = {"ascent_fraction": 1.0, "ascent_scope": "global"}
"""Also what a single pass, which has no ascent to shorten, asks for."""
_PAPER: Mapping[str, Any] = {
    **_PLAIN,
    **_WHOLE_ASCENT,
    "granularity": "tensor",
    "selector": "bernoulli",
    "active_layers": 0.2,
    "rho": 0.01,
    "update_scale": "none",
    "other_parameters": "arms",
}
_OF_PAPER = "every tensor by itself with probability p_i; eps = rho g / ||g||; P = U; p by AdamBS on the norms of g"
_PAPER_SOURCE = "SL-SAM, arXiv 2602.09395"
_DENSE: Mapping[str, Any] = {**_PLAIN, "selector": "all", "granularity": "block"}
_CORRECTED: Mapping[str, Any] = {
    **_DENSE,
    "ascent_scope": "global",
    "ascent_fraction": 0.25,
    "descend_along": {"corrected": 1.0},
    "rho": 0.025,
}
"""Of all layers, by what SAM changes on a quarter of the window."""

RECIPES: Mapping[str, Recipe] = {
    "single_pass": Recipe(
        knobs={**_WHOLE_ASCENT, "active_layers": 0.5, "ascent_source": "previous"},
        formula="half of the layers; eps along the gradient that each last descended along; one pass",
        source="ours; compare single-step SAM",
        read="own",
    ),
    "adamw_price": Recipe(
        knobs={"budget": 1.0, "selector": "exp3m", "ascent_source": "current", "ascent_fraction": 0.25},
        formula="layers drawn so that a step costs what AdamW's does; g on a quarter of the window",
        source="ours",
        read="own",
    ),
    "depth_price": Recipe(
        knobs={"budget": 1.0, "selector": "depth", "ascent_source": "current", "ascent_fraction": 0.25},
        formula="a lowest layer drawn, it and all above take part, at AdamW's price on average; g on a quarter",
        source="ours",
        read="own",
    ),
    "one_sample": Recipe(
        knobs={**_CORRECTED, "ascent_fraction": 0.01, "rho": 0.0125},
        formula="U = all; g + h' - g': what SAM changes on one sample of each rank, or on 1 % of its samples",
        source="ours; its price is 1 + 2/n for n samples of a rank and step",
        read="own",
    ),
    "corrected": Recipe(
        knobs=_CORRECTED,
        formula="U = all; g + h' - g': what SAM changes on a quarter of the window",
        source="ours; its price is 1.25 where a quarter is whole micro-batches, else 1.5",
        read="own",
    ),
    "corrected_rarely": Recipe(
        knobs={**_CORRECTED, "ascend_when": {"every": 5}, "descend_along": {"corrected": 5.0}},
        formula="U = all; g; in every fifth step g + 5 (h' - g'): five times SAM's change, on a quarter of the window",
        source="ours, for few samples: elsewhere it can be worse than AdamW; its price is 1.05 where a quarter is "
        "whole micro-batches, else 1.1; compare LookSAM",
        read="own",
    ),
    "memory": Recipe(
        knobs={
            "selector": "uniform",
            "active_layers": 0.2,
            "ascent_source": "current",
            "ascent_fraction": 0.25,
            "offload_state": True,
        },
        formula="a fifth of the layers, drawn uniformly; g on a quarter; the state of the others waits on the host",
        source="ours; compare LISA, Pan et al. 2024",
        read="own",
    ),
    "paper": Recipe(knobs=_PAPER, formula=_OF_PAPER, source=_PAPER_SOURCE, read="code"),
    "paper_vision": Recipe(
        knobs={**_PAPER, "active_layers": 0.5},
        formula=_OF_PAPER,
        source=f"{_PAPER_SOURCE}: DeiT-small on CIFAR",
        read="code",
        training={
            "learning_rate": 1e-4,
            "weight_decay": 5e-5,
            "per_device_train_batch_size": 128,
            "num_train_epochs": 20,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        },
    ),
    "paper_encoder": Recipe(
        knobs=_PAPER,
        formula=_OF_PAPER,
        source=f"{_PAPER_SOURCE}: RoBERTa on GLUE",
        read="code",
        training={
            "learning_rate": 1e-5,
            "weight_decay": 0.01,
            "per_device_train_batch_size": 16,
            "num_train_epochs": 30,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0,
        },
    ),
    "paper_llm": Recipe(
        knobs=_PAPER,
        formula=_OF_PAPER,
        source=f"{_PAPER_SOURCE}: Llama-3.2-3B-Instruct on Open-Platypus",
        read="code",
        training={
            "learning_rate": 1e-5,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1,
            "lr_scheduler_type": "constant",
            "bf16": True,
        },
    ),
    "sam": Recipe(
        knobs=_DENSE,
        formula="P = U = all; eps = rho g / ||g||; descend along h",
        source="SAM, Foret et al. 2021",
        read="code",
    ),
    "asam": Recipe(
        knobs={**_DENSE, "metric": "adaptive", "rho": 0.5},
        formula="P = U = all; eps = rho w^2 g / || |w| g ||",
        source="ASAM, Kwon et al. 2021",
        read="code",
    ),
    "sam_on": Recipe(
        knobs={**_DENSE, "granularity": "tensor", "perturb": "norm_layers"},
        formula="P = weights of normalisation layers, U = all",
        source="SAM-ON, Mueller et al. 2023",
        read="code",
    ),
    "ssam_f": Recipe(
        knobs={**_DENSE, "ascent_scope": "global", "mask": "fisher", "mask_density": 0.5, "mask_every": 100},
        formula="P = U = all; eps = rho m g / ||g||; m = 1 where g^2 was in the upper half, found every 100 steps",
        source="SSAM-F, Mi et al. 2022, arXiv 2306.17504",
        read="code",
    ),
    "ssam_d": Recipe(
        knobs={**_DENSE, "ascent_scope": "global", "mask": "dynamic", "mask_density": 0.5, "mask_every": 100},
        formula="as ssam_f; m a random half; every 100 steps a share with the least |g|, 1/2 down to 0, is redrawn",
        source="SSAM-D, Mi et al. 2022, arXiv 2306.17504",
        read="code",
    ),
    "friendly_sam": Recipe(
        knobs={**_DENSE, "ascent_source": "friendly"},
        formula="P = U = all; eps along g - m; m <- 0.9 m + 0.1 g",
        source="F-SAM, Li et al. 2024",
        read="code",
    ),
    "momentum_sam": Recipe(
        knobs={**_DENSE, **_WHOLE_ASCENT, "ascent_source": "momentum"},
        formula="P = U = all; eps along the optimizer's first moment; one pass",
        source="Momentum-SAM, Becker et al. 2024",
        read="code",
    ),
    "previous_gradient": Recipe(
        knobs={**_DENSE, **_WHOLE_ASCENT, "ascent_source": "previous"},
        formula="P = U = all; eps along the gradient of the step before; one pass",
        source="its formula; compare single-step and asynchronous SAM",
        read="formula alone",
    ),
    "stable_sam": Recipe(
        knobs={**_DENSE, "descend_along": "renormalised", "ascent_scope": "global"},
        formula="P = U = all; descend along h ||g|| / ||h||",
        source="StableSAM, Tan et al. 2024",
        read="code",
    ),
    "gradient_norm_penalty": Recipe(
        knobs={**_DENSE, "descend_along": {"mixed": 0.8}, "ascent_scope": "global"},
        formula="P = U = all; descend along 0.2 g + 0.8 h",
        source="its formula; compare Zhao et al. 2022",
        read="formula alone",
    ),
    "layerwise_penalty": Recipe(
        knobs={**_DENSE, "selector": "top_k", "update": "all", "active_layers": 0.2},
        formula="P = the fifth of the layers with the largest ||h||, U = all",
        source="its formula; compare Lee 2024, arXiv 2503.14205",
        read="abstract",
    ),
    "late": Recipe(
        knobs={**_DENSE, "ascend_when": {"last": 0.3}},
        formula="SAM in the last 30 % of the steps, the base optimizer before",
        source="its formula; compare arXiv 2410.10373",
        read="formula alone",
    ),
    "every_fifth": Recipe(
        knobs={**_DENSE, "ascend_when": {"every": 5}},
        formula="SAM in every fifth step, the base optimizer in the others",
        source="its formula; compare LookSAM, Liu et al. 2022, which also reuses a part of the gradient",
        read="formula alone",
    ),
    "rst": Recipe(
        knobs={**_DENSE, "ascend_when": {"probability": 0.5}},
        formula="SAM in every second step, drawn at random; the base optimizer in the others",
        source="RST (SS-SAM), Zhao et al. 2022, as the authors of SL-SAM wrote it",
        read="code",
    ),
    "when_steep": Recipe(
        knobs={**_DENSE, "ascend_when": {"norm_above": 0.0}},
        formula="SAM after steps with ||g||^2 above its running mean, the base optimizer after others",
        source="its formula; compare AE-SAM, Jiang et al. 2023, where the same step's gradient decides",
        read="formula alone",
    ),
    "tensors_at_random": Recipe(
        knobs={
            **_DENSE,
            "granularity": "tensor",
            "selector": "uniform",
            "active_layers": 0.6,
            "update": "all",
            "rho": 0.08,
        },
        formula="P = 60 % of the tensors, drawn uniformly, U = all; rho larger by 1 / 0.6",
        source="ESAM, Du et al. 2022, without its selection of samples",
        read="code",
    ),
    "by_layer": Recipe(
        knobs={**_DENSE, "metric": "by_layer", "rho": 0.0001},
        formula="P = U = all; in each layer eps = rho ||w|| g / ||g||",
        source="its formula; compare mu-P2, Haas et al. 2024",
        read="formula alone",
    ),
    "adam_geometry": Recipe(
        knobs={**_DENSE, "metric": "preconditioned", "rho": 0.001},
        formula="P = U = all; eps = rho g / D / ||g / D^(1/2)||, D = sqrt(v) + 1e-8 of Adam",
        source="ours; compare LightSAM",
        read="formula alone",
    ),
    "random_direction": Recipe(
        knobs={**_DENSE, **_WHOLE_ASCENT, "ascent_source": "random"},
        formula="P = U = all; eps = rho z / ||z|| with standard normal z; one pass",
        source="its formula; compare random weight perturbation, Li et al. 2022",
        read="formula alone",
    ),
    "layers_at_random": Recipe(
        knobs={"selector": "uniform", "rho": 0.0},
        formula="U = a fifth of the layers, drawn uniformly; no perturbation",
        source="its formula; compare LISA, Pan et al. 2024",
        read="formula alone",
    ),
}
"""All recipes, by name."""

PRESETS: Mapping[str, Mapping[str, Any]] = {name: recipe.knobs for name, recipe in RECIPES.items()}
"""Settings under one name, for a block's key `preset`: knobs given beside it win."""
