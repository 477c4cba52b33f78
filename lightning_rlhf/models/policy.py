"""The policy: log-probs of a packed batch's scored tokens under a causal LM."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.data.packed import PackedBatch, pad
from lightning_rlhf.functional.logprobs import CHUNK, ScoredTokens, linear_logprobs, linear_nll
from lightning_rlhf.models.backbone import Backbone, LayoutChoice, probe, tolerance

log = logging.getLogger(__name__)


class Policy(Backbone):
    """Log-probs of a packed batch's scored tokens under a causal LM.

    All work happens in :meth:`forward`, so that DDP, ZeRO and Gemini can wrap this child and see it. A mixture of
    experts trains by the log-probs alone: losses that balance its router's load are not added.

    Args:
        model: A ``transformers`` causal LM, or a peft model around one.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.
        chunk: Elements of logits alive at once in the scored head.

    Raises:
        ValueError: ``layout="tree"`` and the model can't take it, or a model that changes its logits after the head
            in a way that is not known here.
    """

    def __init__(self, model: nn.Module, layout: LayoutChoice = "auto", chunk: int = CHUNK) -> None:
        super().__init__(model, layout)
        self.chunk = chunk
        self._check_head()
        if getattr(self.transformer.config, "output_router_logits", False):
            log.warning("output_router_logits has no effect: the router's load-balancing loss is not added.")

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

    def _check_head(self) -> None:
        """Compares with the model's own logits, on a small batch: a scale that is left out shows nowhere else."""
        batch = probe(self.transformer)
        padded = pad(batch)
        inputs: dict[str, Any] = dict(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False)
        with torch.no_grad(), super().native_attention() as model:
            hidden = self._decoder(**inputs).last_hidden_state[padded.row, padded.column]
            weight, bias = head_weight(self.transformer)
            got = linear_logprobs(hidden, weight, batch.target, bias, chunk=self.chunk, **head_arguments(model))
            own = model(**inputs).logits[padded.row, padded.column].float().log_softmax(-1)
        want = own.gather(-1, batch.target[:, None])[:, 0]
        difference = ((got.logprobs - want).norm() / want.norm()).item()
        if not difference < tolerance(self.transformer):
            raise ValueError(
                f"{type(self.transformer).__name__} changes its logits after the head in a way that is not known here: "
                f"log-probs differ from its own by {difference:.1e} of their size. Only logit_scale, logits_scaling (a "
                "divisor) and final_logit_softcapping of its config are read."
            )


def head_weight(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,) of the head as it acts.

    A LoRA layer's own ``weight`` is its base's alone; active adapters are added here, without their dropout.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft keeps a trainable copy beside the original
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    weight: Tensor = head.weight
    if hasattr(head, "get_delta_weight") and not (head.disable_adapters or head.merged):
        for name in head.active_adapters:
            if name in head.lora_A or name in head.lora_embedding_A:
                delta = head.get_delta_weight(name)
                if name in head.lora_magnitude_vector:  # DoRA; its norms carry no gradient
                    turned = head.weight + delta
                    ratio = head.lora_magnitude_vector[name].weight / turned.norm(dim=1).detach()
                    delta = ratio[:, None] * turned - head.weight
                weight = weight + delta
    return weight, getattr(head, "bias", None)


def head_arguments(model: nn.Module) -> dict[str, Any]:
    """What a family does to its logits after the head; without it log-probs are silently wrong."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return dict(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))  # Gemma 2
