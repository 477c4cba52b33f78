"""A transformers model that runs packed batches: which layouts it can take, and its hidden states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.data.packed import Branch, Forest, PackedBatch, Tree, pack, pad
from lightning_rlhf.models import tree_attention as tree

log = logging.getLogger(__name__)

Layout = Literal["tree", "inject", "padded"]
LayoutChoice = Literal["auto", "tree", "padded"]


class Hidden(NamedTuple):
    """Hidden states of a batch, in either layout.

    Attributes:
        states: (M, D), M being T, or the positions of the padded rectangle.
        predictor: (N,) index into M of the position that predicts each scored token.
        last: (S,) index into M of each sequence's last token.
    """

    states: Tensor
    predictor: Tensor
    last: Tensor


class Backbone(nn.Module):
    """Base of the models that read packed batches; a subclass puts a head behind :meth:`hidden`.

    The attribute ``model`` is the model as given, its attention set to ``"tree"`` unless the layout is padded. The
    attribute ``layout`` is the layout that was chosen: ``tree``, ``inject`` (a tree, handed to the attention layers by
    hooks, for families that drop unknown keywords), or ``padded``.

    Args:
        model: A ``transformers`` decoder with any head, or a peft model around one.
        layout: ``auto`` tries the tree layout on a small batch and takes the padded one where results differ;
            ``tree`` raises there; ``padded`` never tries.

    Raises:
        ValueError: ``layout="tree"`` and the model can't take it.
    """

    #: ColossalAI's strategy casts what a child is called with; here token weights would lose digits.
    cast_inputs = False

    def __init__(self, model: nn.Module, layout: LayoutChoice = "auto") -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = "padded"
        self._forest: Forest | None = None
        self._hooks: list[Any] = []
        self._own_attention = tree.attention_of(self.transformer)
        keep_constants(self.transformer)
        if layout != "padded":
            self._choose_layout(required=layout == "tree")

    @property
    def transformer(self) -> PreTrainedModel:
        """The transformers model inside adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator,return-value]

    @property
    def _decoder(self) -> nn.Module:
        """The transformers model without its head."""
        whole = self.transformer
        return whole.base_model if whole.base_model is not whole else whole.get_decoder()

    def hidden(self, batch: PackedBatch) -> Hidden:
        """Runs the model without its head; to be called inside ``forward``, where wrappers' hooks fire."""
        if self.layout == "padded":
            padded = pad(batch)
            with self._checkpointed_as_now():
                # right padding needs no position ids, and some families take none
                out = self._decoder(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False)
            states = out.last_hidden_state
            first = torch.arange(len(states), device=states.device) * states.shape[1]
            return Hidden(states.flatten(0, 1), first[padded.row] + padded.column, first + padded.last)
        inputs: dict[str, Any] = dict(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None])
        if self.layout == "tree":
            inputs["forest"] = batch.forest
        with self._on(batch.forest), self._checkpointed_as_now():
            # without the cache off, packed positions leak into each other in transformers 5
            out = self._decoder(**inputs, use_cache=False)
        return Hidden(out.last_hidden_state[0], batch.predictor, batch.last)

    @contextmanager
    def _on(self, forest: Forest) -> Iterator[None]:
        """Within it layers run on a forest, which hooks hand over where the layout is ``inject``."""
        former, self._forest = self._forest, forest
        try:
            with tree.forest_active():
                yield
        finally:
            self._forest = former

    def _as_now(self) -> Callable[[], AbstractContextManager[None]]:
        """What makes the context in which this forward pass runs once more, for layers that run again."""
        forest = self._forest
        return nullcontext if forest is None else partial(self._on, forest)

    @contextmanager
    def _checkpointed_as_now(self) -> Iterator[None]:
        """Layers that are checkpointed within it run again in the backward pass as they run now, whatever came since.

        transformers takes torch's arguments for it only where checkpointing is switched on, which users may do
        themselves, before or after. The name under which its layers keep the function is the same in all supported
        versions; ``tests/models`` compares gradients, and fails where it is no longer read.
        """
        layers = self._checkpointing() if torch.is_grad_enabled() else []
        functions = [layer._gradient_checkpointing_func for layer in layers]
        again = self._as_now()
        for layer, function in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = partial(
                function, use_reentrant=False, context_fn=lambda: (nullcontext(), Again(again))
            )
        try:
            yield
        finally:
            for layer, function in zip(layers, functions, strict=True):
                layer._gradient_checkpointing_func = function

    def _checkpointing(self) -> list[Any]:
        """The modules in which transformers looks whether to checkpoint, where they say yes."""
        return [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False) is True]

    @contextmanager
    def native_attention(self, attention: str | None = None) -> Iterator[nn.Module]:
        """The model outside packed batches, in eval mode and able to cache: for ``generate`` and rollouts.

        Args:
            attention: Name of the attention function to set; None: the one that the model came with.

        Yields:
            The model, which is as it was afterwards.
        """
        whole = self.transformer
        checkpointing = self._checkpointing()  # transformers' own switch would add a hook to a peft model each time
        with evaluating(self.model):
            tree.set_attention(whole, attention or self._own_attention)
            for module in checkpointing:
                module.gradient_checkpointing = False
            try:
                yield self.model
            finally:
                for module in checkpointing:
                    module.gradient_checkpointing = True
                tree.set_attention(whole, self._own_attention if self.layout == "padded" else tree.NAME)

    # ------------------------------------------------------------------------------------------------- layouts

    def _choose_layout(self, required: bool) -> None:
        """Runs a small batch down each layout and takes the first that equals the padded one."""
        batch = probe(self.transformer)
        whole = self.transformer
        reasons = []
        # dropout would differ; layers run what they run in training
        with evaluating(self.model), torch.no_grad():
            want = self._probed(batch)
            for layout in ("tree", "inject"):
                self.layout = layout
                tree.set_attention(whole, tree.NAME)
                if layout == "inject":
                    self._install_hooks()
                try:
                    with tree.noting_windows() as windows:
                        difference = ((self._probed(batch) - want).norm() / want.norm()).item()
                    self._run_checkpointed(batch)
                except Exception as error:  # a family may fail anywhere in its own code
                    reasons.append(f"{layout}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                else:
                    unseen = untried(whole, windows)
                    if difference < tolerance(whole) and unseen is None:
                        return
                    differ = f"hidden states differ by {difference:.1e} of their size"
                    reasons.append(f"{layout}: {unseen or differ}")
                self._remove_hooks()
        self.layout = "padded"
        tree.set_attention(whole, self._own_attention)
        message = f"{type(whole).__name__} can't take the tree layout ({'; '.join(reasons)})"
        if required:
            raise ValueError(f"{message}; use layout: auto or padded.")
        log.warning("%s: batches run padded, with equal results and more compute.", message)

    def _probed(self, batch: PackedBatch) -> Tensor:
        """All hidden states that any head reads."""
        states, predictor, last = self.hidden(batch)
        return states[torch.cat([predictor, last])].float()

    def _run_checkpointed(self, batch: PackedBatch) -> None:
        """Some families drop keywords only on the checkpointed path, which eval mode does not take."""
        if is_checkpointing(self.transformer):
            with torch.random.fork_rng(), torch.enable_grad(), evaluating(self.model, False):
                self.hidden(batch)

    def _install_hooks(self) -> None:
        def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            return None if self._forest is None else (args, {**kwargs, "forest": self._forest})

        for module in tree.attention_modules(self.transformer):
            self._hooks.append(module.register_forward_pre_hook(hand_over, with_kwargs=True))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class Again:
    """A context that can be entered many times, one after the other.

    Args:
        make: Makes it anew.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._context = self._make()
        self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._context.__exit__(kind, error, trace)


@contextmanager
def evaluating(module: nn.Module, on: bool = True) -> Iterator[None]:
    """Within it a module is in evaluation mode; afterwards each part is in the mode that it was in.

    Args:
        module: Whose parts may differ, such as a dropout that was switched off.
        on: False: in training mode.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.train(not on)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def keep_constants(model: PreTrainedModel) -> None:
    """Has a model run on fp32 constants, such as rotary frequencies, whoever casts it or has cast it.

    ``Module.to``, FSDP and DeepSpeed cast them with the weights. A frequency in bf16 is off by up to 0.4 %, which at
    token 2,000 is an angle of several radians.

    Args:
        model: Each of its modules gets its constants back before it runs, where their dtype has changed.
    """
    for name, module in model.named_modules():
        constants = {k: b for k, b in module.named_buffers(recurse=False) if b.is_floating_point()}
        kept = module.state_dict().keys() if constants else ()
        constants = {k: b for k, b in constants.items() if k not in kept}
        if any(b.dtype in (torch.bfloat16, torch.float16) for b in constants.values()):
            if next(module.parameters(), None) is not None or not hasattr(module, "config"):
                log.warning("%s is in half precision, and can't be made again: load the model anew.", name)
                continue
            again: Any = type(module)(config=module.config)  # rotary embeddings follow from the config
            constants = {k: getattr(again, k).to(b.device) for k, b in constants.items()}
            for k, value in constants.items():
                setattr(module, k, value)
        if constants:
            module.register_forward_pre_hook(partial(_restore, {k: b.clone() for k, b in constants.items()}))


def _restore(constants: dict[str, Tensor], module: nn.Module, args: Any) -> None:
    for name, value in constants.items():
        now: Tensor = getattr(module, name)
        if now.dtype != value.dtype:
            setattr(module, name, value.to(now.device))


def probe(model: PreTrainedModel) -> PackedBatch:
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


def untried(model: PreTrainedModel, windows: Collection[int | None]) -> str | None:
    """What a small trial can't show of a model, or None: masks that depend on a row's length.

    Args:
        model: That was tried.
        windows: What its layers gave as their sliding windows meanwhile.
    """
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        return f"it has layers of the type {min(strange)}"
    slides = getattr(config, "use_sliding_window", True) is not False and (not kinds or "sliding_attention" in kinds)
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and window not in windows:  # it may be wider than the trial
        return f"its layers don't say that they have a window of {window} tokens"
    return None


def tolerance(model: PreTrainedModel) -> float:
    """How far results may differ, by their size; half precision rounds differently in each layout."""
    return 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.05


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Gradient checkpointing in the form that works with frozen inputs and keyword arguments."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the other name goes away with transformers 6
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether :func:`enable_checkpointing` is in force; transformers 5 renamed the property."""
    new = "is_activation_checkpointing"
    return bool(getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing"))
