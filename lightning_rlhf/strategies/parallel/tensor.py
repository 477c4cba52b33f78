"""Tensor parallelism: each rank keeps a slice of every layer, and hooks sum over ranks (Shoeybi et al. 2019, sec. 3).

A slice is an ordinary parameter of a smaller shape, so optimizers, ZeRO, the scored head and ``torch.save`` take it as
it is. What is cut how comes from ``base_model_tp_plan`` of transformers' configs, which is only read: ``colwise``
layers are cut by outputs, ``rowwise`` ones by inputs, and their outputs are summed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.models.backbone import Backbone, evaluating, probe, tolerance
from lightning_rlhf.strategies.parallel.functions import join, part_of, sum_gradients, sum_outputs
from lightning_rlhf.strategies.parallel.noise import BlockNoise
from lightning_rlhf.strategies.parallel.vocab import cut_vocabulary
from lightning_rlhf.utils.collectives import Ranks

#: What runs, for messages.
_RUNS = "Llama, Mistral, Qwen 2, Qwen 3, Gemma, Gemma 2, GPT-NeoX, Phi, Granite and Cohere run, for instance"
#: Norms of queries and keys, which transformers 4.51 leaves out of its plans.
_HEAD_NORMS = ("q_norm", "k_norm")


class Cut(NamedTuple):
    """A parameter of which each rank holds a slice.

    Attributes:
        parameter: The slice.
        dim: The dimension that is cut.
        size: Its whole length.
    """

    parameter: Tensor
    dim: int
    size: int


class TensorParallel:
    """Models that are cut over ranks, until :meth:`undo`.

    Args:
        ranks: The ranks that hold them together.
        device: Where ranks exchange tensors.

    Attributes:
        active: Whether the models are cut now.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device, self.active = ranks, device, True
        self._cuts: dict[int, Cut] = {}
        self._undo: list[Callable[[], Any]] = []

    def cut_models(self, module: nn.Module) -> None:
        """Cuts all transformers models in a module, and moves them to the device. All ranks must call it.

        Each is tried on a few tokens before and after. In training all ranks must draw the same random numbers
        (:func:`~lightning_rlhf.strategies.parallel.noise.draw_alike`): dropout on whole activations is then the same.

        Raises:
            ValueError: There is none, or one cannot be cut; the message says why. Others may be cut by then:
                :meth:`undo` makes them whole.
        """
        around = {id(m.transformer): m for m in module.modules() if isinstance(m, Backbone)}
        inside: set[int] = set()
        found = []
        for part in module.modules():
            if isinstance(part, PreTrainedModel) and id(part) not in inside:
                inside.update(map(id, part.modules()))
                found.append(part)
        if not found:
            raise ValueError(
                f"tp={self.ranks.size} cuts transformers models, and {type(module).__name__} has none. Leave out tp."
            )
        for model in found:
            want = _try(around.get(id(model)), model)
            self._cut_model(model)
            model.to(self.device)  # type: ignore[arg-type]
            got = _try(around.get(id(model)), model)
            difference = ((got - want).norm() / want.norm()).item()
            if not difference < tolerance(model):
                raise ValueError(
                    f"{type(model).__name__} gives other results when it is cut over {self.ranks.size} ranks (relative "
                    f"difference {difference:.1e}): transformers' plan for it is incomplete. {_RUNS}. Leave out tp."
                )

    # ------------------------------------------------------------------------------------------------- cutting

    def _cut_model(self, model: PreTrainedModel) -> None:
        config, family = model.config.get_text_config(), type(model).__name__
        plan, decoder = plan_of(config, family), model.base_model
        check_divides(config, self.ranks.size, family)
        blocks: dict[str, _Block] = {}
        embeddings, styles = model.get_input_embeddings(), set()
        planned = []
        for name, layer in decoder.named_modules():
            style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
            if style is not None and layer is not embeddings:
                planned.append((name, layer, style))
        for name, layer, style in planned:
            at = name.rpartition(".")[0]
            if at not in blocks:
                blocks[at] = _Block(self, decoder.get_submodule(at))
                self.on_undo(*blocks[at].noise.install(blocks[at].module))
            if style == "colwise":
                self._cut_columns(layer, name, blocks[at])
            elif style == "rowwise":
                self._cut_rows(layer, name)
            elif style == "replicated_with_grad_allreduce":
                self._sum_parameter_gradients(layer)
            else:
                raise ValueError(
                    f"{type(model).__name__} cannot be cut: transformers' plan has {name} as {style!r}, which needs a "
                    f"cut by parts. {_RUNS}. Leave out tp."
                )
            styles.add(style)
        if not styles >= {"colwise", "rowwise"}:
            raise ValueError(
                f"{type(model).__name__} cannot be cut: transformers' plan {plan} fits none of its layers. {_RUNS}. "
                "Leave out tp."
            )
        for name, block in blocks.items():
            self._check_rest(model, name, block.module, {id(layer) for _, layer, _ in planned})
        if not cut_vocabulary(self, model):
            rank_zero_info(
                f"{type(model).__name__}: embeddings and head are whole on each rank, because they are no plain layers "
                "(rows for new tokens are trained beside adapters)."
            )

    def _check_rest(self, model: PreTrainedModel, name: str, block: nn.Module, planned: set[int]) -> None:
        """Looks at parameters of a block that the plan does not name: they meet activations of this rank's heads."""
        skipped: set[int] = set()
        for path, part in block.named_modules():
            if id(part) in planned:
                skipped.update(map(id, part.modules()))
            own = dict(part.named_parameters(recurse=False))
            if id(part) in skipped or not own:
                continue
            head_dim = getattr(model.config.get_text_config(), "head_dim", None)
            if path in _HEAD_NORMS and all(p.shape == (head_dim,) for p in own.values()):
                self._sum_parameter_gradients(part)
                continue
            raise ValueError(
                f"{type(model).__name__} cannot be cut: transformers' plan leaves out "
                f"{'.'.join(filter(None, (name, path, next(iter(own)))))}. {_RUNS}. Leave out tp."
            )

    def cut(self, parameter: Tensor, dim: int) -> None:
        """Keeps this rank's slice of a parameter, which may be tied to one that was cut before."""
        if id(parameter) in self._cuts:
            return
        size = parameter.shape[dim]
        self._cuts[id(parameter)] = Cut(parameter, dim, size)
        parameter.data = parameter.data.narrow(dim, *part_of(size, self.ranks)).clone()
        parameter.grad = None

    def size_of(self, parameter: Tensor, dim: int) -> int:
        """Returns the whole length of a dimension."""
        found = self._cuts.get(id(parameter))
        return parameter.shape[dim] if found is None or found.dim != dim else found.size

    def _cut_columns(self, layer: nn.Module, name: str, block: _Block) -> None:
        """Cuts a linear layer's outputs. Of adapters B is cut, and A is whole."""
        for linear, downs, ups in _linears(layer, name):
            self._cut_outputs(linear)
            self._enter(linear, block.share)
            for up in ups:
                self._cut_outputs(up)
                self._enter(up, lambda x: sum_gradients(x, self.ranks))
            if downs:  # the adapters' dropout is on whole activations
                self.on_undo(*block.noise.exclude(layer))

    def cut_head(self, head: nn.Module) -> None:
        """Cuts a head's outputs. Adapters are added to its weight, so gradients of A are partial, and summed."""
        for linear, downs, ups in _linears(head, "the head"):
            for each in (linear, *ups):
                self._cut_outputs(each)
            for down in downs:
                self._sum_parameter_gradients(down)
        self._enter(head, lambda x: sum_gradients(x, self.ranks))

    def _cut_outputs(self, linear: nn.Linear) -> None:
        self.cut(linear.weight, 0)
        if linear.bias is not None:
            self.cut(linear.bias, 0)

    def _enter(self, layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to a layer's input."""
        self.on_undo(layer.register_forward_pre_hook(lambda module, args: (function(args[0]), *args[1:])).remove)

    def _cut_rows(self, layer: nn.Module, name: str) -> None:
        """Cuts a linear layer's inputs. Of adapters A is cut, and B is whole."""
        for linear, downs, _ in _linears(layer, name):
            for each in (linear, *downs):
                self._cut_inputs(each)

    def _cut_inputs(self, linear: nn.Linear) -> None:
        self.cut(linear.weight, 1)
        ranks = self.ranks

        def forward(x: Tensor) -> Tensor:
            out = sum_outputs(nn.functional.linear(x, linear.weight), ranks)
            return out if linear.bias is None else out + linear.bias.to(out.dtype)  # once, behind the sum

        vars(linear)["forward"] = forward
        self.on_undo(lambda: delattr(linear, "forward"))

    def _sum_parameter_gradients(self, layer: nn.Module) -> None:
        """Sums gradients of whole parameters of which each rank computes a part, such as norms of its own heads."""
        ranks = self.ranks

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(gradient, group=ranks.group)
            return gradient

        for parameter in layer.parameters():
            if parameter.requires_grad:
                self.on_undo(parameter.register_hook(summed).remove)

    def on_undo(self, *actions: Callable[[], Any]) -> None:
        """Notes what :meth:`undo` does, last things first."""
        self._undo += actions

    def undo(self, weights: bool) -> None:
        """Makes the models ordinary again, whole on every rank and on the CPU.

        Args:
            weights: Gather the weights. False if a rank may be lost; the weights are then lost too.
        """
        while self._undo:
            self._undo.pop()()
        for parameter, _, _ in self._cuts.values() if weights else ():
            parameter.data = self.whole(parameter, parameter.data).cpu()
            parameter.grad = None
        self.active = False

    # ------------------------------------------------------------------------------------------------- whole tensors

    def is_cut(self, parameter: Tensor) -> bool:
        """Whether this rank holds a slice of a parameter."""
        return id(parameter) in self._cuts

    def whole(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Gathers a parameter, its gradient or one of its optimizer states. All ranks must call it.

        Args:
            parameter: The parameter.
            value: This rank's slice, or anything if the parameter is not cut.
        """
        found = self._cuts.get(id(parameter))
        if found is None or value.shape != self._shape(found):
            return value
        return join(value.to(self.device), found.dim, found.size, self.ranks).to(value.device)

    def slice(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Returns this rank's slice of a whole value. A value of another shape is returned as it is."""
        found = self._cuts.get(id(parameter))
        if found is None or value.shape != self._shape(found, whole=True):
            return value
        return value.narrow(found.dim, *part_of(found.size, self.ranks))

    def _shape(self, found: Cut, whole: bool = False) -> tuple[int, ...]:
        shape = list(found.parameter.shape)  # after undo it is whole
        shape[found.dim] = found.size if whole else part_of(found.size, self.ranks)[1]
        return tuple(shape)

    def whole_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Gathers a module's state dict. All ranks must call it, with the same names."""
        return {name: self.whole(*found) for name, found in self._with_parameters(module, state)}

    def slice_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state dict with this rank's slices of whole weights."""
        return {name: self.slice(*found) for name, found in self._with_parameters(module, state)}

    def _with_parameters(self, module: nn.Module, state: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
        named = dict(module.named_parameters(remove_duplicate=False)) if self.active else {}
        yield from ((name, (named.get(name), value)) for name, value in state.items())

    def whole_optimizer_state(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Gathers an optimizer's state in torch's format. All ranks must call it.

        Args:
            state: The optimizer's.
            parameters: Its parameters, in the order of its groups.
        """
        return self._map_optimizer_state(self.whole, state, parameters)

    def slice_optimizer_state(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Returns an optimizer's state with this rank's slices of whole tensors."""
        return self._map_optimizer_state(self.slice, state, parameters)

    @staticmethod
    def _map_optimizer_state(
        function: Callable[[Tensor, Tensor], Tensor], state: dict[str, Any], parameters: Sequence[Tensor]
    ) -> dict[str, Any]:
        found = {
            number: {k: function(parameters[number], v) if isinstance(v, Tensor) else v for k, v in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": found}


class _Block:
    """Layers beside each other that read the same input, such as those of queries, keys and values.

    Args:
        cutter: What cuts them.
        module: Their parent.
    """

    def __init__(self, cutter: TensorParallel, module: nn.Module) -> None:
        self.module, self.noise = module, BlockNoise(cutter.ranks)
        self._ranks = cutter.ranks
        self._last: tuple[Tensor, Tensor] | None = None

        def leave(*call: Any) -> None:
            self._last = None

        cutter.on_undo(module.register_forward_hook(leave, always_call=True).remove)

    def share(self, x: Tensor) -> Tensor:
        """As :func:`sum_gradients`, but once for all layers that read the same tensor."""
        if self._last is None or self._last[0] is not x:
            self._last = x, sum_gradients(x, self._ranks)
        return self._last[1]


def _linears(layer: nn.Module, name: str) -> Iterator[tuple[nn.Linear, list[Any], list[Any]]]:
    """Yields the plain linear layers of a layer that peft may have wrapped, with their adapters' A and B.

    Raises:
        ValueError: There is something else.
    """
    copies = getattr(layer, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):  # peft's copies that are trained in full
        for each in (layer.original_module, *copies.values()):
            yield from _linears(each, name)  # type: ignore[arg-type]
        return
    base: Any = getattr(layer, "base_layer", layer)
    if type(base) is not nn.Linear:
        raise ValueError(
            f"Tensor parallelism cuts plain linear layers, but {name} is a {type(base).__name__}. Load the model "
            "without quantization, or leave out tp."
        )
    if base is layer:
        yield base, [], []
        return
    if getattr(layer, "lora_magnitude_vector", None):
        raise ValueError(
            f"Tensor parallelism does not cut DoRA's adapters ({name}): their norms run over whole weights. Set "
            "lora.dora to false, or leave out tp."
        )
    if not hasattr(layer, "lora_A"):
        raise ValueError(f"Tensor parallelism cuts LoRA's adapters, but {name} is a {type(layer).__name__}.")
    yield base, list(layer.lora_A.values()), list(layer.lora_B.values())  # type: ignore[operator]


def plan_of(config: Any, name: str) -> dict[str, str]:
    """Returns how a family's layers are cut: styles by names of modules in the decoder, with ``*`` for numbers.

    Args:
        config: The text model's.
        name: The model's, for the message.

    Raises:
        ValueError: This version of transformers has no plan for it.
    """
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"{name} cannot be cut: transformers has no tensor-parallel plan for it. {_RUNS}. Leave out tp."
        )
    return dict(plan)


def check_divides(config: Any, size: int, name: str) -> None:
    """Checks that heads and inner width can be dealt to ranks evenly.

    Args:
        config: The text model's.
        size: Number of ranks.
        name: The model's, for the message.

    Raises:
        ValueError: They cannot; the message has the numbers that would do.
    """
    heads: int = config.num_attention_heads
    numbers = {
        "attention heads": heads,
        "key-value heads": getattr(config, "num_key_value_heads", None) or heads,
    }
    if isinstance(inner := getattr(config, "intermediate_size", None), int):
        numbers["features of the inner layers"] = inner
    wrong = [f"{number} {name}" for name, number in numbers.items() if number % size]
    if wrong:
        fits = [str(k) for k in range(2, heads + 1) if not any(number % k for number in numbers.values())]
        raise ValueError(
            f"tp={size} does not divide the {' and the '.join(wrong)} of {name}. "
            f"{'Set tp to ' + ' or '.join(fits) if fits else 'No tp does: leave it out'}."
        )


@torch.no_grad()
def _try(around: Backbone | None, model: PreTrainedModel) -> Tensor:
    """Returns a model's output for a few tokens, on the CPU: logits, or hidden states if it is no language model."""
    whole: Any = model if model.get_output_embeddings() is not None else model.base_model
    with evaluating(model) if around is None else around.native_attention():
        out: Tensor = whole(input_ids=probe(model).input_ids[None], use_cache=False)[0]
    return out.float().cpu()
