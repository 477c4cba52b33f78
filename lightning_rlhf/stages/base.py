"""What every stage shares: its tokenizer, exact resume, and checkpoints without frozen weights."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.callbacks import SaveOnInterrupt
from lightning_rlhf.callbacks.progress import whole_run_bar
from lightning_rlhf.data import Message, PackedBatch
from lightning_rlhf.data.templates import set_chat_template, stop_token_ids
from lightning_rlhf.data.tokens import encode_prompt
from lightning_rlhf.metrics import StageMetrics
from lightning_rlhf.models import Load, LoRA, load_tokenizer
from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.models.loading import load_config, load_stop_token_ids, quantization_of, refuse_full_training
from lightning_rlhf.models.mismatch import OTHER_RUN, explain_mismatch, other_frozen, sample_frozen, shapes_of
from lightning_rlhf.models.quantization import is_quantized_layer, refuse_again, require_bitsandbytes
from lightning_rlhf.moved import find_moved, refuse_moved, write_argument
from lightning_rlhf.quiet import quiet_libraries
from lightning_rlhf.rollout import (
    CachedEngine,
    Completion,
    RemoteEngine,
    RolloutEngine,
    Sampling,
    as_answers,
    complete,
    sample_key,
)
from lightning_rlhf.stages.inputs import Kind, check_batch, check_data
from lightning_rlhf.stages.optim import fit_schedules, parameter_groups
from lightning_rlhf.strategies import ColossalAIStrategy, holds_whole_models
from lightning_rlhf.strategies.gradients import clip_grad_norm, loss_scale, parameters_of, zero_grad
from lightning_rlhf.strategies.optimizer import ShardedOptimizer
from lightning_rlhf.utils import CheckpointError
from lightning_rlhf.utils.checkpoint_io import check_is_checkpoint, explain_bad_checkpoint
from lightning_rlhf.utils.collectives import data_rank, data_size, gather_objects
from lightning_rlhf.utils.random import rng_state, set_rng_state

#: The default of stages.
LOAD = Load()


class SettingsError(MisconfigurationException, ValueError):
    """Settings of a run that do not fit together. Its message needs no traceback."""


class Stage(L.LightningModule):
    """Base of the stages: a :class:`~lightning.pytorch.LightningModule` that resumes bit for bit.

    A checkpoint holds each rank's RNG states (of ranks that run one copy of the model, those that they share), restored
    before the first batch, and none of the frozen weights, which come from ``pretrained`` again. The attribute
    ``tokenizer`` has the chat template that data modules render by.

    Args:
        pretrained: Hugging Face directory, hub id, or a model.
        tokenizer: Directory, hub id or tokenizer; default that of ``pretrained``.
        chat_template: Preset name, path of a Jinja file, or None for the tokenizer's own.
        lora: Adapters; None trains all weights.
        load: How weights are held.
        optimizer: Makes an optimizer of parameter groups.
        lr_scheduler: Makes a schedule of an optimizer.
        max_skipped: Optimizer steps in a row that may be skipped, because losses or gradients were not finite, before
            the run ends.

    Attributes:
        stop_token_ids: Tokens that end an answer: the eos, what the chat template ends turns with, the eos that it
            replaced, and those of the model's generation config and config.
        new_token_ids: Tokens that the chat template brought; with adapters their rows are trained too.

    Raises:
        ModuleNotFoundError: ``load.quantization`` without bitsandbytes.
        OSError: Nothing is at ``pretrained`` or ``tokenizer``.
        ValueError: ``pretrained`` is none of these, a model object without its tokenizer, or quantized weights without
            adapters to train.
    """

    pretrained: str | os.PathLike[str] | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    new_token_ids: tuple[int, ...]
    skipped: int = 0
    #: The kind of data that it works on; None: whatever a stage of one's own takes.
    works_on: ClassVar[Kind | None] = None
    #: Entries that its checkpoints must have beside Lightning's own, each with its keys.
    entries: ClassVar[Mapping[str, tuple[str, ...]]] = {"stage": ("classes", "objects", "optimizers", "schedules")}

    def __new__(cls, *args: Any, **given: Any) -> Any:
        """Refuses former names of arguments with their present place."""
        refuse_moved(cls, given)
        return super().__new__(cls)

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None,
        chat_template: str | None,
        lora: LoRA | None,
        load: Load,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        max_skipped: int = 5,
    ) -> None:
        super().__init__()
        quiet_libraries()
        if not isinstance(pretrained, (str, os.PathLike, PreTrainedModel)):
            raise ValueError(
                f"pretrained is a {type(pretrained).__name__}: give a directory, a hub id, or a transformers model (of "
                "one under adapters, its merge_and_unload())."
            )
        if load.quantization is not None:
            require_bitsandbytes()
            if lora is None:
                raise ValueError(
                    f"load.quantization={load.quantization!r}: quantized weights can't be trained. Give lora."
                )
            lora.check_fits_quantized()
            if (method := quantization_of(pretrained, load.trust_remote_code)) is not None:
                refuse_again(pretrained, method, load.quantization)
        if tokenizer is None and isinstance(pretrained, PreTrainedModel):
            raise ValueError("Give tokenizer=... beside a model object: nothing says which one it was trained with.")
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            self.tokenizer = tokenizer
        else:
            self.tokenizer = load_tokenizer(tokenizer or pretrained, load.trust_remote_code)  # type: ignore[arg-type]
        replaced = self.tokenizer.eos_token_id
        added = set_chat_template(self.tokenizer, chat_template)
        self.new_token_ids = tuple(range(len(self.tokenizer) - added, len(self.tokenizer)))
        further = [replaced, *load_stop_token_ids(pretrained, load.trust_remote_code)]
        self.stop_token_ids = stop_token_ids(self.tokenizer, further)
        object.__setattr__(self, "pretrained", pretrained)  # not a child: a model would be saved under two names
        self.lora, self.load, self.max_skipped = lora, load, max_skipped
        self.engine: RolloutEngine = CachedEngine()
        self.make_optimizer: Callable[..., Any] = optimizer
        self.make_lr_scheduler: Callable[..., Any] = lr_scheduler
        self.metrics = StageMetrics("loss", "accuracy", "score")  # one child: one line in the table of a model
        self._rng_to_restore: dict[str, Any] | None = None
        self._makers_to_match: dict[str, list[str]] | None = None
        self._rates_to_match: list[list[float]] = []
        self._mid_step = self._diverges = False
        self._loaded_from = "The state dict"
        self._counted = 0
        self._precision_before: str | None = None  # torch's, before fit

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses another model in the place of the one that a fit trains: the optimizer has the weights of that one.

        Raises:
            ValueError: It is one.
        """
        now = vars(self).get("_modules", {}).get(name)
        if isinstance(now, Backbone) and isinstance(value, nn.Module) and value is not now and self._is_fitting():
            raise ValueError(
                f"{type(self).__name__}.{name} was replaced during fit, whose optimizer trains the former model's "
                "weights. Replace it before fit."
            )
        super().__setattr__(name, value)

    def _is_fitting(self) -> bool:
        if self.strategy is None:
            return False
        state = self.trainer.state
        return state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING and bool(self.trainer.optimizers)

    def save_settings(self) -> None:
        """Saves the settings of a subclass's constructor, for loggers and ``load_from_checkpoint``.

        Objects among them (a model, a tokenizer, functions) stay out: a checkpoint is loaded without trusting code.
        It holds their names, and :meth:`load_from_checkpoint` asks for them.
        """
        frame = inspect.currentframe()
        constructor = frame = None if frame is None else frame.f_back
        settings: dict[str, Any] = {}
        while frame is not None and frame.f_locals.get("self") is self:  # of subclasses too, as Lightning takes them
            names, _, further, values = inspect.getargvalues(frame)
            given = {name: values[name] for name in names[1:]} | (values[further] if further else {})
            settings = {**settings, **given}
            frame = frame.f_back
        objects = {name for name, value in settings.items() if not _is_data(value)}
        self.save_hyperparameters(ignore=sorted(objects), frame=constructor)
        if "_instantiator" in self.hparams:  # a LightningCLI brings all settings as its file has them
            self.save_hyperparameters(frame=constructor)
            objects = set()
        elif paths := {k: os.fspath(v) for k, v in settings.items() if isinstance(v, os.PathLike)}:
            self.save_hyperparameters(paths)
            objects -= paths.keys()
        if groups := {k: _without_objects(settings[k]) for k in objects if dataclasses.is_dataclass(settings[k])}:
            self.save_hyperparameters(groups)  # the other fields of a group are settings
        defaults: dict[str, Any] = {}
        for base in type(self).__mro__:
            for name, parameter in inspect.signature(base.__init__).parameters.items():  # type: ignore[misc]
                defaults.setdefault(name, parameter.default)
        self._objects = {k: _name(settings[k]) for k in sorted(objects) if settings[k] is not defaults.get(k)}

    @property
    def hparams_initial(self) -> Any:
        """What loggers keep: the settings, and as ``_stage`` the class, which names the run in a report."""
        return type(found := super().hparams_initial)({"_stage": type(self).__name__, **found})

    @property
    def model_to_export(self) -> Backbone:
        """The model that callbacks export and show."""
        raise NotImplementedError

    @property
    def sampling(self) -> Sampling:
        """How :meth:`generate` draws: greedily, at most 128 tokens."""
        return Sampling(temperature=0.0)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Mapping[str, str]]] | Sequence[Mapping[str, str]],
        sampling: Sampling | None = None,
        *,
        as_text: bool = False,
        seed: int = 0,
    ) -> list[Completion]:
        """Completions of prompts by the model as it stands, in this process alone.

        Args:
            prompts: User turns, or messages ``{"role": ..., "content": ...}``; several in a list, or one.
            sampling: How to draw; default :attr:`sampling`. An answer ends where the model's context does.
            as_text: Texts are no user turns but go on as they are, without a chat template.
            seed: Of the sampling: the same prompts and seed give the same completions.

        Returns:
            A completion each, whose ``text`` is the answer.

        Raises:
            ValueError: A model that can't generate, a prompt that the chat template refuses or that fills the context.

        Example::

            module = SFTModule("runs/sft/hf/best")
            print(module.generate("Name a city.")[0].text)
        """
        self.configure_model()
        if not self.model_to_export.transformer.can_generate():
            raise ValueError(
                f"{type(self).__name__}: {type(self.model_to_export.transformer).__name__} can't generate."
            )
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
        asked: list[Any] = [
            [Message(role="user", content=p)] if isinstance(p, str) and not as_text else p
            for p in ([prompts] if one else prompts)
        ]
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in asked]
        keys = [sample_key(seed, i) for i in range(len(asked))]
        sampling = sampling or self.sampling
        if isinstance(self.engine, RemoteEngine):
            self.engine.hand_over(self.model_to_export, self.tokenizer, alone=True)
        found = complete(self.engine, self.model_to_export, self.tokenizer, ids, keys, sampling, self.stop_token_ids)
        return [completion for (completion,) in as_answers(self.tokenizer, asked, [[c] for c in found])]

    @cached_property
    def context_length(self) -> int | None:
        """Most tokens of a sequence, where the model says; data modules ask, before there is a model."""
        if isinstance(self.pretrained, PreTrainedModel):
            config = self.pretrained.config
        else:
            config = load_config(self.pretrained, self.load.trust_remote_code)
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def configure_callbacks(self) -> list[L.Callback]:
        """An interrupt saves: SIGTERM and Ctrl-C write a checkpoint at the end of the step.

        A ``SaveOnInterrupt`` that the Trainer was given stays in its place. Lightning's own progress bar is made one of
        the whole run. This is the first hook of a run, so another stage's data is refused here, before rows are read
        and models loaded.

        Raises:
            SettingsError: ``LearningRateFinder`` is there, and the module has no field that it could set.
        """
        if self.works_on is not None:
            check_data(type(self).__name__, self.works_on, self.trainer)
        self.trainer.callbacks = [whole_run_bar(c) for c in self.trainer.callbacks]  # type: ignore[attr-defined]
        finders = [c for c in self.trainer.callbacks if isinstance(c, LearningRateFinder)]  # type: ignore[attr-defined]
        finds = any(c._update_attr and not c._attr_name for c in finders)
        if finds and not (hasattr(self, "lr") or hasattr(self, "learning_rate")):
            raise SettingsError(
                "LearningRateFinder sets a field lr of the module, and here the learning rate is a setting of the "
                "optimizer. Leave it out, and compare short runs with several model.optimizer.lr: lightning-rlhf "
                "report draws them on one page."
            )
        given = any(isinstance(c, SaveOnInterrupt) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if given else [SaveOnInterrupt()]

    def setup(self, stage: str) -> None:
        """Refuses, before anything is loaded, what would cast weights that must be fp32, cut or train quantized ones.

        Raises:
            SettingsError: It is one.
        """
        if stage == "fit":
            self.forget()
        try:
            self._check_precision()
            if stage == "fit":
                refuse_full_training(self.pretrained, self.lora, self.load.trust_remote_code)
            self._check_strategy()
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def _check_strategy(self) -> None:
        """Quantized weights are whole on each device."""
        strategy = self.trainer.strategy
        if holds_whole_models(strategy):
            return
        stored = quantization_of(self.pretrained, self.load.trust_remote_code)
        if (method := self.load.quantization or stored) is None:
            return
        said = f"pretrained={self.pretrained} is quantized ({stored}), which" if stored else (
            f"load.quantization={method!r}"
        )  # fmt: skip
        raise ValueError(
            f"{said} runs on one device, under DDP and under colossalai_ddp, where each device holds the whole "
            f"model; {type(strategy).__name__} as it is set cuts or casts them. Set trainer.strategy to one of "
            f"these, or {'give a model in full precision' if stored else 'load.quantization to null'}."
        )

    def forget(self) -> None:
        """Forgets what is of an earlier run alone; one that is resumed takes its own back afterwards."""
        self.skipped, self._rng_to_restore = 0, None
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()

    def _check_precision(self) -> None:
        """Heads, adapters, rotary frequencies and sums must stay fp32; Lightning's true half precisions cast all."""
        plugin = self.trainer.precision_plugin
        name = str(plugin.precision)
        if isinstance(plugin, BitsandbytesPrecision):
            raise ValueError(
                "BitsandbytesPrecision quantizes heads and adapters too, which can't be trained then: leave it out, "
                "and set model.load.quantization to nf4 or int8."
            )
        if name in ("bf16-true", "16-true") or name.startswith("transformer-engine"):
            half = "16" if "16" in name.replace("bf16", "") else "bf16"
            raise ValueError(
                f"trainer.precision={name!r} casts heads, adapters and rotary frequencies to 16 bits too, where small "
                f"steps and far positions are lost. Set trainer.precision to {half}-mixed, and model.load.dtype to "
                f"{'float16' if half == '16' else 'bfloat16'} for frozen weights of 16 bits."
            )
        if torch.get_default_dtype() in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"torch's default dtype is {torch.get_default_dtype()}, in which sums and heads would be rounded: "
                "leave it float32, and set model.load.dtype."
            )
        whole = not (isinstance(self.trainer.strategy, ColossalAIStrategy) and self.trainer.strategy.sharded)
        if self.lora is None and self.load.dtype != "float32" and whole:
            rank_zero_warn(
                f"model.load.dtype={self.load.dtype} without lora: the weights are trained in 16 bits, where steps "
                "below 1/256 of a weight are lost. Set model.load.dtype to float32 (with trainer.precision=bf16-mixed)."
            )

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuses batches of another kind."""
        self._check(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuses batches of another kind."""
        self._check(batch)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuses batches of another kind."""
        self._check(batch)

    def _check(self, batch: Any) -> None:
        if self.works_on is not None:
            predicts = self.trainer.state.fn == TrainerFn.PREDICTING
            check_batch(type(self).__name__, self.works_on, batch, predicts)

    def on_predict_start(self) -> None:
        """Rows that have no number are counted from 0."""
        self._counted = 0

    def places(self, batch: PackedBatch) -> list[tuple[int, int]]:
        """The row of each branch of a batch that is predicted, and its number among the row's branches.

        A batch that no planner made does not know its rows. They are counted, over ranks as Lightning deals them.
        """
        trees = batch.forest.trees
        rows = batch.rows or tuple(data_rank() + data_size() * (self._counted + i) for i in range(len(trees)))
        self._counted += len(trees)
        fills = batch.num_scored > 0 and not batch.weight.any()  # a planner's empty bin
        return [] if fills else [(row, i) for row, (_, b) in zip(rows, trees, strict=True) for i in range(len(b))]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the schedule by optimizer steps."""
        optimizer = self.make_optimizer(parameter_groups(self.model_to_export.parameters()))
        scheduler = self.make_lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):  # Lightning's own class says what it goes by, torch's doesn't
            config |= {"interval": "epoch", "monitor": getattr(scheduler, "monitor", "val/loss")}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    def on_train_start(self) -> None:
        """Tells the schedule how long the run is, now that the data are known; counts a resumed run's epochs right.

        Raises:
            ValueError: ``limit_train_batches``, as a share, cuts a step in two.
        """
        limit, n = self.trainer.limit_train_batches, self.trainer.num_training_batches
        if isinstance(limit, float) and limit < 1 and n % self.trainer.accumulate_grad_batches:
            self._refuse_limit(int(n), f" of an epoch takes {n} micro-batches, which")
        fit_schedules(self.trainer)
        self._begin_epoch()
        self._keep_checkpoint()

    def _begin_epoch(self) -> None:
        """Counts the epoch that begins where a run is resumed from the last batch of the one before.

        Lightning 2.6 ends that epoch, and takes the new one for a part of it. If such a run is resumed once more, the
        number of its epoch stays behind: an order of rows comes twice, and ``max_epochs`` comes later.
        """
        loop = self.trainer.fit_loop
        epochs = loop.epoch_progress
        if loop.restarted_mid_epoch and epochs.total.ready == epochs.total.completed:
            epochs.increment_ready()
            epochs.increment_started()

    def _keep_checkpoint(self) -> None:
        """Keeps a resumed run from writing its checkpoint again, after a micro-batch and without that one's gradients.

        Lightning 2.6's ModelCheckpoint does not keep which step it saved last, but in this attribute.
        """
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps:
                callback._last_global_step_saved = self.trainer.global_step

    def on_fit_start(self) -> None:
        """Refuses settings under which steps would not be what the planner dealt.

        Raises:
            ValueError: ``limit_train_batches`` that cuts a step in two, or accumulation that changes by epoch.
        """
        if any(isinstance(c, GradientAccumulationScheduler) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "GradientAccumulationScheduler changes accumulate_grad_batches by epoch, but steps are planned for one "
                "value of it. Set trainer.accumulate_grad_batches, and run again from a checkpoint to change it."
            )
        k, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        if isinstance(limit, int) and limit % k:
            self._refuse_limit(limit, "")
        self._match_makers()
        self._precision_before = self._precision_before or torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(matmul_precision(self.device, self.load.tf32))

    def teardown(self, stage: str) -> None:
        """Multiplies as before ``fit``."""
        super().teardown(stage)
        if self._precision_before is not None:
            torch.set_float32_matmul_precision(self._precision_before)
            self._precision_before = None

    def _refuse_limit(self, n: int, what: str) -> None:
        k, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        raise ValueError(
            f"trainer.limit_train_batches={limit}{what} is not a multiple of accumulate_grad_batches={k}: the last "
            f"optimizer step would miss a part. Use {max(k, n - n % k)} or {n - n % k + k}."
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuses batches of another kind; puts a resumed run's RNG states back, after all that set-up drew."""
        self._check(batch)
        last = self.trainer.num_training_batches
        self._mid_step = bool((batch_idx + 1) % self.trainer.accumulate_grad_batches) and batch_idx + 1 != last
        if self._rng_to_restore is not None:
            set_rng_state(self._rng_to_restore)
            self._rng_to_restore = None

    @property
    def strategy(self) -> Strategy | None:
        """The Trainer's; None without a Trainer, where rollouts and scores serve a project's own loop."""
        try:
            return self.trainer.strategy
        except RuntimeError:  # the one public way to ask
            return None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drops a step whose gradients are not finite, on all ranks alike; whoever scales losses drops its own.

        The one number that is waited for is the gradients' norm, behind the whole backward pass.
        """
        if not self.automatic_optimization:
            return
        parameters, scale = parameters_of(optimizer), loss_scale(self.trainer)
        norm = clip_grad_norm(self.trainer.strategy, parameters, None)
        finite = self.trainer.strategy.reduce_boolean_decision(bool(norm.isfinite()))
        self._diverges = not finite and scale <= 1  # else the scale is too large, which is no fault of the run's
        if self._diverges:
            rank_zero_warn(f"Optimizer step {self.trainer.global_step} is skipped: its gradients are not finite.")
            zero_grad(self.trainer, parameters)

    def count_step(self, loss: Tensor) -> None:
        """Counts, at the end of an optimizer step, steps in a row that were skipped or had a loss that is not finite.

        Args:
            loss: The loss of the step, the same on all ranks.

        Raises:
            RuntimeError: ``max_skipped`` of them came in a row.
        """
        skipped = self._diverges or not math.isfinite(loss)
        self._diverges = False
        self.count_skipped(skipped)

    def count_skipped(self, skipped: bool) -> None:
        """Counts the steps (iterations of a stage of reinforcement learning) in a row that were skipped.

        Args:
            skipped: Whether this one was; the same on all ranks.

        Raises:
            RuntimeError: ``max_skipped`` of them came in a row.
        """
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped >= self.max_skipped:
            under_way = self.automatic_optimization  # Lightning has not counted this optimizer step yet
            raise RuntimeError(self._diverged_run(self.trainer.global_step + under_way))

    def _diverged_run(self, step: int) -> str:
        what = "optimizer steps" if self.automatic_optimization else "iterations"
        return (
            f"{self.skipped} {what} in a row were skipped, since losses or gradients were not finite (step {step}). "
            "Lower the learning rate, look at the data and rewards, or resume from the last checkpoint."
        )

    def on_train_epoch_end(self) -> None:
        """Tells a run that diverged, and was too short for ``max_skipped``, from one that is done.

        Raises:
            RuntimeError: The run ends in several steps that were skipped.
        """
        trainer = self.trainer
        ends = trainer.global_step == trainer.max_steps or trainer.current_epoch + 1 == trainer.max_epochs
        if ends and self.skipped > 1:
            raise RuntimeError(f"The run ends here. {self._diverged_run(trainer.global_step)}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds RNG states of ranks with different data; drops frozen weights."""
        if self._mid_step and self.trainer.state.fn == TrainerFn.FITTING:
            rank_zero_warn(
                "This checkpoint falls between two micro-batches of one optimizer step (a time-based ModelCheckpoint, "
                "or a val_check_interval that is no multiple of accumulate_grad_batches). The gradients gathered so "
                "far are not in it: a run resumed from it will differ."
            )
        checkpoint["stage"] = {"classes": _stages(type(self)), "objects": self._objects, **self._makers()}
        checkpoint["stage"] |= self._stands_on()
        checkpoint["rng_states"] = gather_objects(rng_state())
        checkpoint["skipped"] = self.skipped
        frozen = self._frozen()
        modules = self.named_modules(remove_duplicate=False)
        scales = tuple(f"{name}." for name, module in modules if is_quantized_layer(module))
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in frozen and not k.startswith(scales)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores this rank's RNG state, and completes the weights with the frozen ones.

        Raises:
            CheckpointError: It is another stage's, its optimizer or schedule is of another kind, or its weights stand
                on others.
        """
        states = checkpoint.get("rng_states", [])
        self.skipped = checkpoint.get("skipped", 0)
        try:
            trainer = self.trainer
        except RuntimeError:  # load_from_checkpoint: no run goes on
            trainer = None
        self._loaded_from = "The checkpoint" if trainer is None else str(trainer.ckpt_path)
        _check_stage(type(self), checkpoint, self._loaded_from)
        if trainer is not None:
            self._check_stands_on(checkpoint)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._makers_to_match = {k: checkpoint["stage"][k] for k in ("optimizers", "schedules")}
            self._rates_to_match = [_rates(state) for state in checkpoint.get("optimizer_states", ())]
            if trainer.optimizers:  # else there are some when fit starts
                self._match_makers()
        if trainer is not None and len(states) == data_size():
            self._rng_to_restore = states[data_rank()]
        own = self.state_dict()
        saved = checkpoint["state_dict"]
        for name in self._frozen() - saved.keys():
            saved[name] = own[name]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; says in a line why weights do not fit.

        Raises:
            CheckpointError: Their names or shapes are others than those of this stage's models.
        """
        where, self._loaded_from = self._loaded_from, "The state dict"
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            frozen = self._frozen()  # a checkpoint holds none of them
            saved, own = (
                shapes_of({k: v for k, v in state.items() if k not in frozen})
                for state in (state_dict, self.state_dict())
            )
            why = explain_mismatch(saved, own)
            if why is None:
                raise
            raise CheckpointError(f"{where} does not fit {type(self).__name__}. {why}") from error

    def _stands_on(self) -> dict[str, Any]:
        """What decides how a checkpoint's weights are used, and is not in them."""
        lora, whole = self.lora, self.strategy is not None and holds_whole_models(self.strategy)
        return {
            "lora": None if lora is None else {name: getattr(lora, name) for name in ("r", "alpha", "rslora")},
            "quantization": self.load.quantization,
            "frozen": sample_frozen(self) if whole else {},
        }

    def _check_stands_on(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuses a checkpoint whose weights fit, and would be scaled otherwise or stand on other frozen ones.

        Raises:
            CheckpointError: It is one.
        """
        saved, own = checkpoint["stage"], self._stands_on()
        fits = self.trainer.state.fn == TrainerFn.FITTING
        was, now = saved.get("lora"), own["lora"]
        if was and now and was["r"] == now["r"] and was != now:
            name = next(name for name in was if was[name] != now[name])
            self._refuse(
                f"made with lora.{name}={was[name]}, and this run has {now[name]}. Set lora.{name} to {was[name]}"
            )
        was, now = saved.get("quantization", own["quantization"]), own["quantization"]
        if fits and was != now:
            was, now = was or "null", now or "null"
            self._refuse(f"made with load.quantization={was}, and this run has {now}. Set load.quantization to {was}")
        unread = ("reward.",) if fits else ("reward.", "reference.")  # no weights of the checkpoint stand on these
        frozen = {
            name: values
            for name, values in own["frozen"].items()
            if not name.startswith(unread) and name not in checkpoint["state_dict"]
        }
        if (name := other_frozen(saved.get("frozen", {}), frozen)) is not None:
            what = "reference (or pretrained, of which it is a copy)" if name.startswith("reference.") else "pretrained"
            self._refuse(f"made on other frozen weights than this run has: {name} differs. Give the same {what}")

    def _refuse(self, why: str) -> None:
        raise CheckpointError(f"{self._loaded_from} does not fit {type(self).__name__}. It was {why}, or {OTHER_RUN}.")

    def _makers(self) -> dict[str, list[str]]:
        """Kinds of optimizers and schedules."""
        optimizers = [o.boosted.original if isinstance(o, ShardedOptimizer) else o for o in self.trainer.optimizers]
        return {
            "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
            "schedules": [type(config.scheduler).__name__ for config in self.trainer.lr_scheduler_configs],
        }

    def _match_makers(self) -> None:
        """Refuses a checkpoint whose optimizers or schedules are of another kind: their states would not fit.

        Warns where its learning rate is another than that of the settings, which its states then replace.
        """
        saved, self._makers_to_match = self._makers_to_match, None
        now = self._makers()
        for what in now if saved else ():
            if saved[what] and saved[what] != now[what]:  # type: ignore[index]
                raise CheckpointError(
                    f"{self.trainer.ckpt_path} was made with the {what} {', '.join(saved[what])}, and "  # type: ignore[index]
                    f"{', '.join(now[what]) or 'none'} can't go on from their states. Give the same ones, or start a "
                    "new run, with what this one exported as pretrained."
                )
        before, self._rates_to_match = self._rates_to_match, []
        if ReduceLROnPlateau.__name__ in now["schedules"]:
            return  # it leaves no trace of what it began with
        for state, optimizer in zip(before, self.trainer.optimizers, strict=False):
            own = _rates({"param_groups": optimizer.param_groups})
            if changed := [(was, rate) for was, rate in zip(state, own, strict=False) if was != rate]:
                rank_zero_warn(
                    f"The optimizer goes on with the learning rate {changed[0][0]:g} of {self.trainer.ckpt_path}, not "
                    f"with the {changed[0][1]:g} of the settings. To train with another one, start a new run, with "
                    "what that one exported as pretrained."
                )
                return

    @_restricted_classmethod  # Lightning's own: not to be called on an object, which it would leave as it is
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Lightning's; what a checkpoint can't hold must be given again.

        Args:
            checkpoint_path: A file.
            map_location: As of ``torch.load``.
            hparams_file: YAML of other settings.
            strict: Whether names of weights must match.
            weights_only: Whether to read tensors and plain values alone. None is True, as torch has it from 2.6 on.
            **kwargs: Settings that replace those of the checkpoint, and the objects among them.

        Returns:
            The module.

        Raises:
            CheckpointError: It is no checkpoint, another stage's, or was made with objects that are not given.
        """
        weights_only = True if weights_only is None else weights_only
        if isinstance(checkpoint_path, (str, os.PathLike)) and os.path.exists(checkpoint_path):
            with explain_bad_checkpoint(checkpoint_path):
                held = torch.load(checkpoint_path, "cpu", mmap=True, weights_only=weights_only)
            check_is_checkpoint(held, checkpoint_path)
            _check_stage(cls, held, os.fspath(checkpoint_path))
            moved = find_moved(cls, held.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}))
            if lost := {name: place for name, place in moved.items() if place.partition(".")[0] not in kwargs}:
                name, place = next(iter(lost.items()))
                raise CheckpointError(
                    f"{os.fspath(checkpoint_path)} was written by an earlier version of lightning_rlhf, whose "
                    f"{', '.join(lost)} would be lost: {name} is {place} now. Give "
                    f"{cls.__name__}.load_from_checkpoint(..., {write_argument(place)})."
                )
            objects = held["stage"]["objects"]
            if missing := [name for name in objects if name not in kwargs]:
                raise CheckpointError(
                    f"{os.fspath(checkpoint_path)} was made with what no checkpoint can hold: "
                    f"{', '.join(f'{name} ({objects[name]})' for name in missing)}. Give the same again: "
                    f"{cls.__name__}.load_from_checkpoint(..., {', '.join(f'{name}=...' for name in missing)})."
                )
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)

    def _frozen(self) -> set[str]:
        """Names in the state dict that no optimizer changes; buffers are kept."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}


def matmul_precision(device: torch.device, tf32: bool) -> str:
    """Returns torch's precision of fp32 products: TF32 on a CUDA device, unless the process has chosen its own."""
    now = torch.get_float32_matmul_precision()
    return "high" if tf32 and device.type == "cuda" and now == "highest" else now


def _rates(state: object) -> list[float]:
    """The learning rate of each group of an optimizer's state, before a schedule changed it."""
    groups = state.get("param_groups", ()) if isinstance(state, Mapping) else ()
    return [group.get("initial_lr", group["lr"]) for group in groups if "lr" in group]


def _stages(kind: type) -> list[str]:
    """The names of a stage's class and of those that it extends."""
    return [base.__name__ for base in kind.__mro__ if issubclass(base, Stage) and base is not Stage]


def _check_stage(kind: type[Stage], checkpoint: dict[str, Any], where: str) -> None:
    """Refuses a checkpoint of another stage, or of another layout; one of a subclass or of a base will do.

    Raises:
        CheckpointError: It is one.
    """
    saved, own = checkpoint.get("stage", {}).get("classes"), _stages(kind)
    if not saved:
        raise CheckpointError(f"{where} is no checkpoint of a stage of lightning_rlhf: it doesn't say which stage.")
    if saved[0] not in own and kind.__name__ not in saved and kind is not Stage:
        raise CheckpointError(
            f"{where} is a checkpoint of {saved[0]}, and {kind.__name__} can't go on from it. Give what that run "
            "exported (its hf/best or hf/last) as pretrained."
        )
    for entry, keys in kind.entries.items():
        if entry not in checkpoint or any(key not in checkpoint[entry] for key in keys):
            raise CheckpointError(
                f"{where} was written by an earlier version of lightning_rlhf: its entry {entry!r} is missing or has "
                f"other keys, so {kind.__name__} can't go on from it. Give what that run exported (its hf/best or "
                "hf/last) as pretrained, or finish it with the version that wrote it."
            )


def _name(value: object) -> str:
    """Returns a short name for an object."""
    return str(getattr(value, "__qualname__", None) or type(value).__name__)


def _without_objects(group: Any) -> Any:
    """Returns a dataclass of settings with None in the place of objects that no checkpoint may hold."""
    values = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    return dataclasses.replace(group, **{name: None for name, value in values.items() if not _is_data(value)})


def _is_data(value: object) -> bool:
    """Returns whether a checkpoint may hold a value: plain values, and dataclasses of settings made of them."""
    if dataclasses.is_dataclass(value):
        return all(_is_data(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(isinstance(key, (int, str)) and _is_data(entry) for key, entry in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
