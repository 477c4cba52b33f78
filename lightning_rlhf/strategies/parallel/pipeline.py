"""Pipeline parallelism: each rank keeps some layers of a model, and passes hidden states on to the next rank.

Parameters of other stages stay in the module without elements, so names and the numbers of optimizer states are the
same on all ranks. The first stage has what runs before the layers, and the last one what runs behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.data import PackedBatch
from lightning_rlhf.models.backbone import Backbone, Hidden, evaluating, probe, tolerance
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.strategies.parallel.stage import PipelineStage, Tie, stand_in
from lightning_rlhf.utils.collectives import Ranks


class Held(NamedTuple):
    """A parameter of a model that is cut.

    Attributes:
        parameter: The parameter, without elements at other stages.
        shape: Its shape at the stages that hold it.
        stages: Those stages. Weights that are embeddings and head lie at both ends.
    """

    parameter: nn.Parameter
    shape: torch.Size
    stages: tuple[int, ...]


class _Running(NamedTuple):
    """A model's stage on this rank, with what it runs, and functions that undo it."""

    stage: PipelineStage
    trace: _Tracing
    undo: list[Callable[[], Any]]


class PipelineParallel:
    """Models whose layers are dealt to ranks, until :meth:`undo`.

    Args:
        ranks: The ranks that hold them together, in the order of their stages.
        device: Where ranks exchange tensors.
        micro_batches: Maximum number of micro-batches per forward pass. With m of them and p stages, ranks wait for
            ``(p - 1) / (m + p - 1)`` of the time.

    Attributes:
        active: Whether the models are cut now.
    """

    def __init__(self, ranks: Ranks, device: torch.device, micro_batches: int = 8) -> None:
        self.ranks, self.device, self.micro_batches = ranks, device, micro_batches
        self.active = True
        self._held: dict[int, Held] = {}
        self._running: list[_Running] = []

    def cut_models(self, module: nn.Module) -> None:
        """Cuts all models in a module, and moves them to the device. All ranks must call it.

        Each is tried on a few tokens before and after.

        Raises:
            ValueError: There is none, or one cannot be cut; the message says why. Others may be cut by then:
                :meth:`undo` makes them whole.
        """
        found = [part for part in module.modules() if isinstance(part, Backbone)]
        inside = {id(part) for backbone in found for part in backbone.modules()}
        if any(isinstance(part, PreTrainedModel) and id(part) not in inside for part in module.modules()) or not found:
            raise ValueError(
                f"pp={self.ranks.size} runs models that read packed batches (lightning_rlhf.models.Policy, RewardModel "
                f"and others), and {type(module).__name__} has {'others' if found else 'none'}. Leave out pp, or use "
                "tp, which cuts any transformers model."
            )
        for backbone in found:
            check_layers(backbone.transformer, self.ranks.size)
            if not getattr(backbone, "reads_last", True):
                raise ValueError(
                    f"{type(backbone.transformer).__name__} has no 'score' head behind its layers, so pp cannot cut "
                    "it. Use a decoder, or leave out pp."
                )
        for backbone in found:
            with _Tracing(backbone) as trace:
                want = _try(backbone)
            self._cut_model(backbone, trace)
            backbone.to(self.device)
            got = _try(backbone)
            difference = self._told((got - want).norm() / want.norm())  # only the last stage has the head's inputs
            if not difference < tolerance(backbone.transformer):
                raise ValueError(
                    f"{type(backbone.transformer).__name__} gives other results in {self.ranks.size} stages (relative "
                    f"difference {difference:.1e}): something runs between its layers. Leave out pp."
                )

    def _told(self, value: Tensor) -> float:
        """Returns the last stage's number."""
        told = value.to(self.device)
        dist.broadcast(told, self.ranks.members[-1], group=self.ranks.group)
        return told.item()

    # ------------------------------------------------------------------------------------------------- cutting

    def _cut_model(self, backbone: Backbone, trace: _Tracing) -> None:
        place, last = self.ranks.place, self.ranks.size - 1
        stage_of = {
            id(part): number
            for number, (start, end) in enumerate(stage_layers(len(trace.layers), self.ranks.size))
            for layer in trace.layers[start:end]
            for part in layer.modules()
        }
        stage_of |= {id(part): 0 for top in trace.front for part in top.modules()}
        inner = {id(part) for layer in trace.layers for part in layer.modules()}
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        stages: dict[int, set[int]] = {}
        names: dict[int, tuple[str, nn.Parameter]] = {}
        for path, part in backbone.named_modules():
            for name, parameter in part.named_parameters(recurse=False):
                names.setdefault(id(parameter), (f"{path}.{name}", parameter))
                stages.setdefault(id(parameter), set()).add(stage_of.get(id(part), last))
                owners.setdefault(id(parameter), []).append((part, name))
        ties = []
        for key, (name, parameter) in names.items():
            if len(stages[key]) > 1 and parameter.requires_grad:
                ends = all(isinstance(p, (nn.Linear, nn.Embedding)) and id(p) not in inner for p, _ in owners[key])
                if stages[key] != {0, last} or not ends:
                    raise ValueError(
                        f"pp cannot train {name} of {type(backbone.transformer).__name__}, which several stages share. "
                        "Only weights that are embeddings and head may be shared. Leave out pp."
                    )
                if place in stages[key]:
                    here = [(part, n) for part, n in owners[key] if stage_of.get(id(part), last) == place]
                    ties.append(Tie(parameter, here))
            if key not in self._held:  # models may share parameters
                self._held[key] = Held(parameter, parameter.shape, tuple(sorted(stages[key])))
                self._release(self._held[key])
        self._running.append(_Running(PipelineStage(backbone, self.ranks, self.micro_batches, ties), trace, []))
        self._install(self._running[-1])

    def _install(self, running: _Running) -> None:
        """Lets a model run its stage."""
        stage, trace, undo = running
        start, end = stage_layers(len(trace.layers), self.ranks.size)[self.ranks.place]
        width = stage.backbone.transformer.config.get_text_config().hidden_size

        def arrive(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (stage.received,) if trace.tuples else stage.received

        def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if trace.tuples else hidden_states

        def embed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Only the shape counts, because layers of the stages before return what was received."""
            return x if x.is_floating_point() else torch.zeros(*x.shape, width, dtype=stage.dtype, device=x.device)

        undo += [stand_in(layer, arrive) for layer in trace.layers[:start]]
        undo += [stand_in(layer, skip) for layer in trace.layers[end:]]
        if not stage.first:
            undo += [stand_in(part, embed) for part in trace.front]
        if not stage.last:
            undo += [stand_in(part, lambda x, *args, **kwargs: x) for part in trace.back]
        undo.append(stand_in(stage.backbone, stage.forward))
        if hasattr(stage.backbone, "noisy_embeddings"):
            vars(stage.backbone)["noisy_embeddings"] = stage.noisy_embeddings
            undo.append(lambda: vars(stage.backbone).pop("noisy_embeddings"))

    def _uninstall(self, running: _Running, wait: bool = True) -> None:
        """Lets a model run as it did."""
        if wait:
            running.stage.flush()
        while running.undo:
            running.undo.pop()()

    def _release(self, held: Held) -> None:
        """Takes a parameter's elements at other stages; its number of dimensions stays, by which weights decay."""
        if self.ranks.place not in held.stages:
            held.parameter.data = held.parameter.data.new_empty(0, *held.shape[1:])
            held.parameter.grad = None

    def _fill(self, held: Held) -> None:
        """Gives a parameter its elements at all stages. All ranks must call it."""
        parameter, source = held.parameter, held.stages[0]
        value = parameter.data.to(self.device).contiguous()
        if self.ranks.place not in held.stages:
            value = torch.empty(held.shape, dtype=value.dtype, device=self.device)
        dist.broadcast(value, self.ranks.members[source], group=self.ranks.group)
        if self.ranks.place not in held.stages:
            parameter.data = value.to(parameter.device)

    @contextmanager
    def whole_weights(self, child: nn.Module) -> Iterator[None]:
        """Within it, each rank can run a child's models alone. All ranks must enter and leave."""
        its, inside = ({id(each) for each in found} for found in (child.parameters(), child.modules()))
        held = [each for key, each in self._held.items() if key in its and self.active]
        chosen = [each for each in self._running if id(each.stage.backbone) in inside and self.active]
        for running in chosen:
            self._uninstall(running)
        for each in held:
            self._fill(each)
        try:
            yield
        finally:
            for each in held:
                self._release(each)
            for running in chosen:
                self._install(running)

    def undo(self, weights: bool) -> None:
        """Makes the models ordinary again, whole on every rank and on the CPU.

        Args:
            weights: Gather the weights. False if a rank may be lost; the weights are then lost too.
        """
        for running in self._running:
            self._uninstall(running, wait=weights)
        for held in self._held.values() if weights else ():
            held.parameter.data = held.parameter.data.cpu()
            self._fill(held)
            held.parameter.grad = None
        self.active = False

    # ------------------------------------------------------------------------------------------------- whole tensors

    def is_absent(self, parameter: Tensor) -> bool:
        """Whether only other stages hold a parameter."""
        return self.active and id(parameter) in self._held and self.ranks.place not in self._held[id(parameter)].stages

    def counts(self, parameter: Tensor) -> bool:
        """Whether a parameter counts on this rank, where each counts at one stage: the first that holds it."""
        held = self._held.get(id(parameter))
        return (0 if held is None else held.stages[0]) == self.ranks.place

    def collect(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Gathers what stages have, by name, at the first one. All ranks must call it.

        Args:
            values: Tensors and other objects. Where several stages have a name, the first one's counts.

        Returns:
            All of them at the first stage, tensors of other stages on the CPU; this stage's own at the others.
        """
        found = dict(values)
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in values.items() if name not in tensors}
        said = [(name, value.shape, value.dtype) for name, value in tensors.items()]
        every: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(every, (said, others), group=self.ranks.group)
        for place in range(1, self.ranks.size):
            known = {name for listed, plain in every[:place] for name in (*(n for n, _, _ in listed), *plain)}
            listed, plain = every[place]
            for name, shape, dtype in listed:
                if name in known:
                    continue
                if self.ranks.place == place:
                    dist.send(tensors[name].to(self.device).contiguous(), self.ranks.members[0], group=self.ranks.group)
                elif self.ranks.place == 0:
                    value = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(value, self.ranks.members[place], group=self.ranks.group)
                    found[name] = value.cpu()
            if self.ranks.place == 0:
                found |= {name: value for name, value in plain.items() if name not in known}
        return found

    def whole_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Gathers a module's state dict at the first stage, with its names in their order. All ranks must call it."""
        absent = self._absent_names(module)
        found = self.collect({name: value for name, value in state.items() if name not in absent})
        return {name: found[name] for name in (*state, *(found.keys() - state.keys())) if name in found}

    def part_state_dict(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a whole state dict with this stage's weights only; others have no elements."""
        absent = self._absent_names(module)
        return {name: absent[name].data if name in absent else value for name, value in state.items()}

    def _absent_names(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module.named_parameters(remove_duplicate=False) if self.is_absent(p)}

    def whole_optimizer_state(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Gathers an optimizer's state in torch's format at the first stage. All ranks must call it.

        Args:
            state: The optimizer's.
            parameters: Its parameters, in the order of its groups.
        """
        own = self.part_optimizer_state(state, parameters)["state"]
        flat = {(number, key): value for number, entry in own.items() for key, value in entry.items()}
        whole: dict[int, dict[str, Any]] = {}
        for (number, key), value in sorted(self.collect(flat).items(), key=lambda item: item[0][0]):
            whole.setdefault(number, {})[key] = value
        return {**state, "state": whole}

    def part_optimizer_state(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Returns an optimizer's state without that of other stages' parameters."""
        kept = {number: entry for number, entry in state["state"].items() if not self.is_absent(parameters[number])}
        return {**state, "state": kept}

    def check_trained(self, module: nn.Module) -> None:
        """Checks that each stage trains something, as torch's DDP wants it.

        Raises:
            ValueError: One does not; all ranks raise it.
        """
        trained = {place for held in self._held.values() if held.parameter.requires_grad for place in held.stages}
        if any(p.requires_grad and id(p) not in self._held for p in module.parameters()):
            return
        if idle := [place for place in range(self.ranks.size) if place not in trained]:
            raise ValueError(
                f"Stage {idle[0]} of pp={self.ranks.size} (from 0) trains none of its parameters, which plugin='ddp' "
                "does not support. Set plugin to zero1, or train layers of every stage."
            )

    @contextmanager
    def hiding(self) -> Iterator[None]:
        """Within it, parameters of other stages are frozen: what wraps the module now does not train them."""
        absent = [held.parameter for held in self._held.values() if self.is_absent(held.parameter)]
        trained = [parameter for parameter in absent if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad = False
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad = True


class _Tracing:
    """Notes what a model runs before and behind its layers, while it is entered.

    Attributes:
        layers: The layers.
        front: Outermost modules with parameters that are done before the first layer.
        back: The same, of those that run behind the layers.
        tuples: Whether a layer returns a tuple.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.layers = layers_of(backbone.transformer)
        self.front: list[nn.Module] = []
        self.back: list[nn.Module] = []
        self.tuples = False
        self._model, self._hooks = backbone.transformer, list[Any]()
        self._reached = False

    def __enter__(self) -> _Tracing:
        within = {id(part) for layer in self.layers for part in layer.modules()}
        for part in self._model.modules():
            holds_layers = any(id(inner) in within for inner in part.modules())
            if not holds_layers and next(part.parameters(), None) is not None:
                self._hooks.append(part.register_forward_hook(self._note))
        self._hooks.append(self.layers[0].register_forward_hook(self._note_layer))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, part: nn.Module, args: Any, output: Any) -> None:
        places = self.back if self._reached else self.front
        inner = {id(each) for each in part.modules()}
        places[:] = [each for each in places if id(each) not in inner] + [part]

    def _note_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._reached, self.tuples = True, isinstance(output, tuple)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Returns a model's layers, which it runs one after the other.

    Raises:
        ValueError: It has no plain list of them.
    """
    number = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == number]
    within = {id(part) for outer in lists for layer in outer for part in layer.modules()}
    found = [list(outer) for outer in lists if id(outer) not in within]
    if len(found) != 1 or len({type(layer) for layer in found[0]}) != 1:
        raise ValueError(
            f"{type(model).__name__} has no plain list of {number} layers, which pp could deal to ranks. Llama, "
            "Mistral, Qwen 2, Qwen 3, Gemma 2, GPT-NeoX and GPT-2 have one, for instance. Leave out pp."
        )
    return found[0]


def check_layers(model: PreTrainedModel, stages: int) -> None:
    """Checks that a model's layers can be dealt to stages.

    Raises:
        ValueError: It has too few, no plain list of them, or quantized weights.
    """
    number = len(layers_of(model))
    if stages > number:
        fits = "2" if number == 2 else f"2 to {number}"
        raise ValueError(
            f"pp={stages} is more than the {number} layers of {type(model).__name__}. "
            f"{f'Set pp to {fits}' if number > 1 else 'Leave out pp'}."
        )
    if is_quantized(model):
        raise ValueError(
            f"pp does not cut {type(model).__name__}, because its weights are quantized. Load it without quantization, "
            "or leave out pp."
        )


def stage_layers(layers: int, stages: int) -> list[tuple[int, int]]:
    """Returns each stage's first layer and the end of its layers. The last stage, which has the head, gets the fewest.

    Example:
        >>> stage_layers(7, 3)
        [(0, 3), (3, 5), (5, 7)]
    """
    ends = [-(-layers * stage // stages) for stage in range(stages + 1)]
    return list(pairwise(ends))


@torch.no_grad()
def _try(backbone: Backbone) -> Tensor:
    """Returns a model's results for a few tokens, behind the hidden states that its head reads, on the CPU."""
    predictors: list[Tensor] = []
    lasts: list[Tensor] = []

    def note(batch: PackedBatch) -> Hidden:
        found = type(backbone).hidden(backbone, batch)
        predictors.append(found.states[found.predictor].flatten())
        lasts.append(found.states[found.last].flatten())
        return found

    vars(backbone)["hidden"] = note
    try:
        with evaluating(backbone):
            out: Any = backbone(probe(backbone.transformer))
    finally:
        del vars(backbone)["hidden"]
    values = out if isinstance(out, tuple) else (out,)
    every = [*predictors, *lasts, *(value.flatten() for value in values if value is not None)]
    return torch.cat([value.float().cpu() for value in every])
