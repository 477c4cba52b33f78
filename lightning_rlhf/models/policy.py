"""The policy: log-probs of a packed batch's scored tokens under a causal LM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
        z_loss: Weight of the z-loss in ``loss``; see :func:`~lightning_rlhf.functional.logprobs.linear_nll`.

    Raises:
        ValueError: ``layout="tree"`` and the model can't take it, or a model that changes its logits after the head
            in a way that is not known here.
    """

    def __init__(
        self, model: nn.Module, layout: LayoutChoice = "auto", chunk: int = CHUNK, z_loss: float = 0.0
    ) -> None:
        super().__init__(model, layout)
        self.chunk, self.z_loss = chunk, z_loss
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
            (N,) log-probs, entropies or None, whether each token is the arg max; the loss and the z-loss, or None.
        """
        states, predictor, _ = self.hidden(batch)
        hidden = states[predictor]
        weight, bias = head_weight(self.transformer)
        head = dict(bias=bias, temperature=temperature, entropy=entropy, chunk=self.chunk, **head_arguments(self.model))
        if weights is None:
            return linear_logprobs(hidden, weight, batch.target, **head)
        return linear_nll(hidden, weight, batch.target, weights, z_loss=self.z_loss, **head)

    @contextmanager
    def noisy_embeddings(self, batch: PackedBatch, alpha: float | None) -> Iterator[None]:
        """NEFTune (Jain et al. 2023): within it the input embeddings carry uniform noise, from the global generator.

        A token's noise lies within ``alpha / sqrt(L * D)``, L being the tokens of its sequence (prompt and completion,
        no padding). A prompt that several completions share stands once in the tree layout, and takes the harmonic mean
        of their L: the noise's variance is then the mean of what its padded copies have.

        Args:
            batch: What is run.
            alpha: None for no noise.
        """
        if alpha is None:
            yield
            return
        lengths: list[float] = []
        repeats: list[int] = []
        for prompt, branches in batch.forest.trees:
            each = [prompt.length + branch.length for branch in branches]
            if self.layout != "padded":
                lengths.append(len(each) / sum(1 / length for length in each))
                repeats += [prompt.length, *(branch.length for branch in branches)]
            lengths += each
        bound = alpha * torch.tensor(lengths).rsqrt()
        if self.layout != "padded":
            bound = bound.repeat_interleave(torch.tensor(repeats))
        bound = bound.view((-1, 1, 1) if self.layout == "padded" else (1, -1, 1))  # by row, or by token

        def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # no empty_like: of a tensor subclass (Gemini), in-place functions do nothing
            noise = torch.empty(output.shape, dtype=output.dtype, device=output.device).uniform_(-1, 1)
            return output + noise.mul_(bound.to(output.device) / output.shape[-1] ** 0.5)

        hook = self.transformer.get_input_embeddings().register_forward_hook(add_noise)
        try:
            yield
        finally:
            hook.remove()

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
