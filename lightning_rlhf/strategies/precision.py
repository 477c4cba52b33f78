"""Precision under ColossalAI: its plugins cast weights and scale losses, to the data type that Lightning is given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from lightning_rlhf.strategies.optimizer import ShardedOptimizer
from lightning_rlhf.strategies.sharded import Boosted

Plugin = Literal["ddp", "zero1", "zero2", "gemini"]

#: For each precision of the Trainer: ColossalAI's name, the data type of forward passes, and whether the optimizer
#: updates an fp32 copy of the weights.
MODES: dict[str, tuple[str, torch.dtype | None, bool]] = {
    "32-true": ("fp32", None, False),
    "bf16-mixed": ("bf16", torch.bfloat16, True),
    "bf16-true": ("bf16", torch.bfloat16, False),
    "16-mixed": ("fp16", torch.float16, True),
}


class ColossalAIPrecision(Precision):
    """The meaning of ``Trainer(precision=...)`` under ZeRO and Gemini.

    ``32-true`` exists under ZeRO only. ``bf16-mixed`` and ``16-mixed`` have weights, activations and gradients in 16
    bits, and sharded fp32 weights that the optimizer updates. ``bf16-true`` has no fp32 weights. Training does not use
    autocast. Batches are not cast, but tensors passed to a boosted child are, unless the child has the class attribute
    ``cast_inputs = False``. Outside ``fit`` no child is boosted, and autocast is used.

    Args:
        precision: The Trainer's precision.
        plugin: The strategy's plugin, which must support the precision.

    Raises:
        ValueError: The plugin does not support the precision.
    """

    def __init__(self, precision: str = "32-true", plugin: Plugin = "zero2") -> None:
        if precision not in MODES or (precision == "32-true" and plugin == "gemini"):
            reason = {
                "32-true": "its chunks have 16 bits, and bf16-mixed keeps fp32 weights for the optimizer",
                "16-true": "fp16 weights without an fp32 copy lose small updates",
                "64-true": "its optimizers keep fp32",
            }.get(precision, "its plugins do not have this mode")
            choice = [p for p in MODES if not (p == "32-true" and plugin == "gemini")]
            raise ValueError(
                f"ColossalAI's {plugin} does not support trainer.precision={precision!r}: {reason}. Set "
                f"trainer.precision to one of {', '.join(choice)}."
            )
        self.precision: Any = precision
        self.name, self.dtype, self.master_weights = MODES[precision]
        self.boosted = False  # the strategy sets it while children are boosted
        self.gathering: Callable[[], AbstractContextManager[Any]] = nullcontext  # Gemini's, while steps run

    def forward_context(self) -> AbstractContextManager[Any]:
        """Returns autocast, unless the plugin casts weights."""
        if self.boosted or self.dtype is None:
            return self.gathering()
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", self.dtype)

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Calls the strategy, which knows the children that the loss depends on."""
        model.trainer.strategy.run_backward(tensor, *args, **kwargs)  # type: ignore[attr-defined]

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Runs the closure, clips gradients, and steps."""
        result = closure()
        self._after_closure(model, optimizer)
        optimizer.step(**kwargs)
        return result

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clips the gradients of all ranks.

        It does not use the plugins' ``max_norm``: ColossalAI 0.5.0 ignores it for bf16 gradients on the CPU, and always
        takes all parameters of an optimizer together.
        """
        if clip_val <= 0:
            return
        whole: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert isinstance(whole, ShardedOptimizer)
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            bound = clip_val * whole.boosted.scale
            for _, _, gradient in whole.boosted.gradients():
                gradient.clamp_(-bound, bound)
        else:
            clip_grad_norm([whole.boosted], None, clip_val)


def clip_grad_norm(
    children: list[Boosted], parameters: list[torch.nn.Parameter] | None, max_norm: float | None
) -> Tensor:
    """Clips gradients that are sharded over ranks, like ``torch.nn.utils.clip_grad_norm_``. All ranks must call it.

    Args:
        children: The children with the gradients.
        parameters: Parameters of the children whose common norm is clipped. None: all trained parameters.
        max_norm: Largest norm; gradients with a larger one are scaled down. A larger value clips less. None: no
            clipping. Gradients with a norm that is not finite are not clipped either.

    Returns:
        The scalar norm before clipping, the same on all ranks.
    """
    norm = torch.stack([child.grad_squares(parameters) for child in children]).sum().sqrt().float()
    if max_norm is not None and norm.isfinite():
        shrink = min(1.0, max_norm / (norm.item() + 1e-6))
        if shrink < 1:
            for child in children:
                for _, _, gradient in child.gradients(parameters):
                    gradient.mul_(shrink)
    return norm
