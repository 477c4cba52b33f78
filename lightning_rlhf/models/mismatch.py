"""Says in a line why the weights of a checkpoint do not fit a run's models: LoRA, critic, vocabulary, another base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Shapes of weights by their names in a state dict.
Shapes = Mapping[str, tuple[int, ...]]
#: Numbers of one weight that :func:`sample_frozen` keeps.
SAMPLES = 4
_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?:embedding_)?A\.(?P<adapter>[^.]+)(?:\.weight)?")
_SAVED_WHOLE = re.compile(r"(?P<layer>.+)\.modules_to_save\.[^.]+\..+")
_LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")
_VOCABULARY = re.compile(r"embed|lm_head|\bwte\b")
#: What to do else.
OTHER_RUN = "start a new run with what that run exported (its hf/best or hf/last) as pretrained"


def shapes_of(state: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a state dict."""
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def explain_mismatch(saved: Shapes, own: Shapes) -> str | None:
    """Says what differs between a checkpoint's weights and a run's, and what to do.

    Args:
        saved: Shapes of the checkpoint's weights.
        own: Shapes of the weights of the run's models.

    Returns:
        Two sentences; None where names and shapes are the same.
    """
    if saved == own:
        return None
    there, here, mend = _find_difference(saved, own)
    return f"It was made {there}, and this run has {here}. {mend}, or {OTHER_RUN}."


def _find_difference(saved: Shapes, own: Shapes) -> tuple[str, str, str]:
    """What the checkpoint was made with, what the run has, and how the run gets the same."""
    was, now = _Adapters.of(saved), _Adapters.of(own)
    if was.ranks and not now.ranks:
        return f"with LoRA of rank {_list(was.ranks)}", "none", f"Set lora with r={_list(was.ranks)}"
    if now.ranks and not was.ranks:
        return "without LoRA", f"LoRA of rank {_list(now.ranks)}", "Leave out lora"
    critics = _critic(saved), _critic(own)
    if critics[0] != critics[1]:
        mend = f"Set critic.kind to {critics[0]}" if critics[0] else "Leave out the critic"
        return _with(critics[0], "critic.kind={}", "a critic"), critics[1] or "none", mend
    if was.ranks != now.ranks:
        mend = f"Set lora.r to {_list(was.ranks)}"
        return f"with LoRA of rank {_list(was.ranks)}", f"rank {_list(now.ranks)}", mend
    if was.targets != now.targets:
        mend = f"Set lora.targets to [{_list(was.targets)}]"
        return f"with LoRA on {_list(was.targets)}", f"it on {_list(now.targets)}", mend
    if was.dora != now.dora:
        mend = f"Set lora.dora to {str(was.dora).lower()}"
        return f"with{'' if was.dora else 'out'} DoRA", "it" if now.dora else "none", mend
    if was.whole != now.whole:
        mend = f"Set lora.modules_to_save to [{_list(was.whole)}]"
        return _with(_list(was.whole), "{} trained whole", "layers trained whole"), _list(now.whole) or "none", mend
    if was.rows != now.rows:
        mend = "Give the same tokenizer and chat_template"
        return f"with {was.rows or 'no'} new tokens to train", str(now.rows or "none"), mend
    common = [name for name in own if name in saved and saved[name] != own[name]]
    if common and all(_VOCABULARY.search(name) and saved[name][1:] == own[name][1:] for name in common):
        rows = saved[common[0]][0], own[common[0]][0]
        return f"with {rows[0]} embeddings", str(rows[1]), "Give the same pretrained, tokenizer and chat_template"
    layers = _count_layers(saved), _count_layers(own)
    if layers[0] != layers[1] and all(layers):
        return f"with a model of {layers[0]} layers", f"one of {layers[1]}", "Give the same pretrained"
    if common:
        name = common[0]
        return f"with {name} of shape {saved[name]}", f"shape {own[name]}", "Give the same model"
    lost, extra = [name for name in own if name not in saved], [name for name in saved if name not in own]
    return _with(_first(extra), "{}", "weights besides"), _first(lost) or "none of it", "Give the same models"


class _Adapters(NamedTuple):
    """What names and shapes tell of adapters."""

    ranks: list[int]
    targets: list[str]
    dora: bool
    whole: list[str]
    rows: int

    @classmethod
    def of(cls, shapes: Shapes) -> _Adapters:
        """Reads them."""
        found = {name: match for name in shapes if (match := _ADAPTER.fullmatch(name))}
        whole = (match["layer"] for name in shapes if (match := _SAVED_WHOLE.fullmatch(name)))
        return cls(
            sorted({shapes[name][0] for name in found}),
            _ends(match["layer"] for match in found.values()),
            any(".lora_magnitude_vector." in name for name in shapes),
            _ends(whole),
            max((shape[0] for name, shape in shapes.items() if ".trainable_tokens_delta." in name), default=0),
        )


def _critic(shapes: Shapes) -> str | None:
    """The kind of a critic."""
    if any(name.startswith("critic.") for name in shapes):
        return "separate"
    if not any(name.startswith("policy.value_head.") for name in shapes):
        return None
    matches = (_ADAPTER.fullmatch(name) for name in shapes)
    return "adapter" if any(match and match["adapter"].rstrip("_") == "critic" for match in matches) else "head"


def _count_layers(shapes: Shapes) -> int:
    return 1 + max((int(found[1]) for name in shapes if (found := _LAYER.search(name))), default=-1)


def _ends(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _with(value: str | None, text: str, without: str) -> str:
    return f"with {text.format(value)}" if value else f"without {without}"


def _first(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" if names else ""


# ------------------------------------------------------------------------------------------------- frozen weights


@torch.no_grad()
def sample_frozen(module: nn.Module) -> dict[str, Tensor]:
    """A few numbers of each frozen weight that ``pretrained`` brought: a checkpoint holds none of them.

    Args:
        module: A stage whose models are whole on this device.

    Returns:
        By name up to :data:`SAMPLES` numbers each, on the CPU. Adapters are not among them, nor packed integers.
    """
    held: dict[str, Tensor] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad or ".lora_" in name or not weight.is_floating_point() or not weight.numel():
            continue
        flat = weight.detach().reshape(-1)
        held[name] = flat[:: -(-len(flat) // SAMPLES)]
    return {name: values.cpu().clone() for name, values in held.items()}


def other_frozen(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """The name of the first frozen weight whose numbers are not those of a checkpoint's run, if any.

    Numbers may round apart: adapters are merged into their base as it is loaded, and it may be held in another dtype.
    """
    for name in own:
        if name not in saved or saved[name].shape != own[name].shape:
            continue
        a, b = saved[name].double(), own[name].double()
        finest = max(torch.finfo(saved[name].dtype).eps, torch.finfo(own[name].dtype).eps)
        if (a - b).abs().max() > 8 * finest * max(a.abs().max(), b.abs().max()):
            return name
    return None
