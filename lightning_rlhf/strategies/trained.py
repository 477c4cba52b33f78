"""What each optimizer of a LightningModule trains."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

#: A child of a LightningModule, a layer of a child, or a parameter.
Part = nn.Module | nn.Parameter


def find_trained(module: LightningModule, optimizers: list[Optimizer]) -> list[dict[str, Part]]:
    """Finds the parts of a module that each optimizer trains.

    These are the module's children, if no other optimizer trains a parameter of the child; otherwise the child's own
    children, and so on. Parameters that the module holds itself are parts too. A part that an optimizer trains may have
    frozen parameters.

    Args:
        module: The LightningModule.
        optimizers: Its optimizers.

    Returns:
        Parts by their paths in the module, in the order of the optimizers.

    Raises:
        ValueError: Two optimizers train one parameter, an optimizer trains nothing, or something outside the module.
    """
    name, names = type(module).__name__, {id(p): path for path, p in module.named_parameters()}
    owners: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for p in trained:
            if id(p) not in names:
                raise ValueError(
                    f"Optimizer {number} of {name} has a parameter of shape {tuple(p.shape)} that {name} does not "
                    "hold. Make it an attribute of the module, as nn.Parameter or in a child."
                )
            if owners.setdefault(id(p), number) != number:
                raise ValueError(
                    f"Two optimizers of {name} train {names[id(p)]}, which ColossalAI does not support. Use one "
                    "optimizer with two parameter groups, or ddp."
                )
        if not any(p.requires_grad for p in trained):
            raise ValueError(f"Optimizer {number} of {name} trains nothing: all its parameters are frozen.")
    found: list[dict[str, Part]] = [{} for _ in optimizers]
    for path, part in _parts(module, "", owners):
        parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
        owner = next((owners[id(p)] for p in parameters if id(p) in owners), None)
        if owner is not None:
            found[owner][path] = part
    return found


def _parts(module: nn.Module, prefix: str, owners: dict[int, int]) -> Iterator[tuple[str, Part]]:
    """Yields children and parameters of a module, and those of children that several optimizers train."""
    yield from ((f"{prefix}{name}", p) for name, p in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        several = len({owners[id(p)] for p in child.parameters() if id(p) in owners}) > 1
        if several or isinstance(child, (nn.ModuleDict, nn.ModuleList)):
            yield from _parts(child, f"{prefix}{name}.", owners)
        else:
            yield f"{prefix}{name}", child
