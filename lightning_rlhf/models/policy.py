"""A causal language model that scores packed batches: each token computed once, the head where a loss reads it.

Two layouts with equal results. ``tree``: one packed row, every prompt once. ``padded``: the rectangle other stacks
run, for models that can't take a tree. Which one a model can is tried at load, never guessed from its name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.data.packed import Branch, Forest, PackedBatch, Tree, pack, pad
from lightning_rlhf.functional.logprobs import CHUNK, ScoredTokens, linear_logprobs, linear_nll
from lightning_rlhf.models import tree_attention as tree

log = logging.getLogger(__name__)

Layout = Literal["tree", "inject", "padded"]
LayoutChoice = Literal["auto", "tree", "padded"]


class Policy(nn.Module):
    """Log-probs of a packed batch's scored tokens under a causal LM.

    All work happens in :meth:`forward`, so that DDP, ZeRO and Gemini can wrap this child and see it.

    Args:
        model: A ``transformers`` causal LM, or a peft model around one.
        layout: ``auto`` tries the tree layout on a small batch and takes the padded one where results differ;
            ``tree`` raises there; ``padded`` never tries.
        chunk: Elements of logits alive at once in the scored head.

    Attributes:
        model: As given, its attention set to ``"tree"`` unless the layout is padded.
        layout: ``tree``, ``inject`` (a tree, handed to the attention layers by hooks, for families that drop
            unknown keywords), or ``padded``.

    Raises:
        ValueError: ``layout="tree"`` and the model can't take it.
    """

    def __init__(self, model: nn.Module, layout: LayoutChoice = "auto", chunk: int = CHUNK) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        self.layout: Layout = "padded"
        self._forest: Forest | None = None
        self._hooks: list[Any] = []
        self._own_attention = tree.attention_of(self._causal_lm)
        if layout != "padded":
            self._choose_layout(required=layout == "tree")

    @property
    def _causal_lm(self) -> PreTrainedModel:
        """The transformers model inside adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator,return-value]

    @property
    def _decoder(self) -> nn.Module:
        """The transformers model without its head."""
        lm = self._causal_lm
        return lm.base_model if lm.base_model is not lm else lm.get_decoder()

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
        hidden = self._hidden(batch)
        weight, bias = head_weight(self._causal_lm)
        head = dict(bias=bias, temperature=temperature, entropy=entropy, chunk=self.chunk, **head_arguments(self.model))
        if weights is None:
            return linear_logprobs(hidden, weight, batch.target, **head)
        return linear_nll(hidden, weight, batch.target, weights, **head)

    def _hidden(self, batch: PackedBatch) -> Tensor:
        """(N, D) hidden states that predict the scored tokens."""
        if self.layout == "padded":
            padded = pad(batch)
            # right padding needs no position ids, and some families take none
            out = self._decoder(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False)
            return out.last_hidden_state[padded.row, padded.column]
        # kept until the next forward pass: a checkpointed layer runs again in the backward pass
        self._forest = batch.forest
        inputs: dict[str, Any] = dict(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None])
        if self.layout == "tree":
            inputs["forest"] = batch.forest
        with tree.forest_active():
            # without the cache off, packed positions leak into each other in transformers 5
            out = self._decoder(**inputs, use_cache=False)
        return out.last_hidden_state[0, batch.predictor]

    @contextmanager
    def native_attention(self) -> Iterator[nn.Module]:
        """The model with the attention it came with, in eval mode and able to cache: for ``generate``."""
        lm, mode = self._causal_lm, self.model.training
        checkpointing = is_checkpointing(lm)
        forest, self._forest = self._forest, None
        self.model.eval()
        tree.set_attention(lm, self._own_attention)
        if checkpointing:
            lm.gradient_checkpointing_disable()
        try:
            yield self.model
        finally:
            if checkpointing:
                enable_checkpointing(lm)
            if self.layout != "padded":
                tree.set_attention(lm, tree.NAME)
            self._forest = forest
            self.model.train(mode)

    # ------------------------------------------------------------------------------------------------- layouts

    def _choose_layout(self, required: bool) -> None:
        """Runs a small batch down each layout and takes the first that equals the padded one."""
        batch = _probe(self._causal_lm)
        lm, mode = self._causal_lm, self.model.training
        self.model.eval()  # dropout would differ; layers run what they run in training
        reasons = []
        try:
            with torch.no_grad():
                want = self(batch).logprobs
                for layout in ("tree", "inject"):
                    self.layout = layout
                    tree.set_attention(lm, tree.NAME)
                    if layout == "inject":
                        self._install_hooks()
                    try:
                        difference = (self(batch).logprobs - want).abs().max().item()
                        self._run_checkpointed(batch)
                    except (tree.ForestNotPassedError, TypeError, ValueError, RuntimeError) as error:
                        reasons.append(f"{layout}: {str(error).splitlines()[0]}")
                    else:
                        # in half precision the layouts round differently
                        if difference < (1e-3 if want.abs().max() < 1e3 and _is_full(lm) else 0.15):
                            return
                        reasons.append(f"{layout}: log-probs differ by {difference:.1e}")
                    self._remove_hooks()
            self.layout = "padded"
            tree.set_attention(lm, self._own_attention)
        finally:
            self._forest = None
            self.model.train(mode)
        message = f"{type(lm).__name__} can't take the tree layout ({'; '.join(reasons)})"
        if required:
            raise ValueError(f"{message}; use layout: auto or padded.")
        log.warning("%s: batches run padded, with equal results and more compute.", message)

    def _run_checkpointed(self, batch: PackedBatch) -> None:
        """Some families drop keywords only on the checkpointed path, which eval mode does not take."""
        if is_checkpointing(self._causal_lm):
            with torch.random.fork_rng(), torch.enable_grad():
                self.model.train()
                self(batch)
            self.model.eval()

    def _install_hooks(self) -> None:
        def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            return None if self._forest is None else (args, {**kwargs, "forest": self._forest})

        for module in tree.attention_modules(self._causal_lm):
            self._hooks.append(module.register_forward_pre_hook(hand_over, with_kwargs=True))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _is_full(model: PreTrainedModel) -> bool:
    return model.dtype in (torch.float32, torch.float64)


def _probe(model: PreTrainedModel) -> PackedBatch:
    """A branching tree, a pair of lone sequences and one more, of 32 tokens: enough to tell layouts apart."""
    embeddings: Any = model.get_input_embeddings()
    vocabulary: int = embeddings.weight.shape[0]
    ids = [(3 + 7 * i) % vocabulary for i in range(32)]
    rows: Sequence[Tree] = (
        Tree(ids[:5], [Branch(ids[5:9]), Branch(ids[9:12])]),
        Tree(ids[12:14], [Branch(ids[14:19])]),
        Tree(ids[19:21], [Branch(ids[21:26])]),
        Tree(ids[26:27], [Branch(ids[27:32])]),
    )
    return pack(rows).to(embeddings.weight.device)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Gradient checkpointing in the form that works with frozen inputs and keyword arguments."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether :func:`enable_checkpointing` is in force; transformers 5 renamed the property."""
    new = "is_activation_checkpointing"
    return bool(getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing"))


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
