"""Models that the user has given to `torch.compile`.

A compiled graph is made for one choice of trainable parameters. One of several layers would be made anew, or given up,
as the sample of layers changes from step to step; one of a single block is needed in a few versions only.
"""

from collections.abc import Iterable, Sequence

from torch import nn


def check_not_compiled(model: nn.Module, layers: Sequence[Iterable[nn.Parameter]]) -> None:
    """Refuse a model of which several layers are compiled together.

    Args:
        model: The model.
        layers: The parameters of each.

    Raises:
        ValueError: Saying what to compile instead.
    """
    compiled = [module for module in model.modules() if is_compiled(module)]
    for held in ({id(parameter) for parameter in module.parameters()} for module in compiled):
        if sum(any(id(parameter) in held for parameter in layer) for layer in layers) > 1:
            raise whole_graph("torch.compile around the model")


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` has made it, or `module.compile()` was called."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def whole_graph(what: str) -> ValueError:
    """What to say of a graph of several layers."""
    return ValueError(
        f"{what}: a graph of several layers fits one sample of them; leave it out, and give each block a graph of its "
        "own, block.forward = torch.compile(block.forward), but not under ZeRO-3"
    )
