"""The policy: log-probs of a packed batch's scored tokens under a causal LM."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.data.packed import PackedBatch
from lightning_rlhf.functional.logprobs import CHUNK, ScoredTokens, linear_logprobs, linear_nll
from lightning_rlhf.models.backbone import Backbone, LayoutChoice


class Policy(Backbone):
    """Log-probs of a packed batch's scored tokens under a causal LM.

    All work happens in :meth:`forward`, so that DDP, ZeRO and Gemini can wrap this child and see it.

    Args:
        model: A ``transformers`` causal LM, or a peft model around one.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.
        chunk: Elements of logits alive at once in the scored head.

    Raises:
        ValueError: ``layout="tree"`` and the model can't take it.
    """

    def __init__(self, model: nn.Module, layout: LayoutChoice = "auto", chunk: int = CHUNK) -> None:
        super().__init__(model, layout)
        self.chunk = chunk

    def forward(
        self,
        batch: PackedBatch,
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        weights: Tensor | None = None,
    ) -> ScoredTokens:
        """Scores the batch.

        Args:
            batch: A packed batch on the model's device.
            entropy: Also return entropies.
            temperature: Sampling temperature; log-probs are of ``logits / temperature``.
            weights: (N,) constants. Given, ``loss`` is ``-sum(weights * logprobs)``, made with its gradient in one
                pass, and the other fields carry none.

        Returns:
            (N,) log-probs, entropies or None, whether each token is the arg max, and the loss or None.
        """
        states, predictor, _ = self.hidden(batch)
        hidden = states[predictor]
        weight, bias = head_weight(self.transformer)
        head = dict(bias=bias, temperature=temperature, entropy=entropy, chunk=self.chunk, **head_arguments(self.model))
        if weights is None:
            return linear_logprobs(hidden, weight, batch.target, **head)
        return linear_nll(hidden, weight, batch.target, weights, **head)


def head_weight(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of the head as it acts.

    A LoRA layer's own ``weight`` is its base's alone; active adapters are added here.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft keeps a trainable copy beside the original
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    weight: Tensor = head.weight
    if hasattr(head, "get_delta_weight") and not (head.disable_adapters or head.merged):
        for name in head.active_adapters:
            if name in head.lora_A or name in head.lora_embedding_A:
                weight = weight + head.get_delta_weight(name)
    return weight, getattr(head, "bias", None)


def head_arguments(model: nn.Module) -> dict[str, Any]:
    """What a family does to its logits after the head; without it log-probs are silently wrong."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return dict(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))  # Gemma 2
