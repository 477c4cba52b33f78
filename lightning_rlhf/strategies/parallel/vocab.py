"""Embeddings and head whose vocabulary is cut over ranks; its size need not be divisible.

The scored head of :mod:`lightning_rlhf.functional.logprobs` reads a rank's part of the weight, and exchanges two small
tensors per block of logits. Called as a module, for instance by ``generate``, the head returns all logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_rlhf.functional.logprobs import VocabularySlice
from lightning_rlhf.strategies.parallel.functions import join_outputs, part_of, sum_outputs
from lightning_rlhf.strategies.parallel.stage import stands_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_rlhf.strategies.parallel.tensor import TensorParallel


def cut_vocabulary(cutter: TensorParallel, model: PreTrainedModel) -> bool:
    """Cuts embeddings and head, unless they have rows that are trained apart from the others.

    Args:
        cutter: Notes what is cut.
        model: The model.

    Returns:
        Whether they are cut.
    """
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    base: Any = getattr(head, "base_layer", head)  # under LoRA
    if not isinstance(embeddings, nn.Embedding) or not (base is None or isinstance(base, nn.Linear)):
        return False
    _cut_embeddings(cutter, embeddings)
    if head is not None:
        weight: Tensor = base.weight  # type: ignore[union-attr]
        size = cutter.size_of(weight, 0)
        cutter.cut_head(head)
        _join_logits(cutter, head, size)
    return True


def _cut_embeddings(cutter: TensorParallel, embeddings: nn.Embedding) -> None:
    """Cuts the rows: tokens of other ranks are looked up as zeros, and the rows of all ranks are summed.

    It works by hooks around the module, because some families scale what their embeddings look up (Gemma).
    """
    ranks = cutter.ranks
    cutter.cut(embeddings.weight, 0)
    start, length = part_of(cutter.size_of(embeddings.weight, 0), ranks)
    padding = embeddings.padding_idx
    if padding is not None:  # its row gets no gradient; at other ranks the number is another token's
        embeddings.padding_idx = padding - start if start <= padding < start + length else None
        cutter.on_undo(lambda: setattr(embeddings, "padding_idx", padding))
    held: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> Any:
        local = args[0] - start
        held[:] = [(local >= 0) & (local < length)]
        return (local.clamp(0, length - 1), *args[1:])

    def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        here = held.pop()
        if stands_in(module):  # another stage of a pipeline looks tokens up
            return out
        return sum_outputs(torch.where(here[..., None], out, 0.0), ranks)

    cutter.on_undo(embeddings.register_forward_pre_hook(before).remove)
    # before hooks that add to embeddings (NEFTune), which are registered later
    cutter.on_undo(embeddings.register_forward_hook(after).remove)


def _join_logits(cutter: TensorParallel, head: Any, size: int) -> None:
    ranks = cutter.ranks
    start, _ = part_of(size, ranks)
    head.vocabulary_slice = VocabularySlice(start, -(-size // ranks.size), ranks.group)
    cutter.on_undo(lambda: delattr(head, "vocabulary_slice"))
    cutter.on_undo(head.register_forward_hook(lambda module, args, out: join_outputs(out, size, ranks)).remove)
