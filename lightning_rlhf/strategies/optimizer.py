"""A boosted child's optimizer, as Lightning and its users see it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_rlhf.strategies.checkpoints import load_optimizer_state, optimizer_state
from lightning_rlhf.strategies.sharded import Boosted


class ParamGroup(MutableMapping[str, Any]):
    """A parameter group as the LightningModule sees it: the optimizer's settings with the child's parameters.

    Args:
        live: The optimizer's parameter group. Settings are read from it and written to it.
        parameters: The child's parameters.
    """

    def __init__(self, live: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        self._live, self._parameters = live, parameters

    def __getitem__(self, name: str) -> Any:
        return self._parameters if name == "params" else self._live[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._live[name] = value

    def __delitem__(self, name: str) -> None:
        del self._live[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)


class ShardedOptimizer(Optimizer):
    """A boosted child's optimizer, as Lightning and its users see it.

    It is not ColossalAI's wrapper: Lightning derives classes from an optimizer's class, and a ZeRO optimizer removes
    its hooks when an object of such a class is deleted. ``state`` is empty, but :meth:`state_dict` is complete.

    Args:
        boosted: The child.
    """

    def __init__(self, boosted: Boosted) -> None:
        # without super().__init__, which needs parameters
        self.boosted = boosted
        self.state = {}  # type: ignore[assignment]
        self.defaults = boosted.original.defaults

    @property
    def param_groups(self) -> list[ParamGroup]:  # type: ignore[override]
        """Parameter groups; settings written here, such as a learning rate, take effect."""
        return [ParamGroup(*both) for both in zip(self.boosted.groups, self.boosted.group_parameters, strict=True)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs the closure and steps."""
        result = None if closure is None else closure()
        self.boosted.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients."""
        self.boosted.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses further groups.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "A parameter group was added during training, but ColossalAI shards parameters at the start of fit. Give "
            "the optimizer all groups in configure_optimizers, or use ddp."
        )

    def state_dict(self) -> dict[str, Any]:
        """Gathers the whole state in torch's format on rank 0. All ranks must call it."""
        return optimizer_state(self.boosted)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads this rank's shards of a whole state in torch's format."""
        load_optimizer_state(self.boosted, state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.boosted.original!r})"

    def __eq__(self, other: object) -> bool:
        # callbacks look for the optimizer of a schedule, which is the original, among the Trainer's optimizers
        return other is self or other is self.boosted.original

    def __hash__(self) -> int:
        return hash(self.boosted.original)


def sharded_optimizer(boosted: Boosted) -> ShardedOptimizer:
    """Makes a boosted child's optimizer, whose class has the name of the original's, which loggers show.

    Args:
        boosted: The child.
    """
    kind: type[ShardedOptimizer] = type(type(boosted.original).__name__, (ShardedOptimizer,), {})
    return kind(boosted)


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Refuses optimizers that do not update each element of a parameter by itself, because ranks hold slices.

    It tries: two steps of a tensor must be those of its halves.

    Args:
        optimizer: The optimizer of the LightningModule.

    Raises:
        ValueError: It is such an optimizer, or it can't be tried.
    """
    kind = type(optimizer)
    for group in optimizer.param_groups:
        like = group["params"][0] if group["params"] else torch.zeros(1)
        values = torch.linspace(-1, 2, 24, dtype=like.dtype, device=like.device).sin()
        whole = [nn.Parameter(values.clone().view(4, 6))]
        halves = [nn.Parameter(half.clone()) for half in values.view(2, 12)]
        try:
            for parameters in (whole, halves):
                probe = copy.copy(optimizer)
                vars(probe).update(
                    state=defaultdict(dict), param_groups=[{**copy.deepcopy(_settings(group)), "params": parameters}]
                )
                vars(probe).update({name: OrderedDict() for name in vars(probe) if name.endswith("_hooks")})
                for step in range(2):
                    for n, parameter in enumerate(parameters):
                        size = parameter.numel()
                        gradient = torch.arange(n * size, (n + 1) * size, dtype=values.dtype, device=values.device)
                        parameter.grad = ((gradient + 1 + step) * 0.3).cos().view_as(parameter)
                    kind.step(probe)
        except Exception as error:
            raise ValueError(
                f"{kind.__name__} cannot step slices of parameters without a closure, but ColossalAI shards them. Use "
                f"another optimizer, such as torch.optim.AdamW, or ddp. ({type(error).__name__}: {error})"
            ) from error
        if not torch.allclose(whole[0].data.flatten(), torch.cat([h.data for h in halves]), atol=1e-5, rtol=1e-4):
            raise ValueError(
                f"{kind.__name__} updates the elements of a parameter together, but ColossalAI shards parameters. Use "
                "an optimizer that updates each element by itself, such as torch.optim.AdamW, or ddp."
            )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
