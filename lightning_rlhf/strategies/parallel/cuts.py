"""What the ranks of a copy hold of its models: slices of layers (tensor parallelism), stages (pipeline), or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rlhf.functional.precision import wide
from lightning_rlhf.strategies.parallel.pipeline import PipelineParallel
from lightning_rlhf.strategies.parallel.tensor import TensorParallel


class Cuts:
    """Models that are cut, until :meth:`undo`. All ranks of a copy must call what gathers.

    Args:
        tensor: Cuts layers. None: nothing does.
        pipeline: Deals layers to stages. None: nothing does.
    """

    def __init__(self, tensor: TensorParallel | None = None, pipeline: PipelineParallel | None = None) -> None:
        self.tensor, self.pipeline = tensor, pipeline

    def cut_models(self, module: nn.Module) -> None:
        """Cuts all models in a module.

        Raises:
            ValueError: One cannot be cut; the message says why. Then all are whole.
        """
        try:
            for each in (self.tensor, self.pipeline):
                if each is not None:
                    each.cut_models(module)
        except ValueError:  # the same on all ranks
            self.undo(weights=True)
            raise

    def undo(self, weights: bool) -> None:
        """Makes the models ordinary again; see :meth:`TensorParallel.undo`."""
        for each in (self.pipeline, self.tensor):
            if each is not None and each.active:
                each.undo(weights)

    def is_absent(self, parameter: Tensor) -> bool:
        """Whether this rank holds nothing of a parameter."""
        return self.pipeline is not None and self.pipeline.is_absent(parameter)

    def hiding(self) -> AbstractContextManager[None]:
        """Within it, parameters that this rank does not hold are frozen."""
        return nullcontext() if self.pipeline is None else self.pipeline.hiding()

    def check_trained(self, module: nn.Module) -> None:
        """Checks that each rank trains something.

        Raises:
            ValueError: One does not; all ranks raise it.
        """
        if self.pipeline is not None:
            self.pipeline.check_trained(module)

    @contextmanager
    def whole_stages(self, child: nn.Module) -> Iterator[None]:
        """Within it, each rank has all stages of a child, and can run it without the other stages' ranks."""
        with nullcontext() if self.pipeline is None else self.pipeline.whole_weights(child):
            yield

    # ------------------------------------------------------------------------------------------------- whole tensors

    def whole_slices(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Gathers a parameter, or one of its states, from the ranks with slices of it."""
        return value if self.tensor is None else self.tensor.whole(parameter, value)

    def whole_state_dict(
        self, module: nn.Module, state: Mapping[str, Any], joined: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Gathers a module's state dict on the first rank of the copy.

        Args:
            module: The module.
            state: Names and values of this rank.
            joined: More of them, of which slices were gathered already.
        """
        found = dict(state) if self.tensor is None else self.tensor.whole_state_dict(module, state)
        found |= joined
        return found if self.pipeline is None else self.pipeline.whole_state_dict(module, found if self._first else {})

    def part_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what this rank holds of a whole state dict."""
        found = dict(state) if self.tensor is None else self.tensor.slice_state_dict(module, state)
        return found if self.pipeline is None else self.pipeline.part_state_dict(module, found)

    def whole_optimizer_state(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Gathers an optimizer's state in torch's format on the first rank of the copy.

        Args:
            state: The optimizer's.
            parameters: Its parameters, in the order of its groups.
        """
        if self.tensor is not None:
            state = self.tensor.whole_optimizer_state(state, parameters)
        if self.pipeline is None:
            return state
        return self.pipeline.whole_optimizer_state(state if self._first else {**state, "state": {}}, parameters)

    def part_optimizer_state(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Returns what this rank holds of an optimizer's whole state."""
        if self.tensor is not None:
            state = self.tensor.slice_optimizer_state(state, parameters)
        return state if self.pipeline is None else self.pipeline.part_optimizer_state(state, parameters)

    @property
    def _first(self) -> bool:
        """Whether this rank speaks for those with slices of the same layers."""
        return self.tensor is None or self.tensor.ranks.place == 0

    # ------------------------------------------------------------------------------------------------- norms

    def kind(self, parameter: Tensor) -> int:
        """Says how a gradient counts in sums over the copy: 0 once for all slices, 1 as a slice, 2 not on this rank."""
        if self.pipeline is not None and not self.pipeline.counts(parameter):
            return 2
        return int(self.tensor is not None and self.tensor.is_cut(parameter))

    def sum_squares(self, squares: Tensor) -> Tensor:
        """Sums squares over the ranks of a copy.

        Args:
            squares: (3,) by :meth:`kind`.

        Returns:
            A scalar, the same on all ranks.
        """
        squares = squares.clone()
        if self.tensor is not None:
            dist.all_reduce(squares[1:2], group=self.tensor.ranks.group)
        total = squares[:2].sum()
        if self.pipeline is not None:
            dist.all_reduce(total, group=self.pipeline.ranks.group)
        return total

    def clip_grad_norm(self, parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_``, for the norm of the whole model.

        Args:
            parameters: Parameters whose common norm is clipped.
            max_norm: Largest norm. None: no clipping.

        Returns:
            The scalar norm before clipping, the same on all ranks.
        """
        device = next(each.device for each in (self.tensor, self.pipeline) if each is not None)
        squares = torch.zeros(3, dtype=torch.float64, device=device)
        gradients = [(p, p.grad) for p in parameters if p.grad is not None and not self.is_absent(p)]
        for parameter, gradient in gradients:
            squares[self.kind(parameter)] += wide(gradient).norm().double() ** 2
        exact = any(p.dtype == torch.float64 for p in parameters)
        norm = self.sum_squares(squares).sqrt().to(torch.float64 if exact else torch.float32)
        if max_norm is not None:
            shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for _, gradient in gradients:
                gradient.mul_(shrink.to(gradient))
        return norm
