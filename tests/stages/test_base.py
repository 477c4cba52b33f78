"""What all stages share: what they refuse, what their checkpoints hold."""

import copy
import itertools
import json
import math
import random
import re
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from grouping import grouped
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins.precision import MixedPrecision
from runs import quiet

from lightning_rlhf import (
    DPOModule,
    HFExport,
    InstructionDataModule,
    Load,
    LoRA,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)
from lightning_rlhf.cli import main
from lightning_rlhf.models import load_causal_lm, load_tokenizer
from lightning_rlhf.rewards import make_reward
from lightning_rlhf.rollout import CachedEngine
from lightning_rlhf.stages.base import rng_state, set_rng_state
from lightning_rlhf.stages.optim import CosineWarmup
from lightning_rlhf.utils import CheckpointError

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 3)} for i in range(8)]


def fit(model_dir, tmp_path, val=None, ckpt=None, module=None, **options):
    settings = dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path)  # fmt: skip
    trainer = L.Trainer(**{**settings, **options})
    module = module or SFTModule(model_dir)
    data = InstructionDataModule(ROWS, val=val, batch_size=4, val_fraction=0.0, cache_dir=tmp_path)
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer, module


class Seen(L.Callback):
    """Notes the rows of each step in ``by_step``, and stops the run before step ``end``."""

    def __init__(self, by_step, end):
        self.by_step, self.end = by_step, end

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.end:
            raise Stopped
        self.by_step[trainer.global_step] = batch.rows, trainer.current_epoch


class Stopped(Exception):
    pass


def stop_and_resume(model_dir, out, ends, **saves):
    """Rows and epochs by step of a run of three epochs that is stopped before each of the steps; its last trainer."""
    by_step, last = {}, None
    for end in (*ends, None):
        saver = ModelCheckpoint(out, filename="{step}", save_top_k=-1, **saves)
        with nullcontext() if end is None else pytest.raises(Stopped):
            trainer, _ = fit(model_dir, out, val=ROWS[:2], callbacks=[Seen(by_step, end), saver], max_epochs=3,
                             enable_checkpointing=True, ckpt=last)  # fmt: skip
        last = max(out.glob("*.ckpt"), key=lambda path: int(path.stem[5:]), default=None)
    return by_step, trainer


@pytest.mark.parametrize("saves", [dict(every_n_train_steps=1), dict(every_n_epochs=1),
                                   dict(every_n_epochs=1, save_on_train_epoch_end=True)], ids=str)  # fmt: skip
@pytest.mark.parametrize("ends", [(1, 2, 3, 4, 5), (2, 4), (2, 3, 4), (4, 5)], ids=str)
def test_epochs_are_counted_however_often_a_run_is_resumed(tiny_model_dir, tmp_path, ends, saves):
    whole, _ = stop_and_resume(tiny_model_dir, tmp_path / "whole", (), **saves)
    assert [epoch for _, epoch in whole.values()] == [0, 0, 1, 1, 2, 2]
    assert len({rows for rows, _ in whole.values()}) == 6, "epochs can be told apart"
    found, trainer = stop_and_resume(tiny_model_dir, tmp_path / "stopped", ends, **saves)
    assert found == whole
    assert trainer.global_step == 6 and trainer.current_epoch == 3


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random(), random.gauss(0, 1)]


def test_rng_states_come_back_through_a_safe_load(tmp_path):
    random.gauss(0, 1)  # leaves one value waiting, which belongs to the state
    torch.save(rng_state(), tmp_path / "state")
    want = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == want


@pytest.mark.parametrize(
    ("schedule", "tells"),
    [
        (CosineWarmup, True),
        (partial(ReduceLROnPlateau, monitor="val/loss"), False),  # it leaves no trace of what it began with
    ],
    ids=["warmup", "plateau"],
)
def test_a_resumed_run_tells_that_another_learning_rate_is_not_taken(tiny_model_dir, tmp_path, schedule, tells):
    def go(lr, **options):
        module = SFTModule(tiny_model_dir, optimizer=partial(torch.optim.AdamW, lr=lr), lr_scheduler=schedule)
        fit(tiny_model_dir, tmp_path, val=ROWS, module=module, **options)

    go(1e-3, callbacks=[ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1)], enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        go(1e-3, ckpt=tmp_path / "x.ckpt", max_epochs=2)
        assert not [w for w in told if "learning rate" in str(w.message)]
        go(1e-5, ckpt=tmp_path / "x.ckpt", max_epochs=2)
    said = [str(w.message) for w in told if "learning rate" in str(w.message)]
    assert len(said) == tells
    if tells:
        assert "goes on with the learning rate 0.001 of" in said[0] and "with the 1e-05 of the settings" in said[0]


def test_accumulation_that_changes_by_epoch_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        fit(tiny_model_dir, tmp_path, callbacks=[GradientAccumulationScheduler({0: 2})])


def test_a_finder_of_learning_rates_is_refused_where_it_has_nothing_to_set(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"LearningRateFinder sets a field lr of the module.*model\.optimizer\.lr"):
        fit(tiny_model_dir, tmp_path, callbacks=[LearningRateFinder(num_training_steps=2)])

    fit(tiny_model_dir, tmp_path, callbacks=[LearningRateFinder(num_training_steps=2, update_attr=False)], max_steps=1)

    class Mine(SFTModule):
        lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    finder = LearningRateFinder(num_training_steps=2)
    _, module = fit(tiny_model_dir, tmp_path, callbacks=[finder], module=Mine(tiny_model_dir), max_steps=1)
    assert finder.optimal_lr is not None and module.skipped == 0


def test_a_checkpoint_between_two_micro_batches_warns(tiny_model_dir, tmp_path):
    class Save(L.Callback):
        def __init__(self, at):
            self.at = at

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == self.at:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    options = dict(accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="between two micro-batches"):
        fit(tiny_model_dir, tmp_path, callbacks=[Save(0)], **options)
    with pytest.warns(UserWarning, match="between two micro-batches"):
        fit(tiny_model_dir, tmp_path, enable_checkpointing=True, val_check_interval=3, val=ROWS,
            callbacks=[ModelCheckpoint(tmp_path)], **options)  # fmt: skip
    with pytest.warns() as caught:
        fit(tiny_model_dir, tmp_path, callbacks=[Save(1)], **options)
        fit(tiny_model_dir, tmp_path, enable_checkpointing=True,
            callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=1)], **options)  # fmt: skip
    assert not [w for w in caught if "between two micro-batches" in str(w.message)]


def test_a_fresh_run_does_not_take_the_loaded_checkpoints_rng(tiny_model_dir, tmp_path):
    trainer, _ = fit(tiny_model_dir, tmp_path)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = SFTModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert module._rng_to_restore is None


# ------------------------------------------------------------------------------------------------- loading


def sgd(params):
    return torch.optim.SGD(params, lr=0.5)


def steps(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 3)


def brief_loss(pairs):
    return -pairs.better_ratio


def brief(prompts, completions):
    return [-float(len(text)) for text in completions]


PAIRS = [{"prompt": f"Say {i}", "chosen": f"{i}", "rejected": f"{i} fox"} for i in range(8)]
QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
             enable_checkpointing=False)  # fmt: skip


def data_of(module, folder):
    kinds = {SFTModule: InstructionDataModule, RewardModule: PreferenceDataModule, DPOModule: PreferenceDataModule,
             PPOModule: PromptDataModule}  # fmt: skip
    kind = next(kinds[base] for base in type(module).__mro__ if base in kinds)
    rows = PAIRS if kind is PreferenceDataModule else ROWS
    return kind(rows, val=rows, batch_size=4, cache_dir=folder)


def run(module, folder, ckpt=None, steps=1):
    trainer = L.Trainer(max_steps=steps, default_root_dir=folder, limit_val_batches=0, **QUIET)
    trainer.fit(module, data_of(module, folder), ckpt_path=ckpt)
    return trainer


def ppo(model_dir, **settings):
    return PPOModule(model_dir, brief, **grouped(critic_lr=1e-3, epochs=1, **settings))


@pytest.fixture(scope="module")
def saved(tiny_model_dir, tmp_path_factory):
    """A checkpoint of each stage, made with objects."""
    folder, model_dir = tmp_path_factory.mktemp("saved"), Path(tiny_model_dir)
    tokenizer = load_tokenizer(model_dir)
    for module in (
        SFTModule(model_dir, optimizer=sgd),
        RewardModule(model_dir, tokenizer, lr_scheduler=steps),
        DPOModule(model_dir, reference=load_causal_lm(model_dir), loss=brief_loss),
        ppo(load_causal_lm(model_dir), tokenizer=tokenizer, engine=CachedEngine(max_rows=2)),
    ):
        run(module, folder).save_checkpoint(folder / f"{type(module).__name__}.ckpt")
    return folder


@pytest.mark.parametrize(
    ("kind", "objects"),
    [
        (SFTModule, dict(optimizer=sgd)),
        (RewardModule, dict(lr_scheduler=steps, tokenizer=load_tokenizer)),
        (DPOModule, dict(loss=brief_loss, reference=load_causal_lm)),
        (PPOModule, dict(engine=CachedEngine(), pretrained=load_causal_lm, reward=brief, tokenizer=load_tokenizer)),
    ],
)
def test_objects_that_a_checkpoint_can_not_hold_are_asked_for(kind, objects, saved, tiny_model_dir):
    path = saved / f"{kind.__name__}.ckpt"
    given = {k: v(tiny_model_dir) if v in (load_tokenizer, load_causal_lm) else v for k, v in objects.items()}
    names = ", ".join(f"{k} ({getattr(v, '__qualname__', type(v).__name__)})" for k, v in given.items())
    again = f"{kind.__name__}.load_from_checkpoint(..., {', '.join(f'{k}=...' for k in given)})."
    with pytest.raises(
        CheckpointError, match=re.escape(f"{path} was made with what no checkpoint can hold: {names}. ")
    ):
        kind.load_from_checkpoint(path)
    with pytest.raises(CheckpointError, match=re.escape(f"Give the same again: {again}")):
        kind.load_from_checkpoint(path)
    *most, last = given
    with pytest.raises(CheckpointError, match=re.escape(f"can hold: {last} (")):
        kind.load_from_checkpoint(path, **{name: given[name] for name in most})
    module = kind.load_from_checkpoint(path, **given)
    assert kind is not SFTModule or module.make_optimizer is sgd
    assert kind is not RewardModule or module.make_lr_scheduler is steps
    held, own = torch.load(path, weights_only=True)["state_dict"], module.state_dict()
    assert all(torch.equal(own[key], held[key]) for key in held)


def test_arguments_of_a_subclass_are_asked_for_too(tiny_model_dir, tmp_path):
    class Mine(SFTModule):
        def __init__(self, pretrained, hook, **settings):
            super().__init__(pretrained, **settings)

    run(Mine(tiny_model_dir, brief, optimizer=sgd), tmp_path).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=re.escape("hook (brief), optimizer (sgd)")):
        Mine.load_from_checkpoint(tmp_path / "x.ckpt")
    assert Mine.load_from_checkpoint(tmp_path / "x.ckpt", hook=None, optimizer=sgd).make_optimizer is sgd


def test_a_run_of_the_command_line_comes_back_with_its_optimizer(tiny_model_dir, tmp_path, monkeypatch):
    """And a further one keeps to its own settings, whatever the checkpoint was made with."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [
        "fit", "--model", "SFTModule", "--model.pretrained", str(tiny_model_dir), "--data", "InstructionDataModule",
        "--data.train", str(tmp_path / "rows.jsonl"), "--data.val_fraction", "0.0", "--data.batch_size", "4",
        "--data.cache_dir", str(tmp_path), "--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path),
        "--trainer.enable_progress_bar", "false", "--trainer.callbacks+", "ModelCheckpoint",
        "--trainer.callbacks.dirpath", str(tmp_path), "--trainer.callbacks.filename", "x",
    ]  # fmt: skip
    own = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.25"]
    main([*command, *own, "--trainer.max_steps", "1"])
    path = tmp_path / "x.ckpt"
    parameters = [torch.nn.Parameter(torch.ones(1))]
    optimizer = SFTModule.load_from_checkpoint(path).make_optimizer(parameters)
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["lr"] == 0.25

    found = []
    monkeypatch.setattr(SFTModule, "on_train_start", lambda self: found.append(self.z_loss))
    main([*command, *own, "--trainer.max_steps", "2", "--model.z_loss", "0.5", "--ckpt_path", str(path)])
    assert found == [0.5]
    with pytest.raises(SystemExit, match=r"x\.ckpt was made with the optimizers SGD, and AdamW can't go on"):
        main([*command, "--trainer.max_steps", "2", "--ckpt_path", str(path)])


@pytest.mark.parametrize(
    ("held", "kind"),
    [(SFTModule, RewardModule), (RewardModule, PPOModule), (PPOModule, DPOModule), (DPOModule, SFTModule)],
)
def test_a_checkpoint_of_another_stage_is_named(held, kind, saved, tiny_model_dir, tmp_path):
    path = saved / f"{held.__name__}.ckpt"
    module = ppo(tiny_model_dir) if kind is PPOModule else kind(tiny_model_dir)
    message = re.escape(f"{path} is a checkpoint of {held.__name__}, and {kind.__name__} can't go on from it")
    with pytest.raises(CheckpointError, match=message):
        run(module, tmp_path, path, steps=2)
    with pytest.raises(CheckpointError, match=message):
        L.Trainer(default_root_dir=tmp_path, **QUIET).validate(module, data_of(module, tmp_path), ckpt_path=path)
    with pytest.raises(CheckpointError, match=message):
        kind.load_from_checkpoint(path)


@pytest.mark.parametrize(
    ("kind", "entry", "key"),
    [
        (PPOModule, "rl", None),
        (PPOModule, "rl", "kl_coef"),
        (RewardModule, "score_offset", None),
        (DPOModule, "dpo", "delta"),
        (SFTModule, "stage", "objects"),
    ],
)
def test_a_checkpoint_of_an_earlier_layout_is_named(kind, entry, key, saved, tiny_model_dir, tmp_path):
    held = torch.load(saved / f"{kind.__name__}.ckpt", weights_only=True)
    del (held if key is None else held[entry])[entry if key is None else key]
    torch.save(held, path := tmp_path / "old.ckpt")
    module = ppo(tiny_model_dir) if kind is PPOModule else kind(tiny_model_dir)
    message = rf"old.ckpt was written by an earlier version.*'{entry}'.*{kind.__name__} can't go on.* as pretrained, or"
    for act in (
        lambda: run(module, tmp_path, path, steps=2),
        lambda: L.Trainer(default_root_dir=tmp_path, **QUIET).validate(
            module, data_of(module, tmp_path), ckpt_path=path
        ),
        lambda: kind.load_from_checkpoint(path),
    ):
        with pytest.raises(CheckpointError, match=message):
            act()


def test_settings_of_an_earlier_checkpoint_are_not_lost_silently(saved, tmp_path):
    held = torch.load(saved / "SFTModule.ckpt", weights_only=True)
    held["hyper_parameters"] |= {"dtype": "bfloat16", "layout": "padded"}
    torch.save(held, tmp_path / "old.ckpt")
    message = r"earlier version.*whose dtype, layout would be lost: dtype is load\.dtype now\. Give .*load=Load\(dtype="
    with pytest.raises(CheckpointError, match=message):
        SFTModule.load_from_checkpoint(tmp_path / "old.ckpt", optimizer=sgd)
    module = SFTModule.load_from_checkpoint(tmp_path / "old.ckpt", optimizer=sgd, load=Load(layout="padded"))
    assert module.load.layout == "padded"


# ------------------------------------------------------------------------------------------------- models of one's own


@pytest.mark.parametrize("stage", [SFTModule, RewardModule])
def test_a_model_may_be_replaced_before_a_fit(stage, tiny_model_dir, tmp_path):
    """And is then the one that is trained."""
    name = "policy" if stage is SFTModule else "reward_model"
    module, other = (stage(tiny_model_dir, optimizer=sgd) for _ in range(2))
    for each in (module, other):
        each.configure_model()
    first, second = getattr(module, name), getattr(other, name)
    start = copy.deepcopy(first.state_dict())
    setattr(module, name, second)
    run(module, tmp_path)
    assert module.model_to_export is second
    assert all(torch.equal(value, start[key]) for key, value in first.state_dict().items())
    assert any(not torch.equal(value, start[key]) for key, value in second.state_dict().items())


def test_a_model_is_not_replaced_during_a_fit(tiny_model_dir, tmp_path):
    class Replaces(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            pl_module.policy = copy.deepcopy(pl_module.policy)

    with pytest.raises(ValueError, match=r"SFTModule\.policy was replaced during fit.*Replace it before fit"):
        fit(tiny_model_dir, tmp_path, callbacks=[Replaces()])


@pytest.mark.parametrize("name", ["policy", "reference", "critic", "reward"])
def test_models_of_reinforcement_learning_come_through_the_constructor(name, tiny_model_dir):
    """Replaced ones would not have reached rollouts, scores and updates."""
    module = ppo(tiny_model_dir)
    other = ppo(tiny_model_dir)
    other.configure_model()
    given_as = {"policy": "pretrained", "reference": "pretrained", "critic": r"critic=Critic\(model\)"}.get(name, name)
    for configured in (False, True):
        if name == "reward" and not configured:
            continue  # nothing has been made of it yet
        if configured:
            module.configure_model()
        with pytest.raises(ValueError, match=rf"PPOModule\.{name} can't be replaced: .*Give the model as {given_as}"):
            setattr(module, name, getattr(other, name))
    module.policy = module.policy  # as decorators and wrappers may do


def test_a_reward_may_be_replaced_before_models_are_loaded(tiny_model_dir, tmp_path):
    module = ppo(tiny_model_dir)
    module.reward = make_reward(lambda prompts, completions: [5.0] * len(completions), None)
    assert run(module, tmp_path).callback_metrics["train/score"] == 5


def test_a_subclass_goes_on_from_its_base_and_back(saved, tiny_model_dir, tmp_path):
    class Mine(SFTModule):
        pass

    trainer = run(Mine(tiny_model_dir, optimizer=sgd), tmp_path, saved / "SFTModule.ckpt", steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert SFTModule.load_from_checkpoint(tmp_path / "x.ckpt", optimizer=sgd).make_optimizer is sgd


def test_what_is_no_checkpoint_is_named(tiny_model_dir, tmp_path):
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("no checkpoint\n" * 99)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.4"}, tmp_path / "foreign.ckpt")
    torch.save({"lm_head.weight": torch.zeros(1)}, tmp_path / "weights.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "foreign.ckpt").read_bytes()[:-40])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.ckpt").touch()
    messages = {
        "empty.ckpt": "is an empty file",
        "text.ckpt": "is not a checkpoint, or it is damaged",
        "half.ckpt": "is not a checkpoint, or it is damaged",
        "foreign.ckpt": "is no checkpoint of a stage of lightning_rlhf",
        "weights.bin": "is not a Trainer's checkpoint. It may hold only weights",
        "list.pt": "is not a Trainer's checkpoint",
        "run": f"is a directory, not a checkpoint. Give a file, such as {tmp_path / 'run' / 'a.ckpt'}",
        str(tiny_model_dir): "is a Hugging Face model, not a checkpoint. Set pretrained to it",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name} {message}")):
            SFTModule.load_from_checkpoint(tmp_path / name)
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name} {message}")):
            run(SFTModule(tiny_model_dir), tmp_path, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing"):
        SFTModule.load_from_checkpoint(tmp_path / "nothing.ckpt")


def test_another_optimizer_or_schedule_is_named_before_the_plan(saved, tiny_model_dir, tmp_path):
    sft, reward = saved / "SFTModule.ckpt", saved / "RewardModule.ckpt"
    rows = InstructionDataModule(ROWS[:6], val=ROWS, batch_size=2, cache_dir=tmp_path)  # which is another plan
    trainer = L.Trainer(max_steps=2, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(CheckpointError, match=re.escape(f"{sft} was made with the optimizers SGD, and AdamW can't")):
        trainer.fit(SFTModule(tiny_model_dir), rows, ckpt_path=sft)
    with pytest.raises(CheckpointError, match=r"with the schedules StepLR, and CosineWarmup can't go on"):
        run(RewardModule(tiny_model_dir), tmp_path, reward, steps=2)
    with pytest.raises(CheckpointError, match=r"with the optimizers AdamW, AdamW, and SGD, SGD can't go on"):
        run(ppo(tiny_model_dir, optimizer=sgd), tmp_path, saved / "PPOModule.ckpt", steps=2)


# ------------------------------------------------------------------------------------------------- divergence


class Broken(L.Callback):
    """Spoils the gradients, or the loss, of chosen optimizer steps."""

    def __init__(self, steps, loss=False):
        self.steps, self.loss, self.weights, self.seen = set(steps), loss, None, []

    def on_before_backward(self, trainer, pl_module, loss):
        if self.loss and trainer.global_step in self.steps:
            loss.data.mul_(math.nan)
            loss.register_hook(lambda gradient: gradient * math.nan)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.steps and not self.loss:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(pl_module.skipped)

    def on_train_batch_start(self, *_):
        pass


def learn(stage, model_dir, tmp_path, broken=(), loss=False, lr=1e-3, plugins=None, steps=6, lora=None,
          max_skipped=3, callbacks=(), checkpoints=False, **options):  # fmt: skip
    torch.manual_seed(0)
    given = dict(lora=lora, max_skipped=max_skipped, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), **options)
    if stage == "sft":
        module, data = SFTModule(model_dir, **grouped(**given)), InstructionDataModule
    else:
        module, data = RewardModule(model_dir, **grouped(**given)), PreferenceDataModule
    watch = Broken(broken, loss)
    settings = dict(enable_checkpointing=checkpoints)
    trainer = quiet(tmp_path, max_steps=steps, callbacks=[watch, *callbacks], plugins=plugins, **settings)
    rows = ROWS if stage == "sft" else PAIRS
    size = 4 if stage == "sft" else 8
    trainer.fit(module, data(rows, batch_size=size, val_fraction=0.0, cache_dir=tmp_path / "cache"))
    return module, watch


def weights(module):
    return {k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("loss", [False, True], ids=["gradients", "loss"])
def test_a_step_that_is_not_finite_is_dropped(tiny_model_dir, tmp_path, stage, loss):
    """Neither by Adam's momentum nor by weight decay does a weight move."""
    before = []

    class Before(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            before.append(weights(pl_module))

    with pytest.warns(UserWarning, match="Optimizer step 4 is skipped: its gradients are not finite"):
        module, watch = learn(stage, tiny_model_dir, tmp_path, (1, 2, 4), loss, callbacks=[Before()])
    assert watch.seen == [0, 1, 2, 0, 1, 0]
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise([*before, weights(module)])]
    assert moved == [True, False, False, True, False, True]
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_run_that_diverged_ends_with_an_error(tiny_model_dir, tmp_path, stage):
    """It went on to its end and exported NaN."""
    export = dict(callbacks=[HFExport(tmp_path / "hf", when="end")])
    with pytest.raises(RuntimeError, match=r"3 optimizer steps in a row were skipped.*\(step 5\)"):
        learn(stage, tiny_model_dir, tmp_path, range(2, 99), steps=50, **export)
    assert not (tmp_path / "hf").exists()
    with pytest.raises(RuntimeError, match=r"The run ends here. 2 optimizer steps in a row"):  # too short for three
        learn(stage, tiny_model_dir, tmp_path, (4, 5), **export)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
def test_a_learning_rate_that_is_too_large_is_told(tiny_model_dir, tmp_path, lora):
    with pytest.raises(RuntimeError, match="in a row were skipped"):
        learn("sft", tiny_model_dir, tmp_path, lr=1e12, steps=5, lora=lora, max_skipped=5,
              lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0))  # fmt: skip


class ScalesOnly(MixedPrecision):
    def forward_context(self):
        return nullcontext()


def test_overflow_in_fp16_is_no_divergence_until_the_scale_is_one(tiny_model_dir, tmp_path):
    def plugin(scale):
        return [ScalesOnly("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))]

    class Overflow(Broken):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step in self.steps:
                loss.register_hook(lambda gradient: gradient * math.inf)

        def on_before_optimizer_step(self, *_):
            pass

    watch = Overflow(range(5))
    module, _ = learn("sft", tiny_model_dir, tmp_path, plugins=plugin(2.0**16), callbacks=[watch])
    assert watch.seen == [0] * 6 and module.trainer.precision_plugin.scaler.get_scale() == 2.0**11
    with pytest.raises(RuntimeError, match="3 optimizer steps in a row"):
        learn("sft", tiny_model_dir, tmp_path, plugins=plugin(4.0), callbacks=[Overflow(range(99))], steps=50)


def test_what_a_broken_off_run_left_in_metrics_is_not_counted_in_the_next(tiny_model_dir, tmp_path):
    found = []
    for left in (False, True):
        module = SFTModule(tiny_model_dir, optimizer=sgd)
        if left:  # as an error between two micro-batches does
            module.metrics.update("train", torch.ones(1), loss=torch.tensor([100.0]))
        trainer = run(module, tmp_path)
        found.append(trainer.callback_metrics["train/loss"].item())
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_checkpoint_of_a_skipped_step_counts_it(tiny_model_dir, tmp_path, stage):
    """A checkpoint is written before the module's own end of the batch: it held the count of the step before."""
    every = ModelCheckpoint(tmp_path / "every", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    learn(stage, tiny_model_dir, tmp_path, (1, 2), steps=4, callbacks=[every], checkpoints=True)
    paths = [tmp_path / "every" / f"step={step}.ckpt" for step in (1, 2, 3, 4)]
    assert [torch.load(path, weights_only=True)["skipped"] for path in paths] == [0, 1, 2, 0]


def test_a_checkpoint_keeps_the_count_and_a_second_fit_starts_anew(tiny_model_dir, tmp_path):
    module, _ = learn("sft", tiny_model_dir, tmp_path, (5,))
    assert module.skipped == 1
    module.trainer.save_checkpoint(tmp_path / "x.ckpt")
    data = InstructionDataModule(ROWS, batch_size=4, val_fraction=0.0, cache_dir=tmp_path / "cache")
    counts = []
    module.on_train_start = lambda: counts.append(module.skipped)
    quiet(tmp_path, max_steps=7).fit(module, data, ckpt_path=tmp_path / "x.ckpt")
    module.skipped = 2
    quiet(tmp_path, max_steps=1).fit(module, data)
    assert counts == [1, 0]


# ------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize("monitor", ["train/loss", "val/loss", None])
def test_a_plateau_schedule_goes_by_its_own_metric(tiny_model_dir, tmp_path, stage, monitor):
    """``val/loss`` was always asked for."""
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau
    make = scheduler if monitor is None else partial(ReduceLROnPlateau, monitor=monitor)
    kind, rows = (SFTModule, ROWS) if stage == "sft" else (RewardModule, PAIRS)
    data = InstructionDataModule if stage == "sft" else PreferenceDataModule
    module, seen, want = kind(tiny_model_dir, lr_scheduler=make), [], []

    class Watch(L.Callback):
        def on_train_start(self, trainer, _):
            one = trainer.lr_scheduler_configs[0].scheduler
            step = one.step
            one.step = lambda metrics, epoch=None: (seen.append(float(metrics)), step(metrics))[1]

        def on_train_epoch_end(self, trainer, _):
            want.append(trainer.callback_metrics[monitor or "val/loss"].item())

    trainer = quiet(tmp_path, max_epochs=2, callbacks=[Watch()])
    trainer.fit(module, data(rows, val=None if monitor == "train/loss" else rows, batch_size=4,
                             val_fraction=0.0, cache_dir=tmp_path / "cache"))  # fmt: skip
    assert seen == pytest.approx(want) and len(seen) == 2


# ------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("limits", [dict(limit_train_batches=0.7), dict(overfit_batches=0.7)])
def test_a_share_of_batches_that_cuts_a_step_is_refused(tiny_model_dir, tmp_path, limits):
    """8 rows, 4 a step, 3 micro-batches: 0.7 of 6 batches are 4."""
    with pytest.raises(ValueError, match=r"limit_train_batches=0.7 of an epoch takes 4 micro-batches.*Use 3 or 6"):
        fit(tiny_model_dir, tmp_path, accumulate_grad_batches=3, **limits)
    trainer, _ = fit(tiny_model_dir, tmp_path, accumulate_grad_batches=3, limit_train_batches=0.5)
    assert trainer.global_step == 1
    trainer, _ = fit(tiny_model_dir, tmp_path, accumulate_grad_batches=3, limit_train_batches=1.0)
    assert trainer.global_step == 2
