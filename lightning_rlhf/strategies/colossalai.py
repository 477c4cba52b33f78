"""ColossalAI's ZeRO and Gemini as a Lightning strategy that boosts the children of a module one by one; and DDP."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_rlhf.strategies import checkpoints
from lightning_rlhf.strategies.precision import ColossalAIPrecision, Plugin, clip_grad_norm
from lightning_rlhf.strategies.sharded import (
    Boosted,
    GeminiBoosted,
    ShardedOptimizer,
    ZeroBoosted,
    is_kept,
    named_buffers,
)

#: What Lightning registers, with the arguments each stands for.
NAMES: dict[str, dict[str, Any]] = {
    "colossalai": {"plugin": "zero2"},
    "colossalai_ddp": {"plugin": "ddp"},
    "colossalai_ddp_find_unused_parameters_true": {"plugin": "ddp", "find_unused_parameters": True},
    "colossalai_zero1": {"plugin": "zero1"},
    "colossalai_zero2": {"plugin": "zero2"},
    "colossalai_zero2_offload": {"plugin": "zero2", "cpu_offload": True},
    "colossalai_gemini": {"plugin": "gemini"},
    "colossalai_gemini_offload": {"plugin": "gemini", "offload_optim_frac": 1.0, "offload_param_frac": 1.0},
    "colossalai_notebook": {"plugin": "zero2", "start_method": "fork"},
}
INSTALL = (
    "pip install einops galore_torch psutil click rich contexttimer pydantic ninja && "
    "pip install --no-deps colossalai==0.5.0"
)


class ColossalAIStrategy(DDPStrategy):
    """Shards what training keeps of a model over ranks, by ColossalAI, for any LightningModule.

    * ``ddp`` splits nothing: it is Lightning's own DDP, around the whole module, with all of its precisions; gradients
      are exchanged once a step.
    * ``zero1`` splits optimizer states; 32-true, bf16, 16-mixed; once a step.
    * ``zero2`` splits gradients too; they are exchanged after each backward pass.
    * ``gemini`` splits weights too, by chunks that each pass gathers; bf16 and 16-mixed.

    Under all but ``ddp`` each optimizer must train parameters of one child module, and each such child has one
    optimizer; children that none trains (references, metrics) are whole on every rank. The module itself is not
    wrapped: a boosted child keeps its class, its names and its place, and its forward passes run through the plugin.
    After ``fit`` all is an ordinary module again, whole on every rank.

    Args:
        plugin: What is split. See ``docs/strategies.md`` for how to choose.
        checkpoint: ``full``: one file, collected on rank 0, that needs no ColossalAI. ``sharded``: a directory of one
            file a rank, which costs no rank more memory than it has in use; any number of ranks reads it.
        cpu_offload: ZeRO: optimizer states and fp32 weights lie in the CPU's memory and are stepped there. Frees 12
            bytes a parameter and rank; costs a copy of gradients and weights each step, and a slower step.
        overlap_communication: ZeRO: reduce gradients while the backward pass goes on. Costs memory for buckets in
            flight.
        bucket_elements: ZeRO: gradients reduced in one exchange, in elements.
        placement: Gemini: ``static``: by the three fractions; ``auto``: by the memory that the first step leaves free.
        shard_param_frac: Gemini, static: share of the weights that is split over ranks. 1 saves most and gathers
            weights in each pass; 0 keeps them whole, as ZeRO-2 does.
        offload_optim_frac: Gemini, static: share of optimizer states and fp32 weights in the CPU's memory, stepped
            there. Raise it first where memory lacks: each step is slower, passes are not.
        offload_param_frac: Gemini, static: share of the weights in the CPU's memory. Needs the two others to be 1;
            each pass waits for copies.
        warmup_non_model_data_ratio: Gemini, auto: share of memory kept for activations in the first step.
        steady_cuda_cap_ratio: Gemini, auto: share of the rest that weights may take later.
        pin_memory: Gemini: lock the CPU's copies, which copies faster and leaves that memory to nobody else.
        max_prefetch: Gemini: chunks gathered ahead of their use; each costs its size.
        min_chunk_elements: Gemini: smallest chunk, in elements. Small models need small ones to be split at all.
        find_unused_parameters: ddp: look for parameters that a pass left out, as modules that step by hand always have
            it: their passes differ.
        initial_scale: 16-mixed: first factor against underflow.
        accelerator: Lightning's own, as the following.
        parallel_devices: One a process.
        cluster_environment: Where ranks come from.
        checkpoint_io: Writes and reads files.
        precision_plugin: Rather set ``Trainer(precision=...)``.
        process_group_backend: ``nccl`` on GPUs, ``gloo`` on CPUs.
        timeout: Of an exchange: when a rank is gone, the others end after it.
        start_method: ``popen``: the script runs once a rank; ``fork`` in notebooks; ``spawn``.

    Raises:
        ValueError: Arguments that do not fit together.
        ModuleNotFoundError: ColossalAI isn't installed (when the run starts).
    """

    strategy_name = "colossalai"

    def __init__(
        self,
        plugin: Plugin = "zero2",
        checkpoint: Literal["full", "sharded"] = "full",
        cpu_offload: bool = False,
        overlap_communication: bool = True,
        bucket_elements: int = 12 * 2**20,
        placement: Literal["static", "auto"] = "static",
        shard_param_frac: float = 1.0,
        offload_optim_frac: float = 0.0,
        offload_param_frac: float = 0.0,
        warmup_non_model_data_ratio: float = 0.8,
        steady_cuda_cap_ratio: float = 0.9,
        pin_memory: bool = False,
        max_prefetch: int = 0,
        min_chunk_elements: int = 2**20,
        find_unused_parameters: bool = False,
        initial_scale: float = 2.0**16,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        if plugin not in get_args(Plugin):
            later = " Tensor and pipeline parallelism are not here yet." if str(plugin) == "hybrid" else ""
            raise ValueError(f"plugin={plugin!r} is none of {', '.join(get_args(Plugin))}.{later}")
        if checkpoint not in ("full", "sharded"):
            raise ValueError(f"checkpoint={checkpoint!r} is neither full nor sharded.")
        if checkpoint == "sharded" and plugin == "ddp":
            raise ValueError("checkpoint='sharded' has nothing to split under plugin='ddp': use full.")
        fractions = (shard_param_frac, offload_optim_frac, offload_param_frac)
        if not all(0 <= fraction <= 1 for fraction in fractions):
            raise ValueError(
                f"shard_param_frac, offload_optim_frac and offload_param_frac are shares, got {fractions}."
            )
        if offload_param_frac and (shard_param_frac, offload_optim_frac) != (1, 1):
            raise ValueError(
                "offload_param_frac needs shard_param_frac=1 and offload_optim_frac=1: Gemini ignores it else."
            )
        if cpu_offload and plugin not in ("zero1", "zero2"):
            raise ValueError(f"cpu_offload is ZeRO's, not that of plugin={plugin!r}: Gemini has offload_optim_frac.")
        if plugin != "gemini" and (fractions != (1, 0, 0) or placement != "static"):
            raise ValueError(f"placement and the three fractions are Gemini's, not those of plugin={plugin!r}.")
        self.plugin_name, self.checkpoint = plugin, checkpoint
        self.cpu_offload, self.overlap_communication = cpu_offload, overlap_communication
        self.bucket_elements, self.initial_scale = bucket_elements, initial_scale
        self.placement, self.shard_param_frac = placement, shard_param_frac
        self.offload_optim_frac, self.offload_param_frac = offload_optim_frac, offload_param_frac
        self.warmup_non_model_data_ratio, self.steady_cuda_cap_ratio = (
            warmup_non_model_data_ratio,
            steady_cuda_cap_ratio,
        )
        self.pin_memory, self.max_prefetch, self.min_chunk_elements = pin_memory, max_prefetch, min_chunk_elements
        self.boosted: list[Boosted] = []
        self._last: list[Boosted] = []  # whom the last backward pass reached
        self._failed = False
        self._shards: checkpoints.Shards | None = None
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
        )

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers :data:`NAMES`."""
        for name, arguments in NAMES.items():
            if name not in strategy_registry:
                strategy_registry.register(name, cls, description=f"ColossalAI, {arguments}", **arguments)

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts: gradients are then not those of ``parameter.grad``."""
        return self.plugin_name != "ddp"

    @property
    def loss_scale(self) -> float:
        """The largest factor that a plugin multiplies losses by; 1 where none does."""
        return max((boosted.scale for boosted in self.boosted), default=1.0)

    # ------------------------------------------------------------------------------------------------- set-up

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's own under ddp, else a :class:`ColossalAIPrecision`."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # Lightning's connector makes one of its own for any strategy that it does not know
        if plugin is not None and self.sharded and not isinstance(plugin, ColossalAIPrecision):
            plugin = ColossalAIPrecision(str(plugin.precision), self.plugin_name)
        self._precision_plugin = plugin

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Pieces are there to be filled only then."""
        return self.sharded or super().restore_checkpoint_after_setup

    def setup_environment(self) -> None:
        """Starts the process group.

        Raises:
            ModuleNotFoundError: ColossalAI isn't installed, and the plugin needs it.
        """
        if self.sharded and importlib.util.find_spec("colossalai") is None:
            raise ModuleNotFoundError(
                f"strategy='colossalai_...' needs ColossalAI: {INSTALL} (docs/strategies.md has other environments)",
                name="colossalai",
            )
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Builds the plugin and boosts the children that optimizers train; outside ``fit`` only moves the module.

        Raises:
            ValueError: Optimizers and children that don't match, a module that overrides ``backward``, or a callback
                that reads weights that are in pieces.
        """
        module = self.lightning_module
        assert self.accelerator is not None and module is not None
        self._failed = False
        if trainer.state.fn != TrainerFn.FITTING or not self.sharded:
            super().setup(trainer)
            return
        if is_overridden("backward", module):
            raise ValueError(f"{type(module).__name__} overrides backward, which ColossalAI makes itself.")
        self._refuse_callbacks(trainer)
        self.accelerator.setup(trainer)
        if self._layer_sync:  # Trainer(sync_batchnorm=True)
            self.model = self._layer_sync.apply(module)
        self.precision_plugin.convert_module(module)
        self._as_on_rank_zero(module)
        self.setup_optimizers(trainer)
        pairs = trained_children(module, self.optimizers)
        self._move_others(module, [child for _, child in pairs])
        self._boost(pairs)
        self.optimizers = [ShardedOptimizer(b) for b in self.boosted]
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Under ddp: wraps the module."""
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization:  # a loss may be one network's of several
            self._ddp_kwargs["find_unused_parameters"] = True  # what it hands to torch's DDP; nothing public changes it
        super().configure_ddp()

    def _refuse_callbacks(self, trainer: Trainer) -> None:
        """Refuses Lightning's own callbacks that would fail later, when compute is spent.

        Raises:
            ValueError: There is one.
        """
        refused: dict[type, str] = {BackboneFinetuning: "has more parameters train than ColossalAI split at the start"}
        if self.plugin_name == "gemini":
            reads = "reads whole weights while training, and Gemini holds them in pieces"
            refused |= {StochasticWeightAveraging: reads, WeightAveraging: reads}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for kind, reason in refused.items():
                if isinstance(callback, kind):
                    other = "zero2 or ddp" if kind is not BackboneFinetuning else "ddp"
                    raise ValueError(f"{type(callback).__name__} {reason}: use {other}, or leave the callback out.")

    def _as_on_rank_zero(self, module: nn.Module) -> None:
        """What was drawn at random on each rank becomes the same."""
        for tensor in chain(module.parameters(), module.buffers()):
            value = tensor.data.to(self.root_device)
            dist.broadcast(value, 0)
            tensor.data.copy_(value)

    def _share_buffers(self) -> None:
        """All ranks get rank 0's buffers, such as running statistics, as under DDP; those that a checkpoint keeps."""
        assert self.lightning_module is not None
        kept = [b for part, name, b in named_buffers(self.lightning_module) if is_kept(part, name) and b.numel()]
        for dtype in {b.dtype: None for b in kept}:  # in their order, which a set would not keep on all ranks
            alike = [b for b in kept if b.dtype == dtype]
            flat = torch.cat([b.detach().reshape(-1).to(self.root_device) for b in alike])
            dist.broadcast(flat, 0)
            for buffer, value in zip(alike, flat.split([b.numel() for b in alike]), strict=True):
                buffer.data.copy_(value.view_as(buffer))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Each step begins with the same buffers."""
        super().on_train_batch_start(batch, batch_idx)
        if self.boosted:
            self._share_buffers()

    def on_validation_start(self) -> None:
        """Validation has the same buffers; not batch by batch, of which ranks may have unlike numbers."""
        super().on_validation_start()
        if self.boosted:
            self._share_buffers()

    def _move_others(self, module: nn.Module, children: list[nn.Module]) -> None:
        """Trained children go to the device piece by piece, by the plugin: whole they might not fit."""
        theirs = {id(m) for child in children for m in child.modules()}
        for part in module.modules():
            if id(part) not in theirs:
                for tensors in (part._parameters, part._buffers):
                    for tensor in tensors.values():
                        if tensor is not None:
                            tensor.data = tensor.data.to(self.root_device)

    def _boost(self, pairs: list[tuple[str, nn.Module]]) -> None:
        if self.root_device.type == "cpu":
            from lightning_rlhf.strategies import cpu

            cpu.enable()
        plugin = self._make_plugin()
        kind = GeminiBoosted if self.plugin_name == "gemini" else ZeroBoosted
        precision: Any = self.precision_plugin
        for (place, child), optimizer in zip(pairs, self.optimizers, strict=True):
            boosted = kind(place, child, optimizer, plugin, precision.dtype, precision.master_weights)
            self.boosted.append(boosted)
        precision.boosted = True

    def _make_plugin(self) -> Any:
        from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin

        precision: Any = self.precision_plugin
        on_cpu = self.root_device.type == "cpu"
        common = dict(precision=precision.name, master_weights=precision.master_weights, max_norm=0.0)
        if self.plugin_name == "gemini":
            return GeminiPlugin(
                **common,
                initial_scale=self.initial_scale,
                placement_policy=self.placement,
                shard_param_frac=self.shard_param_frac,
                offload_optim_frac=self.offload_optim_frac,
                offload_param_frac=self.offload_param_frac,
                warmup_non_model_data_ratio=self.warmup_non_model_data_ratio,
                steady_cuda_cap_ratio=self.steady_cuda_cap_ratio,
                pin_memory=self.pin_memory and not on_cpu,
                max_prefetch=self.max_prefetch,
                min_chunk_size_m=self.min_chunk_elements / 2**20,
                # gradients apart from weights: modules may make several backward passes before a step
                enable_gradient_accumulation=True,
                enable_async_reduce=self.pin_memory and not on_cpu,
            )
        return LowLevelZeroPlugin(
            **common,
            stage=int(self.plugin_name[-1]),
            initial_scale=self.initial_scale,
            cpu_offload=self.cpu_offload,
            overlap_communication=self.overlap_communication and not on_cpu,
            reduce_bucket_size_in_m=self.bucket_elements / 2**20,
            cast_inputs=False,  # the boosted child's own affair
        )

    def teardown(self) -> None:
        """Makes the children ordinary modules again."""
        trained = self.boosted or isinstance(self.model, DistributedDataParallel)
        if trained and not self._failed:
            self._share_buffers()
        for boosted in self.boosted:
            boosted.release(weights=not self._failed)
        self.boosted, self._last = [], []
        if isinstance(self.precision_plugin, ColossalAIPrecision):
            self.precision_plugin.boosted = False
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        """From now on no rank waits for another."""
        self._failed = True
        super().on_exception(exception)

    # ------------------------------------------------------------------------------------------------- training

    def run_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """A backward pass, reduced over ranks for each child that it reached.

        Raises:
            RuntimeError: It reached none, or more than one where only one can be.
        """
        used = [b for b in self.boosted if b.used] or self._last
        if not used:
            raise RuntimeError(
                "A loss hangs on no child that an optimizer trains: call the child itself, self.child(...), not a part "
                f"or a method of it. Trained: {', '.join(b.place for b in self.boosted)}."
            )
        if len(used) > 1 and (self.plugin_name == "gemini" or used[0].scale != 1):
            raise RuntimeError(
                f"One backward pass reached {', '.join(b.place for b in used)}: Gemini and 16-mixed take one child "
                "at a time. Make the loss hang on one of them and run the others under no_grad, "
                "or use zero2 with another precision."
            )
        for b in used:
            b.used = False
            b.check_trained()
        self._last = used
        with ExitStack() as stack:
            for b in used:
                stack.enter_context(b.inside())  # layers that are checkpointed run again
            if isinstance(used[0], GeminiBoosted):
                if args or any(kwargs.values()):
                    raise RuntimeError(f"Gemini's backward pass takes the loss alone, not {args or kwargs}.")
                used[0].backward(loss)
            else:
                if (mixin := getattr(used[0].wrapped, "mixed_precision_mixin", None)) is not None:
                    loss = mixin.pre_backward(loss)
                loss.backward(*args, **kwargs)
                for b in self.boosted:
                    b.flush()  # type: ignore[attr-defined]
        for b in used:
            b.stepping = True

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_``, over all ranks' pieces; all ranks must call.

        Args:
            parameters: Of children; their norm is taken together.
            max_norm: None only measures.

        Returns:
            Scalar norm.
        """
        if not self.sharded:
            return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
        return clip_grad_norm(self.boosted, parameters, max_norm)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it gradients stay on their rank, where the plugin can (ddp, zero1)."""
        with ExitStack() as stack:
            if not self.sharded:
                stack.enter_context(super().block_backward_sync())
            for boosted in self.boosted:
                stack.enter_context(boosted.no_sync())
            yield

    @contextmanager
    def whole_weights(self, child: nn.Module) -> Iterator[None]:
        """Within it each rank runs a child alone, on whole weights, without gradients; all enter and leave."""
        with ExitStack() as stack:
            for boosted in self.boosted:
                if boosted.child is child:
                    stack.enter_context(boosted.whole())
            yield

    # ------------------------------------------------------------------------------------------------- checkpoints

    def whole_state_dict(self, exact: bool = False) -> dict[str, Any]:
        """The module's state dict, collected on rank 0; elsewhere empty. All ranks must call.

        Args:
            exact: Keep fp32 weights that the optimizer steps; else weights are of the number type that they came in.
        """
        module = self.lightning_module
        assert module is not None
        if not self.boosted:
            return module.state_dict()
        trained: dict[str, Tensor] = {}
        for boosted in self.boosted:
            found = checkpoints.whole_weights(boosted, exact)
            if self.is_global_zero:
                found |= boosted.frozen()
            trained |= {f"{boosted.place}.{name}": value for name, value in found.items()}
        return {**module.state_dict(), **trained} if self.is_global_zero else {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: without what each rank writes itself."""
        if self.checkpoint == "full" or not self.boosted:
            return self.whole_state_dict(exact=True)
        assert self.lightning_module is not None
        theirs = self._trained_names()
        return {k: v for k, v in self.lightning_module.state_dict().items() if k not in theirs}

    def _trained_names(self) -> dict[str, tuple[Boosted, Any]]:
        found: dict[str, tuple[Boosted, Any]] = {}
        for boosted in self.boosted:
            names = checkpoints.aliases(boosted)
            for slot in boosted.slots:
                found |= {f"{boosted.place}.{name}": (boosted, slot) for name in names[slot.name]}
        return found

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole on rank 0; of a sharded checkpoint only the settings of groups."""
        if self.checkpoint == "sharded" and self.boosted:
            assert isinstance(optimizer, ShardedOptimizer)
            return checkpoints.settings(optimizer.boosted)
        return super().optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a file by rank 0, or a directory by all.

        Raises:
            OSError: A rank could not write its part of a directory; the former one is whole.
        """
        if self.checkpoint == "full" or not self.boosted:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        checkpoint["boosted"] = [(b.place, checkpoints.aliases(b)) for b in self.boosted]
        checkpoints.save_sharded(self.boosted, checkpoint, str(filepath), self.checkpoint_io.save_checkpoint)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a file, or a directory without the ranks' parts, which are read when they are filled in."""
        self._shards = None
        if os.path.isdir(checkpoint_path):
            self._shards = checkpoints.Shards(checkpoint_path)
            checkpoint_path = self._shards.directory / checkpoints.META
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Fills the module, and every rank's pieces.

        Raises:
            RuntimeError: Names or shapes that don't fit.
            ValueError: A sharded directory outside ``fit``.
        """
        module, state = self.lightning_module, checkpoint["state_dict"]
        assert module is not None
        if self._shards is not None and not self.boosted:
            raise ValueError(
                f"{self._shards.directory} is a sharded checkpoint, which only fit under ColossalAI's strategy reads: "
                "lightning_rlhf.strategies.checkpoints.consolidate(directory, file) makes an ordinary one of it."
            )
        if not self.boosted:
            super().load_model_state_dict(checkpoint, strict)
            return
        trained = self._trained_names()
        rest = module.load_state_dict({k: v for k, v in state.items() if k not in trained}, strict=False)
        wrong = [f"{name} is unknown here" for name in rest.unexpected_keys]
        wrong += [f"{name} is missing" for name in rest.missing_keys if name not in trained]
        if self._shards is not None:
            for number, boosted in enumerate(self.boosted):
                self._shards.load_weights(number, boosted)
        else:
            for name, (boosted, slot) in trained.items():
                if name not in state:
                    wrong.append(f"{name} is missing")
                elif state[name].shape != slot.shape:
                    wrong.append(f"{name} is {tuple(state[name].shape)} there and {tuple(slot.shape)} here")
                else:
                    boosted.put(slot, partial(state[name].reshape(-1).narrow, 0))
        if wrong and strict:
            raise RuntimeError(f"The checkpoint doesn't fit {type(module).__name__}: {'; '.join(wrong[:8])}.")

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Fills every rank's pieces of the optimizers' states.

        Raises:
            ValueError: They are other optimizers' states.
        """
        if self._shards is not None:
            for number, (boosted, state) in enumerate(zip(self.boosted, checkpoint["optimizer_states"], strict=True)):
                self._shards.load_optimizer(number, boosted, state["param_groups"])
            self._shards = None
        elif self.sharded:
            for boosted, state in zip(self.boosted, checkpoint["optimizer_states"], strict=True):
                checkpoints.load_optimizer_state(boosted, state)
        else:
            super().load_optimizer_state_dict(checkpoint)


def trained_children(module: LightningModule, optimizers: list[Optimizer]) -> list[tuple[str, nn.Module]]:
    """The child of a module that each optimizer trains.

    Children of ``ModuleDict`` and ``ModuleList`` count as the module's own.

    Args:
        module: The LightningModule.
        optimizers: Its optimizers.

    Returns:
        Name and child, in the optimizers' order.

    Raises:
        ValueError: An optimizer of several children, or of the module's own parameters; two of one child.
    """
    owners = {id(p): (place, child) for place, child in _children(module) for p in child.parameters()}
    found: list[tuple[str, nn.Module]] = []
    for number, optimizer in enumerate(optimizers):
        mine = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        places = {owners[i][0]: owners[i][1] for i in mine if i in owners}
        if any(i not in owners for i in mine) or len(places) != 1:
            own = ", ".join(
                [*places, *(["parameters of the module itself"] if any(i not in owners for i in mine) else [])]
            )
            raise ValueError(
                f"Optimizer {number} of {type(module).__name__} trains {own or 'nothing'}, and ColossalAI takes whole "
                "children, one an optimizer: put what it trains into one child module, whose forward computes with it."
            )
        found += places.items()
    names = [place for place, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Two optimizers of {type(module).__name__} train one child ({', '.join(names)}), which ColossalAI can't "
            "split: give it one optimizer with two parameter groups."
        )
    return found


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleDict, nn.ModuleList)):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
