"""Runs transformers models on packed batches: chooses a layout and computes hidden states."""

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

from lightning_rlhf.data import Branch, PackedBatch, Tree, pack, pad
from lightning_rlhf.data.packed import Forest
from lightning_rlhf.models import tree_attention as tree

log = logging.getLogger(__name__)

Layout = Literal["tree", "inject", "padded"]
LayoutChoice = Literal["auto", "tree", "padded"]


class Hidden(NamedTuple):
    """Hidden states of a batch, in any layout.

    Attributes:
        states: (M, D), where M is T, or the number of positions in the padded batch.
        predictor: (N,) index into M of the position that predicts each scored token.
        last: (S,) index into M of each sequence's last token.
    """

    states: Tensor
    predictor: Tensor
    last: Tensor


class Backbone(nn.Module):
    """Base of the models that read packed batches. A subclass applies a head to the result of :meth:`hidden`.

    The attribute ``model`` is the given model; its attention is set to ``"tree"`` unless the layout is padded. The
    attribute ``layout`` is the chosen layout: ``tree``, ``inject`` (a tree that hooks pass to the attention layers, for
    model families that drop unknown keywords), or ``padded``.

    Args:
        model: A ``transformers`` decoder with any head, or a peft model around one.
        layout: ``auto`` tries the tree layout on a small batch and uses the padded layout if results differ; ``tree``
            raises an error in this case; ``padded`` does not try.

    Raises:
        ValueError: The model does not support ``layout="tree"``.
    """

    #: ColossalAI's strategy would cast inputs, and token weights would lose digits.
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
        """Runs the model without its head. Call it within ``forward``, where the hooks of wrappers run."""
        if self.layout == "padded":
            padded = pad(batch)
            with self._repeatable_checkpoints():
                # right padding needs no position ids, and some families do not accept them
                out = self._decoder(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False)
            states = out.last_hidden_state
            first = torch.arange(len(states), device=states.device) * states.shape[1]
            return Hidden(states.flatten(0, 1), first[padded.row] + padded.column, first + padded.last)
        inputs: dict[str, Any] = dict(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None])
        if self.layout == "tree":
            inputs["forest"] = batch.forest
        with self._on(batch.forest), self._repeatable_checkpoints():
            # with the cache on, packed positions would affect each other in transformers 5
            out = self._decoder(**inputs, use_cache=False)
        return Hidden(out.last_hidden_state[0], batch.predictor, batch.last)

    def trunk(self, batch: PackedBatch, *args: Any, **kwargs: Any) -> Hidden:
        """Runs what a call of ``forward`` with the same arguments runs before its head."""
        return self.hidden(batch)

    @contextmanager
    def _on(self, forest: Forest) -> Iterator[None]:
        """Within it, layers run on a forest. In the layout ``inject`` hooks pass it to them."""
        former, self._forest = self._forest, forest
        try:
            with tree.forest_active():
                yield
        finally:
            self._forest = former

    def _recompute_context(self) -> Callable[[], AbstractContextManager[None]]:
        """Returns a function that makes the context of this forward pass again, for layers that are recomputed."""
        forest = self._forest
        return nullcontext if forest is None else partial(self._on, forest)

    @contextmanager
    def _repeatable_checkpoints(self) -> Iterator[None]:
        """Within it, checkpointed layers are set to run in the same context again in the backward pass.

        transformers only takes torch's arguments for this when checkpointing is switched on, which users may do
        themselves. The attribute of the checkpointing function is the same in all supported versions; ``tests/models``
        compares gradients, and fails if it is no longer read.
        """
        layers = self._checkpointing() if torch.is_grad_enabled() else []
        functions = [layer._gradient_checkpointing_func for layer in layers]
        make = self._recompute_context()
        for layer, function in zip(layers, functions, strict=True):
            layer._gradient_checkpointing_func = partial(
                function, use_reentrant=False, context_fn=lambda: (nullcontext(), ReusableContext(make))
            )
        try:
            yield
        finally:
            for layer, function in zip(layers, functions, strict=True):
                layer._gradient_checkpointing_func = function

    def _checkpointing(self) -> list[Any]:
        """Returns the modules with gradient checkpointing."""
        return [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False) is True]

    @contextmanager
    def native_attention(self, attention: str | None = None) -> Iterator[nn.Module]:
        """Prepares the model for ``generate`` and rollouts: without packed batches, in eval mode, with its cache.

        Args:
            attention: Name of the attention function to set. None: the model's own.

        Yields:
            The model. Its state is restored afterwards.
        """
        whole = self.transformer
        checkpointing = self._checkpointing()  # transformers' switch would add a hook to a peft model each time
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
        """Runs a small batch in each layout and chooses the first with the same result as the padded layout."""
        batch = probe(self.transformer)
        whole = self.transformer
        reasons = []
        # without dropout, which would differ
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
                except Exception as error:  # a model may fail anywhere in its own code
                    reasons.append(f"{layout}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
                else:
                    unseen = reason_beyond_trial(whole, windows)
                    if difference < tolerance(whole) and unseen is None:
                        return
                    differ = f"the relative difference of hidden states is {difference:.1e}"
                    reasons.append(f"{layout}: {unseen or differ}")
                self._remove_hooks()
        self.layout = "padded"
        tree.set_attention(whole, self._own_attention)
        message = f"{type(whole).__name__} does not support the tree layout ({'; '.join(reasons)})"
        if required:
            raise ValueError(f"{message}. Use layout: auto or padded.")
        log.warning("%s: batches are padded. The results are the same, but slower.", message)

    def _probed(self, batch: PackedBatch) -> Tensor:
        """Returns all hidden states that a head may read."""
        states, predictor, last = self.hidden(batch)
        return states[torch.cat([predictor, last])].float()

    def _run_checkpointed(self, batch: PackedBatch) -> None:
        """Runs the batch with checkpointing, because some families drop keywords only then, and not in eval mode."""
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


class ReusableContext:
    """A context manager that can be entered several times in succession.

    Args:
        make: Makes a new context for each time.
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
    """Within it, a module is in evaluation mode. Afterwards each submodule is in its former mode.

    Args:
        module: The module. Its submodules may have different modes.
        on: Use evaluation mode. False: training mode.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.train(not on)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def keep_constants(model: PreTrainedModel) -> None:
    """Keeps constants of a model, such as rotary frequencies, in fp32, even if the model is cast.

    ``Module.to``, FSDP and DeepSpeed cast constants with the weights. A frequency in bf16 has an error of up to 0.4 %,
    which is an angle of several radians at token 2,000.

    Args:
        model: The model. Before a module runs, it gets its constants back if their data type has changed.
    """
    for name, module in model.named_modules():
        constants = {k: b for k, b in module.named_buffers(recurse=False) if b.is_floating_point()}
        kept = module.state_dict().keys() if constants else ()
        constants = {k: b for k, b in constants.items() if k not in kept}
        if any(b.dtype in (torch.bfloat16, torch.float16) for b in constants.values()):
            if next(module.parameters(), None) is not None or not hasattr(module, "config"):
                log.warning("The constants of %s are in half precision. Load the model again.", name)
                continue
            exact: Any = type(module)(config=module.config)  # rotary embeddings only depend on the config
            constants = {k: getattr(exact, k).to(b.device) for k, b in constants.items()}
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
    """Makes a small batch that shows differences of layouts: a tree with two branches and three other sequences."""
    vocabulary = vocabulary_size(model)
    ids = [(3 + 7 * i) % vocabulary for i in range(32)]
    rows: Sequence[Tree] = (
        Tree(ids[:5], [Branch(ids[5:9]), Branch(ids[9:12])]),
        Tree(ids[12:14], [Branch(ids[14:19])]),
        Tree(ids[19:21], [Branch(ids[21:26])]),
        Tree(ids[26:27], [Branch(ids[27:32])]),
    )
    return pack(rows).to(model.get_input_embeddings().weight.device)  # type: ignore[arg-type]


def vocabulary_size(model: PreTrainedModel) -> int:
    """Returns the number of embeddings of a model. Its weights may be a part of them (tensor parallelism)."""
    size: int = model.config.get_text_config().vocab_size
    return size


def reason_beyond_trial(model: PreTrainedModel, windows: Collection[int | None]) -> str | None:
    """Returns why a model may differ on rows longer than a short trial, or None.

    Args:
        model: The model that was tried.
        windows: Sliding windows that its layers passed during the trial.
    """
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if strange := set(kinds) - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {min(strange)}"
    slides = getattr(config, "use_sliding_window", True) is not False and (not kinds or "sliding_attention" in kinds)
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and window not in windows:  # it may be wider than the trial's rows
        return f"its layers do not pass their window of {window} tokens to the attention function"
    return None


def tolerance(model: PreTrainedModel) -> float:
    """Returns the largest relative difference to accept. Half precision rounds differently in each layout."""
    return 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.05


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Enables gradient checkpointing in the variant that supports frozen inputs and keyword arguments."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 6 removes the other name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is enabled. transformers 5 renamed the property."""
    new = "is_activation_checkpointing"
    return bool(getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing"))
