"""The policy: computes log-probs of a packed batch's scored tokens under a causal LM."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.data import PackedBatch, pad
from lightning_rlhf.functional import ScoredTokens, linear_logprobs, linear_nll
from lightning_rlhf.models.backbone import Backbone, Hidden, LayoutChoice, probe, tolerance
from lightning_rlhf.models.tree_attention import SharedForest
from lightning_rlhf.models.value import read_values

log = logging.getLogger(__name__)


class Policy(Backbone):
    """Computes log-probs of a packed batch's scored tokens under a causal LM.

    All work happens in :meth:`forward`, so that DDP, ZeRO and Gemini can wrap this module. For a mixture of experts,
    losses that balance the router's load are not added.

    Args:
        model: A ``transformers`` causal LM, or a peft model around one.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.
        chunk: Number of logits in memory at once. A larger value takes more memory, and reads the head less often.
            None: 2^22 on a CPU, 2^26 on other devices.
        z_loss: Weight of the z-loss in ``loss``; see :func:`~lightning_rlhf.functional.logprobs.linear_nll`.
        trunk_grad: Adds a value head of zeros on the hidden states, and scales the gradient of its loss into the model.
            None: no value head.

    Raises:
        ValueError: The model does not support ``layout="tree"``, or it changes logits after the head in an unknown way.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: LayoutChoice = "auto",
        chunk: int | None = None,
        z_loss: float = 0.0,
        trunk_grad: float | None = None,
    ) -> None:
        super().__init__(model, layout)
        self.chunk, self.z_loss, self.trunk_grad = chunk, z_loss, trunk_grad
        self._check_head()
        if trunk_grad is not None:
            self.add_value_head()
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
            temperature: The sampling temperature, by which logits are divided.
            weights: (N,) constants. If they are given, ``loss`` is ``-sum(weights * logprobs)`` and is computed with
                its gradient in one pass; the other fields then have no gradient.

        Returns:
            (N,) log-probs, entropies or None, whether each token is the arg max; the loss and the z-loss, or None; and
            without ``weights`` the values of a value head, or None.
        """
        states, predictor, last = self.hidden(batch)
        hidden = states[predictor]
        weight, bias = head_weight(self.transformer)
        head = dict(
            bias=bias,
            temperature=temperature,
            entropy=entropy,
            chunk=self.chunk,
            part=getattr(self.transformer.get_output_embeddings(), "vocabulary_slice", None),
            **head_arguments(self.model),
        )
        if weights is None:
            found = linear_logprobs(hidden, weight, batch.target, **head)
            return found if self.trunk_grad is None else found._replace(**self._values(states, predictor, last))
        return linear_nll(hidden, weight, batch.target, weights, z_loss=self.z_loss, **head)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Returns the trained parameters without those of the value head."""
        head = {id(p) for p in self.critic_parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in head]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the value head."""
        return [] if self.trunk_grad is None else list(self.value_head.parameters())

    def add_value_head(self) -> None:
        """Adds a linear head with one output, of zeros: all values are 0 at first."""
        width = head_weight(self.transformer)[0].shape[1]  # OPT may project its hidden states
        device = next(self.model.parameters()).device
        self.value_head = nn.Linear(width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def _values(self, states: Tensor, predictor: Tensor, last: Tensor) -> dict[str, Tensor]:
        assert self.trunk_grad is not None
        if self.trunk_grad != 1:  # the same values, and a share of the gradient
            states = states.detach() + self.trunk_grad * (states - states.detach())
        return read_values(self.value_head, Hidden(states, predictor, last))._asdict()

    @contextmanager
    def noisy_embeddings(self, batch: PackedBatch, alpha: float | None) -> Iterator[None]:
        """Within it, the input embeddings have uniform noise (NEFTune, Jain et al. 2023) from the global generator.

        The noise of a token is at most ``alpha / sqrt(L * D)``, where L is the number of tokens of its sequence (prompt
        and completion without padding). In the tree layout several completions may share a prompt. It gets the harmonic
        mean of their L, so that the noise's variance is the mean over its padded copies.

        Args:
            batch: The batch that runs.
            alpha: Scale of the noise. A larger value regularizes more. None: no noise.
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
            # not empty_like, because in-place functions have no effect on Gemini's tensor subclass
            shape = output.shape if self.layout == "padded" else (1, bound.shape[1], output.shape[-1])
            noise = torch.empty(shape, dtype=output.dtype, device=output.device).uniform_(-1, 1)
            noise.mul_(bound.to(output.device) / output.shape[-1] ** 0.5)
            return output + (self._forest.own_tokens(noise) if isinstance(self._forest, SharedForest) else noise)

        hook = self.transformer.get_input_embeddings().register_forward_hook(add_noise)
        try:
            yield
        finally:
            hook.remove()

    def _check_head(self) -> None:
        """Compares with the model's own logits on a small batch, because a missing scale would not show elsewhere."""
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
                f"{type(self.transformer).__name__} changes its logits after the head in an unknown way: the relative "
                f"difference to its own log-probs is {difference:.1e}. Supported settings of its config are "
                "logit_scale, logits_scaling (a divisor) and final_logit_softcapping. Use another model."
            )


def head_weight(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Returns the effective weight (V, D) and bias (V,) of the head.

    The ``weight`` of a LoRA layer is only its base weight. Active adapters are added here, without their dropout.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft keeps a trainable copy beside the original
        head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    weight: Tensor = head.weight
    if hasattr(head, "get_delta_weight") and not (head.disable_adapters or head.merged):
        for name in head.active_adapters:
            if name in head.lora_A or name in head.lora_embedding_A:
                delta = head.get_delta_weight(name)
                if name in head.lora_magnitude_vector:  # DoRA; its norms have no gradient
                    turned = head.weight + delta
                    ratio = head.lora_magnitude_vector[name].weight / turned.norm(dim=1).detach()
                    delta = ratio[:, None] * turned - head.weight
                weight = weight + delta
    return weight, getattr(head, "bias", None)


def head_arguments(model: nn.Module) -> dict[str, Any]:
    """Returns the scale and the soft cap that a model family applies to logits after the head."""
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return dict(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))  # Gemma 2
