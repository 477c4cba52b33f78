"""ColossalAI's ZeRO and Gemini as a Lightning strategy that shards what each optimizer of a module trains."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_rlhf.models.mismatch import explain_mismatch, shapes_of
from lightning_rlhf.strategies import checkpoints
from lightning_rlhf.strategies.backward import Backward
from lightning_rlhf.strategies.gemini import GeminiBoosted
from lightning_rlhf.strategies.optimizer import ShardedOptimizer, refuse_optimizer, sharded_optimizer
from lightning_rlhf.strategies.parallel import (
    Cuts,
    Mesh,
    PipelineParallel,
    SequenceParallel,
    TensorParallel,
    check_world,
    draw_alike,
    make_mesh,
)
from lightning_rlhf.strategies.precision import ColossalAIPrecision, Plugin, clip_grad_norm
from lightning_rlhf.strategies.sharded import Boosted, ZeroBoosted, container, is_persistent, named_buffers
from lightning_rlhf.strategies.trained import Part, find_trained
from lightning_rlhf.utils import CheckpointError
from lightning_rlhf.utils.collectives import set_copies

#: Names that are registered with Lightning, and their arguments.
NAMES: dict[str, dict[str, Any]] = {
    "colossalai": {"plugin": "zero2"},
    "colossalai_ddp": {"plugin": "ddp"},
    "colossalai_ddp_find_unused_parameters_true": {"plugin": "ddp", "find_unused_parameters": True},
    "colossalai_zero1": {"plugin": "zero1"},
    "colossalai_zero2": {"plugin": "zero2"},
    "colossalai_zero2_offload": {"plugin": "zero2", "cpu_offload": True},
    "colossalai_gemini": {"plugin": "gemini"},
    "colossalai_gemini_offload": {"plugin": "gemini", "offload_optim_frac": 1.0, "offload_param_frac": 1.0},
    "colossalai_hybrid": {"plugin": "zero1", "tp": 2},
    "colossalai_notebook": {"plugin": "zero2", "start_method": "fork"},
}
INSTALL = (
    "pip install einops galore_torch psutil click rich contexttimer pydantic ninja && "
    "pip install --no-deps colossalai==0.5.0"
)


class ColossalAIStrategy(DDPStrategy):
    """ShardedCheckpoint optimizer states, gradients and weights over ranks with ColossalAI, for any LightningModule.

    * ``ddp`` shards nothing: it is Lightning's DDP around the whole module, with all precisions. Gradients are reduced
      once per step.
    * ``zero1`` shards optimizer states; 32-true, bf16 and 16-mixed. Gradients are reduced once per step.
    * ``zero2`` also shards gradients, which are reduced after each backward pass.
    * ``gemini`` also shards weights, in chunks that each pass gathers; bf16 and 16-mixed.

    With all plugins except ``ddp``, what an optimizer trains is sharded: children of the module, layers of children, or
    parameters of the module itself. Other children (references, metrics) are whole on every rank. Nothing is wrapped:
    children keep their class and their names. After ``fit`` they are ordinary modules again, whole on every rank.

    Args:
        plugin: What is sharded. ``docs/strategies.md`` explains how to choose.
        tp: Tensor parallelism: number of ranks that hold one copy of a model together, each a slice of every layer, and
            read the same data. A larger value takes less memory per rank and exchanges more; it must divide the
            model's heads. The other plugins act between the copies. Not for Gemini. ``docs/parallel.md`` explains it.
        pp: Pipeline parallelism: number of ranks that hold one copy of a model together, each some of its layers. A
            larger value takes less memory per rank, and ranks wait longer for each other; a model needs as many layers.
            Not for Gemini. ``docs/parallel.md`` explains it.
        sp: Sequence parallelism: number of ranks that run one copy of a model together, each a stretch of every packed
            row, with whole weights. A larger value takes less memory for activations per rank and exchanges more; it
            must divide the attention heads. Not for Gemini. ``docs/parallel.md`` explains it.
        micro_batches: ``pp``: maximum number of parts into which a batch is dealt. With m parts and p stages ranks wait
            for ``(p - 1) / (m + p - 1)`` of the time, so a larger value waits less; parts that are too small keep no
            GPU busy.
        checkpoint: ``full``: one file, gathered on rank 0, that can be read without ColossalAI. ``sharded``: a
            directory with one file per rank, which takes no extra memory; any number of ranks can read it.
        cpu_offload: ZeRO: keep and update optimizer states and fp32 weights in CPU memory. This frees 12 bytes per
            parameter on each GPU, but steps are slower, because gradients and weights are copied.
        overlap_communication: ZeRO: reduce gradients during the backward pass. This is faster, but takes memory for
            buckets.
        bucket_elements: ZeRO: number of gradient elements per reduction. A larger value takes fewer reductions and more
            memory.
        placement: Gemini: ``static`` places chunks by the three fractions, ``auto`` by the memory that is free in the
            first step.
        shard_param_frac: Gemini, static: share of the weights that is sharded over ranks. A larger value saves more
            memory and gathers more weights in each pass; 0 keeps weights whole, as ZeRO-2 does.
        offload_optim_frac: Gemini, static: share of optimizer states and fp32 weights that are kept and updated in CPU
            memory. A larger value saves GPU memory and makes steps slower, but not passes. If memory is short,
            increase it first.
        offload_param_frac: Gemini, static: share of the weights in CPU memory. A larger value saves GPU memory and
            makes passes slower. It needs the other two fractions to be 1.
        warmup_non_model_data_ratio: Gemini, auto: share of memory that is reserved for activations in the first step. A
            larger value is safer.
        steady_cuda_cap_ratio: Gemini, auto: share of the remaining memory that weights may use in later steps. A larger
            value keeps more weights on the GPU.
        pin_memory: Gemini: lock CPU memory, so that copies are faster. Other programs cannot use this memory.
        max_prefetch: Gemini: number of chunks that are gathered ahead. A larger value waits less and takes more memory.
        min_chunk_elements: Gemini: smallest chunk, in elements. A larger value gives fewer, larger exchanges; small
            models need a small value to be sharded at all.
        find_unused_parameters: ddp: look for parameters without a gradient. It is always on for manual optimization,
            where passes differ.
        initial_scale: 16-mixed: initial factor of the loss. A larger value avoids underflow, but may overflow at first.
        accelerator: Lightning's accelerator.
        parallel_devices: Devices, one per process.
        cluster_environment: Lightning's cluster environment.
        checkpoint_io: Writes and reads checkpoint files.
        precision_plugin: Lightning's precision plugin. Set ``Trainer(precision=...)`` instead.
        process_group_backend: ``nccl`` on GPUs, ``gloo`` on CPUs.
        timeout: Maximum time of a collective. If a rank is lost, the others stop after this time.
        start_method: How ranks are started: ``popen`` runs the script once per rank, ``fork`` works in notebooks;
            ``spawn`` and ``forkserver`` start processes of the interpreter.

    Raises:
        ValueError: Arguments do not fit together.
        ModuleNotFoundError: ColossalAI is not installed (raised when the run starts).
    """

    strategy_name = "colossalai"

    def __init__(
        self,
        plugin: Plugin = "zero2",
        tp: int = 1,
        pp: int = 1,
        sp: int = 1,
        micro_batches: int = 8,
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
            hybrid = " Tensor parallelism is tp, an argument of the first three." if str(plugin) == "hybrid" else ""
            raise ValueError(f"plugin must be one of {', '.join(get_args(Plugin))}; got {plugin!r}.{hybrid}")
        for name, size in (("tp", tp), ("pp", pp), ("sp", sp), ("micro_batches", micro_batches)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number from 1 on; got {size!r}.")
        if tp > 1 and plugin == "gemini":
            raise ValueError("tp cuts layers, and Gemini's chunks hold whole ones. Use plugin zero1 or zero2 with tp.")
        if pp > 1 and plugin == "gemini":
            raise ValueError(
                "pp deals layers to ranks, and Gemini's chunks span them. Use plugin zero1 or zero2 with pp."
            )
        if pp > 1 and sp > 1:
            raise ValueError("pp and sp do not go together, since both cut rows. Leave out one; tp goes with either.")
        if pp > 1 and checkpoint == "sharded":
            raise ValueError("checkpoint='sharded' is for whole models, and pp cuts them. Use checkpoint='full'.")
        if sp > 1 and plugin == "gemini":
            raise ValueError("sp does not support Gemini's chunks. Use plugin ddp, zero1 or zero2 with sp.")
        if tp > 1 and checkpoint == "sharded":
            raise ValueError("checkpoint='sharded' is for whole layers, and tp cuts them. Use checkpoint='full'.")
        if checkpoint not in ("full", "sharded"):
            raise ValueError(f"checkpoint must be full or sharded; got {checkpoint!r}.")
        if checkpoint == "sharded" and plugin == "ddp":
            raise ValueError("plugin='ddp' shards nothing, so checkpoint='sharded' is not possible. Use full.")
        fractions = (shard_param_frac, offload_optim_frac, offload_param_frac)
        if not all(0 <= fraction <= 1 for fraction in fractions):
            raise ValueError(
                f"shard_param_frac, offload_optim_frac and offload_param_frac must be between 0 and 1; got {fractions}."
            )
        if offload_param_frac and (shard_param_frac, offload_optim_frac) != (1, 1):
            raise ValueError(
                "offload_param_frac needs shard_param_frac=1 and offload_optim_frac=1: otherwise Gemini ignores it."
            )
        if cpu_offload and plugin not in ("zero1", "zero2"):
            raise ValueError(f"cpu_offload needs ZeRO; plugin={plugin!r} ignores it. Gemini has offload_optim_frac.")
        if plugin != "gemini" and (fractions != (1, 0, 0) or placement != "static"):
            raise ValueError(f"placement and the three fractions need plugin='gemini'; plugin={plugin!r} ignores them.")
        self.plugin_name, self.checkpoint = plugin, checkpoint
        self.tp, self.pp, self.sp, self.micro_batches = tp, pp, sp, micro_batches
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
        self._backward: Backward | None = None
        self._failed = False
        self.timeout = timeout
        self._mesh: Mesh | None = None
        self.cuts: Cuts | None = None
        self._sequence_parallel: SequenceParallel | None = None
        self._sharded_checkpoint: checkpoints.ShardedCheckpoint | None = None
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
        """Whether ranks hold shards; gradients are then not in ``parameter.grad``."""
        return self.plugin_name != "ddp"

    @property
    def ranks_per_copy(self) -> int:
        """Number of ranks that run one copy of a model together."""
        return self.tp * self.pp * self.sp

    @property
    def cuts_models(self) -> bool:
        """Whether ranks hold parts of the models that they run together."""
        return self.tp > 1 or self.pp > 1

    @property
    def loss_scale(self) -> float:
        """The largest factor by which a plugin multiplies losses; 1 without loss scaling."""
        return max((boosted.scale for boosted in self.boosted), default=1.0)

    # ------------------------------------------------------------------------------------------------- set-up

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's plugin under ddp, otherwise a :class:`ColossalAIPrecision`."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # Lightning makes its own plugin for any strategy that it does not know
        if plugin is not None and self.sharded and not isinstance(plugin, ColossalAIPrecision):
            plugin = ColossalAIPrecision(str(plugin.precision), self.plugin_name)
        self._precision_plugin = plugin

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether a checkpoint is loaded after setup: shards exist only then."""
        return self.sharded or self.ranks_per_copy > 1 or super().restore_checkpoint_after_setup

    def setup_environment(self) -> None:
        """Starts the process group, and groups ranks that share a copy of a model.

        Raises:
            ModuleNotFoundError: The plugin needs ColossalAI, which is not installed.
            ValueError: The ranks of a copy do not divide the number of processes.
        """
        check_world({"tp": self.tp, "pp": self.pp, "sp": self.sp}, self.num_nodes * self.num_processes)
        if self.sharded and importlib.util.find_spec("colossalai") is None:
            raise ModuleNotFoundError(
                f"strategy='colossalai_...' needs ColossalAI. Install it: {INSTALL} (see docs/strategies.md)",
                name="colossalai",
            )
        super().setup_environment()
        if self.ranks_per_copy > 1:
            if self._mesh is None:
                self._mesh = make_mesh(self.timeout, pipe=self.pp, sequence=self.sp, tensor=self.tp)
            set_copies(self._mesh.data, self._mesh.copy, self._mesh.replicas)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of ranks with different data, and the place of this one."""
        if self._mesh is None:
            return super().distributed_sampler_kwargs
        return {"num_replicas": self._mesh.data.size, "rank": self._mesh.data.place}

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over ranks with different data, or over the ranks of a group."""
        return super().reduce(tensor, self._data_group if group is None else group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gathers a tensor from ranks with different data, or from the ranks of a group."""
        return super().all_gather(tensor, self._data_group if group is None else group, sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks, or any, say yes."""
        if self._mesh is None:
            return super().reduce_boolean_decision(decision, all)
        found = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(found, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(found)

    @property
    def _data_group(self) -> Any:
        return None if self._mesh is None else self._mesh.data.group

    def setup(self, trainer: Trainer) -> None:
        """Builds the plugin and shards what optimizers train. Outside ``fit`` it only moves the module to the device.

        Raises:
            ValueError: An optimizer cannot be sharded, the module overrides ``backward``, or a callback reads sharded
                weights.
        """
        module = self.lightning_module
        assert self.accelerator is not None and module is not None
        self._failed = False
        if self._mesh is not None:
            self._join_ranks(trainer, self._mesh)
        if (
            trainer.state.fn != TrainerFn.FITTING and self._mesh is not None
        ):  # not the base's, which copies rank 0's weights
            self.precision_plugin.convert_module(module)
            self.model_to_device()
            self.setup_precision_plugin()
            return
        if trainer.state.fn != TrainerFn.FITTING or not self.sharded:
            super().setup(trainer)
            return
        if is_overridden("backward", module):
            raise ValueError(f"{type(module).__name__} overrides backward, but ColossalAI has its own. Remove it.")
        self._refuse_callbacks(trainer)
        self.accelerator.setup(trainer)
        if self._layer_sync:  # Trainer(sync_batchnorm=True)
            self.model = self._layer_sync.apply(module)
        self.precision_plugin.convert_module(module)
        if self._mesh is None:
            self._broadcast_weights(module)
        self.setup_optimizers(trainer)
        found = find_trained(module, self.optimizers)
        for optimizer in self.optimizers if self.plugin_name != "gemini" else ():  # it takes Adam alone
            refuse_optimizer(optimizer)
        self._move_others(module, [part for parts in found for part in parts.values()])
        with self._hiding():
            self._boost(found)
        self.optimizers = [sharded_optimizer(b) for b in self.boosted]
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Wraps the module, under ddp. If there is one copy of it, no other rank has gradients of the same weights."""
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization:  # a loss may depend on one of several networks only
            self._ddp_kwargs["find_unused_parameters"] = True  # arguments of torch's DDP; there is no public way
        if self._mesh is not None:
            self._ddp_kwargs["process_group"] = self._mesh.replicas.group
        if self.cuts is not None:
            self.cuts.check_trained(self.lightning_module)
        if self._mesh is not None and self._mesh.replicas.size == 1:
            return
        with self._hiding():
            super().configure_ddp()

    def _hiding(self) -> AbstractContextManager[None]:
        return nullcontext() if self.cuts is None else self.cuts.hiding()

    def _join_ranks(self, trainer: Trainer, mesh: Mesh) -> None:
        """Lets the ranks of a copy run the module's models together.

        Raises:
            ValueError: They cannot, or not with this precision.
        """
        module = self.lightning_module
        assert self.accelerator is not None and module is not None
        self.accelerator.setup(trainer)
        self._broadcast_weights(module)
        if self.cuts_models:
            self._cut_models(mesh)
        if self.sp > 1:
            self._sequence_parallel = SequenceParallel(mesh.sequence, self.tp)
            self._sequence_parallel.spread_models(module)
        for part in module.modules():
            if isinstance(part, Metric):
                part.process_group = mesh.data.group
        draw_alike(mesh.copy)

    def _cut_models(self, mesh: Mesh) -> None:
        """Cuts the module's models over the ranks that hold their layers together.

        Raises:
            ValueError: They cannot be cut, or not with this precision.
        """
        module = self.lightning_module
        assert module is not None
        if not self.sharded and self.precision_plugin.precision == "16-mixed":
            raise ValueError(
                f"{'tp' if self.tp > 1 else 'pp'} under plugin='ddp' does not support trainer.precision='16-mixed': "
                "ranks would find overflows on their own. Set trainer.precision to bf16-mixed, or plugin to zero1."
            )
        device = self.root_device
        self.cuts = Cuts(
            TensorParallel(mesh.tensor, device) if self.tp > 1 else None,
            PipelineParallel(mesh.pipe, device, self.micro_batches) if self.pp > 1 else None,
        )
        self.cuts.cut_models(module)
        if not self.sharded:  # there is no hook for how a precision plugin clips
            self.precision_plugin.clip_grad_by_norm = self._clip_optimizer  # type: ignore[method-assign]

    def _clip_optimizer(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.clip_grad_norm([p for group in optimizer.param_groups for p in group["params"]], clip_val)

    def _part_ranks(self) -> None:
        """Lets each rank run whole models again. Optimizer states stay cut; checkpoints join them."""
        if self._mesh is None:
            return
        if self._sequence_parallel is not None:
            self._sequence_parallel.undo()
        if self.cuts is not None:
            self.cuts.undo(weights=not self._failed)
        assert self.lightning_module is not None
        for part in self.lightning_module.modules():
            if isinstance(part, Metric):
                part.process_group = None
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        set_copies(None, None)

    def _refuse_callbacks(self, trainer: Trainer) -> None:
        """Refuses callbacks of Lightning that would fail later, during training.

        Raises:
            ValueError: There is such a callback.
        """
        refused: dict[type, str] = {
            BackboneFinetuning: "unfreezes parameters that ColossalAI did not shard at the start"
        }
        if self.plugin_name == "gemini":
            reads = "reads whole weights during training, but Gemini shards them"
            refused |= {StochasticWeightAveraging: reads, WeightAveraging: reads}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for kind, reason in refused.items():
                if isinstance(callback, kind):
                    other = "zero2 or ddp" if kind is not BackboneFinetuning else "ddp"
                    raise ValueError(f"{type(callback).__name__} {reason}. Use {other}, or remove the callback.")

    def _broadcast_weights(self, module: nn.Module) -> None:
        """Copies all parameters and buffers from rank 0, because each rank has initialized its own.

        What is equal is not written: weights are often a map of their file, whose memory ranks of a machine share.
        """
        for tensor in chain(module.parameters(), module.buffers()):
            own = tensor.data.to(self.root_device)
            value = own.clone()
            dist.broadcast(value, 0)
            if not torch.equal(value, own):
                tensor.data.copy_(value)

    def _broadcast_buffers(self) -> None:
        """Copies persistent buffers, such as running statistics, from rank 0, as DDP does."""
        assert self.lightning_module is not None
        kept = [b for part, name, b in named_buffers(self.lightning_module) if is_persistent(part, name) and b.numel()]
        for dtype in {b.dtype: None for b in kept}:  # a dict, because a set's order may differ between ranks
            alike = [b for b in kept if b.dtype == dtype]
            flat = torch.cat([b.detach().reshape(-1).to(self.root_device) for b in alike])
            dist.broadcast(flat, 0)
            for buffer, value in zip(alike, flat.split([b.numel() for b in alike]), strict=True):
                buffer.data.copy_(value.view_as(buffer))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes buffers equal on all ranks before each step."""
        super().on_train_batch_start(batch, batch_idx)
        if self.boosted:
            self._broadcast_buffers()

    def on_validation_start(self) -> None:
        """Makes buffers equal on all ranks, once, because ranks may have different numbers of validation batches."""
        super().on_validation_start()
        if self.boosted:
            self._broadcast_buffers()

    def _move_others(self, module: nn.Module, parts: list[Part]) -> None:
        """Moves all other modules to the device. The plugin moves what is trained, which may not fit whole."""
        theirs = {id(m) for part in parts if isinstance(part, nn.Module) for m in part.modules()}
        theirs |= {id(part) for part in parts}
        for part in module.modules():
            if id(part) not in theirs:
                for tensor in chain(part._parameters.values(), part._buffers.values()):
                    if tensor is not None and id(tensor) not in theirs:
                        tensor.data = tensor.data.to(self.root_device)

    def _boost(self, found: list[dict[str, Part]]) -> None:
        if self.root_device.type == "cpu":
            from lightning_rlhf.strategies import cpu

            cpu.enable()
        plugin = self._make_plugin()
        kind = GeminiBoosted if self.plugin_name == "gemini" else ZeroBoosted
        precision: Any = self.precision_plugin
        for parts, optimizer in zip(found, self.optimizers, strict=True):
            path, child = next(iter(parts.items()))
            if len(parts) > 1 or not isinstance(child, nn.Module):
                path, child = "", container(parts)
            boosted = kind(path, child, optimizer, plugin, precision.dtype, precision.master_weights, self.cuts)
            self.boosted.append(boosted)
        if self.plugin_name == "gemini":
            GeminiBoosted.share_hook(self.boosted, self.lightning_module)  # type: ignore[arg-type]
            precision.gathering = self.boosted[0].gathering  # type: ignore[attr-defined]
        self._backward = Backward(self.boosted, self.root_device)
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
                # keep gradients and weights in separate chunks, because a step may follow several backward passes
                enable_gradient_accumulation=True,
                enable_async_reduce=self.pin_memory and not on_cpu,
            )
        plugin = LowLevelZeroPlugin(
            **common,
            stage=int(self.plugin_name[-1]),
            initial_scale=self.initial_scale,
            cpu_offload=self.cpu_offload,
            overlap_communication=self.overlap_communication and not on_cpu,
            reduce_bucket_size_in_m=self.bucket_elements / 2**20,
            cast_inputs=False,  # the boosted child casts its inputs
        )
        if self._mesh is not None:  # the plugin has no argument for it
            plugin.zero_optim_kwargs["dp_process_group"] = self._mesh.replicas.group
        return plugin

    def teardown(self) -> None:
        """Makes the children ordinary modules again."""
        trained = self.boosted or self._mesh is not None or isinstance(self.model, DistributedDataParallel)
        if trained and not self._failed:
            self._broadcast_buffers()
        for boosted in self.boosted:
            boosted.unboost(weights=not self._failed)
        self.boosted, self._backward = [], None
        self._part_ranks()
        if isinstance(self.precision_plugin, ColossalAIPrecision):
            self.precision_plugin.boosted, self.precision_plugin.gathering = False, nullcontext
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        """Notes the failure, so that no rank waits for another."""
        self._failed = True
        super().on_exception(exception)

    # ------------------------------------------------------------------------------------------------- training

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's ``training_step``.

        Raises:
            RuntimeError: It returned None on this rank, but not on others (automatic optimization).
        """
        result = super().training_step(*args, **kwargs)
        if result is None and self._backward is not None and self.lightning_module.automatic_optimization:  # type: ignore[union-attr]
            self._backward.skip()
        return result

    def run_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs a backward pass, and reduces gradients over ranks for each optimizer that it reaches.

        Raises:
            RuntimeError: The loss depends on no trained parameter, or the plugin cannot do what is asked.
        """
        assert self._backward is not None
        self._backward.run(loss, *args, **kwargs)

    def clip_grad_norm(self, parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
        """Clips gradients over all ranks, like ``torch.nn.utils.clip_grad_norm_``. All ranks must call it.

        Args:
            parameters: Parameters of children, whose common norm is clipped.
            max_norm: Largest norm. A larger value clips less. None: no clipping.

        Returns:
            The scalar norm before clipping.
        """
        if not self.sharded and self.cuts is not None:
            return self.cuts.clip_grad_norm(parameters, max_norm)
        if not self.sharded:
            return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
        return clip_grad_norm(self.boosted, parameters, max_norm)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it, gradients are not reduced over ranks, if the plugin allows it (ddp, zero1)."""
        with ExitStack() as stack:
            if not self.sharded:
                stack.enter_context(super().block_backward_sync())
            for boosted in self.boosted:
                stack.enter_context(boosted.no_sync())
            yield

    @contextmanager
    def whole_weights(self, child: nn.Module) -> Iterator[None]:
        """Within it, each rank can run a child alone on whole weights, without gradients. All ranks must enter."""
        its = {id(p) for p in child.parameters()}
        with ExitStack() as stack:
            for boosted in self.boosted:
                if any(id(slot.parameter) in its for slot in boosted.slots):
                    stack.enter_context(boosted.gathered())
            if self.cuts is not None:
                stack.enter_context(self.cuts.whole_stages(child))
            yield

    # ------------------------------------------------------------------------------------------------- checkpoints

    def whole_state_dict(self, exact: bool = False) -> dict[str, Any]:
        """Gathers the module's state dict on rank 0; it is empty on other ranks. All ranks must call it.

        Args:
            exact: Keep the optimizer's fp32 weights. Otherwise weights get their original data type.
        """
        module = self.lightning_module
        assert module is not None
        if not self.boosted and self.cuts is None:
            return module.state_dict()
        trained: dict[str, Tensor] = {}
        state = module.state_dict()
        for boosted in self.boosted:
            found = checkpoints.whole_weights(boosted, exact)
            trained |= {boosted.full_name(name): value for name, value in found.items()}
            if self.is_global_zero or self.cuts is not None:
                state |= {boosted.full_name(name): value for name, value in boosted.frozen().items()}
        if self.cuts is not None:
            rest = state.keys() - self._trained_names().keys()
            state = self.cuts.whole_state_dict(module, {k: v for k, v in state.items() if k in rest}, trained)
        return {**state, **trained} if self.is_global_zero else {}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state dict for a checkpoint, without weights that each rank writes to its own file."""
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
                found |= {boosted.full_name(name): (boosted, slot) for name in names[slot.name]}
        return found

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the whole state on rank 0, or only the settings of parameter groups for a sharded checkpoint."""
        if self.checkpoint == "sharded" and self.boosted:
            assert isinstance(optimizer, ShardedOptimizer)
            return checkpoints.group_settings(optimizer.boosted)
        state = super().optimizer_state(optimizer)
        if self.cuts is None or isinstance(optimizer, ShardedOptimizer):
            return state
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return self.cuts.whole_optimizer_state(state, parameters)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a file on rank 0, or a directory on all ranks.

        Raises:
            OSError: A rank could not write its file of a directory. An older directory is still complete.
        """
        if self.checkpoint == "full" or not self.boosted:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        checkpoint["boosted"] = [(b.path, checkpoints.aliases(b)) for b in self.boosted]
        checkpoints.save_sharded(self.boosted, checkpoint, str(filepath), self.checkpoint_io.save_checkpoint)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a file, or the shared part of a directory. The ranks' files are read later."""
        self._sharded_checkpoint = None
        if os.path.isdir(checkpoint_path):
            self._sharded_checkpoint = checkpoints.ShardedCheckpoint(checkpoint_path)
            checkpoint_path = self._sharded_checkpoint.directory / checkpoints.META
        return super().load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Loads the module's weights, with each rank's shards.

        Raises:
            CheckpointError: Names or shapes do not match.
            ValueError: The checkpoint is a sharded directory, and this is not ``fit``.
        """
        module, state = self.lightning_module, checkpoint["state_dict"]
        assert module is not None
        if self._sharded_checkpoint is not None and not self.boosted:
            raise ValueError(
                f"{self._sharded_checkpoint.directory} is a sharded checkpoint, which only fit under ColossalAI's "
                "strategy reads. Convert it with lightning_rlhf.strategies.checkpoints.consolidate(directory, file)."
            )
        if self.cuts is not None:
            state = self.cuts.part_state_dict(module, state)
            checkpoint = {**checkpoint, "state_dict": state}
        if not self.boosted:
            super().load_model_state_dict(checkpoint, strict)
            return
        trained = self._trained_names()
        rest = module.load_state_dict({k: v for k, v in state.items() if k not in trained}, strict=False)
        wrong = [f"{name} is unknown" for name in rest.unexpected_keys]
        wrong += [f"{name} is missing" for name in rest.missing_keys if name not in trained]
        if self._sharded_checkpoint is not None:
            for number, boosted in enumerate(self.boosted):
                self._sharded_checkpoint.load_weights(number, boosted)
        else:
            for name, (boosted, slot) in trained.items():
                if name not in state:
                    wrong.append(f"{name} is missing")
                elif state[name].shape != slot.shape:
                    wrong.append(
                        f"{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(slot.shape)} in the module"
                    )
                else:
                    boosted.set_value(slot, partial(state[name].reshape(-1).narrow, 0))
        if wrong and strict:
            own = shapes_of(module.state_dict()) | {name: tuple(slot.shape) for name, (_, slot) in trained.items()}
            why = explain_mismatch(shapes_of(state), own) or f"{'; '.join(wrong[:8])}."
            raise CheckpointError(f"The checkpoint does not match {type(module).__name__}. {why}")

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Loads each rank's shards of the optimizers' states.

        Raises:
            ValueError: The states belong to different optimizers.
        """
        if self._sharded_checkpoint is not None:
            for number, (boosted, state) in enumerate(zip(self.boosted, checkpoint["optimizer_states"], strict=True)):
                self._sharded_checkpoint.load_optimizer(number, boosted, state["param_groups"])
            self._sharded_checkpoint = None
        elif self.sharded:
            for boosted, state in zip(self.boosted, checkpoint["optimizer_states"], strict=True):
                checkpoints.load_optimizer_state(boosted, state)
        elif self.cuts is not None:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                optimizer.load_state_dict(self.cuts.part_optimizer_state(state, parameters))
        else:
            super().load_optimizer_state_dict(checkpoint)
