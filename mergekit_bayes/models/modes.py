"""Run a model in another mode for a while, and leave it as it was."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch.nn import Module


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


@contextmanager
def differentiable(model: Module, chosen: Collection[int]) -> Iterator[None]:
    """Let exactly these parameters, by id, require gradients: an adapter's base is frozen."""
    before = {p: p.requires_grad for p in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
