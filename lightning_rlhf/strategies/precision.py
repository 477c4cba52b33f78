"""Precision under ColossalAI: the plugin casts weights and scales losses; Lightning only says in which number type."""

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

from lightning_rlhf.strategies.sharded import Boosted, ShardedOptimizer

Plugin = Literal["ddp", "zero1", "zero2", "gemini"]

#: What ColossalAI calls a Trainer's precision, the type that forward passes compute in, and whether the optimizer steps
#: an fp32 copy of the weights.
KINDS: dict[str, tuple[str, torch.dtype | None, bool]] = {
    "32-true": ("fp32", None, False),
    "bf16-mixed": ("bf16", torch.bfloat16, True),
    "bf16-true": ("bf16", torch.bfloat16, False),
    "16-mixed": ("fp16", torch.float16, True),
}


class ColossalAIPrecision(Precision):
    """What the strategy makes of ``Trainer(precision=...)`` under ZeRO and Gemini.

    ``32-true`` (ZeRO only); ``bf16-mixed`` and ``16-mixed``: weights, activations and gradients in 16 bits, and sharded
    fp32 weights that the optimizer steps; ``bf16-true``: no fp32 weights at all. There is no autocast during training,
    and batches are not cast, but tensors that a boosted child is called with are; a child with the class attribute
    ``cast_inputs = False`` is spared. Outside ``fit`` nothing is boosted, and autocast serves.

    Args:
        precision: As the Trainer's.
        plugin: Refuses what this one can't do.

    Raises:
        ValueError: It can't.
    """

    def __init__(self, precision: str = "32-true", plugin: Plugin = "zero2") -> None:
        if precision not in KINDS or (precision == "32-true" and plugin == "gemini"):
            reason = {
                "32-true": "its chunks are of 16 bits; bf16-mixed keeps fp32 weights for the optimizer",
                "16-true": "fp16 weights without fp32 ones lose small updates",
                "64-true": "its optimizers keep fp32",
            }.get(precision, "there is no such mode in its plugins")
            choice = [p for p in KINDS if not (p == "32-true" and plugin == "gemini")]
            raise ValueError(
                f"trainer.precision={precision!r} can't be had under ColossalAI's {plugin}: {reason}. Set "
                f"trainer.precision to one of {', '.join(choice)}."
            )
        self.precision: Any = precision
        self.name, self.dtype, self.master_weights = KINDS[precision]
        self.boosted = False  # the strategy says so while children are

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast, unless weights are cast."""
        if self.boosted or self.dtype is None:
            return nullcontext()
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", self.dtype)

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Has the strategy do it: it knows whose weights the loss hangs on."""
        model.trainer.strategy.run_backward(tensor, *args, **kwargs)  # type: ignore[attr-defined]

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Runs the closure, clips, steps.

        Raises:
            RuntimeError: ``training_step`` returned None under automatic optimization.
        """
        result = closure()
        if model.automatic_optimization and result is None:
            raise RuntimeError(
                "training_step returned None: under ColossalAI a rank can't skip a step, since the others wait for its "
                "gradients. Return a loss of zero that hangs on the model, such as 0 * out.sum()."
            )
        self._after_closure(model, optimizer)
        optimizer.step(**kwargs)
        return result

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clips what all ranks hold of the gradients.

        Not by the plugins' own ``max_norm``: ColossalAI 0.5.0 loses it for bf16 gradients on the CPU, and bounds all of
        an optimizer's parameters at once.
        """
        if clip_val <= 0:
            return
        whole: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert isinstance(whole, ShardedOptimizer)
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            bound = clip_val * whole.boosted.scale
            for _, gradient in whole.boosted.gradients():
                gradient.clamp_(-bound, bound)
        else:
            clip_grad_norm([whole.boosted], None, clip_val)


def clip_grad_norm(
    children: list[Boosted], parameters: list[torch.nn.Parameter] | None, max_norm: float | None
) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, of gradients that lie in pieces on all ranks; all must call.

    Args:
        children: Where the gradients are.
        parameters: The children's own, of which to take the norm together; None: all that are trained.
        max_norm: Beyond which gradients are shrunk; None: never. Nor are they where the norm is not finite.

    Returns:
        Scalar norm, the same on all ranks.
    """
    norm = torch.stack([child.squares(parameters) for child in children]).sum().sqrt().float()
    if max_norm is not None and norm.isfinite():
        shrink = min(1.0, max_norm / (norm.item() + 1e-6))
        if shrink < 1:
            for child in children:
                for _, gradient in child.gradients(parameters):
                    gradient.mul_(shrink)
    return norm
