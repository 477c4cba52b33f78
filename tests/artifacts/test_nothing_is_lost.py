"""What a run left stays as it is: whatever diverges, dry runs, sanity checks and evaluations come after it."""

import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from forked import python
from safetensors.torch import load_file

from lightning_rlhf import (
    EMA,
    HFExport,
    InstructionDataModule,
    LoRA,
    MeasureWinRate,
    Report,
    SampleCompletions,
    SFTModule,
    WritePredictions,
)
from lightning_rlhf.callbacks.interrupt import Interrupted
from lightning_rlhf.cli import main
from lightning_rlhf.models import load_causal_lm
from lightning_rlhf.models.saving import save_pretrained

ROWS = [{"prompt": f"Say {i}", "completion": f"dog {i}" * (1 + i % 3)} for i in range(8)]


def lengths(prompts, completions):
    return [len(completion) for completion in completions]


def sgd(lr):
    return lambda params: torch.optim.SGD(params, lr=lr)


def files(folder):
    """What there is, with its content."""
    every = sorted(p for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in every}


def callbacks():
    return [
        HFExport(monitor="val/loss"),
        SampleCompletions(["Say 1"], max_new_tokens=3),
        Report(),
        MeasureWinRate(lengths, prompts=["Say 2"], max_new_tokens=3),
        WritePredictions(),
        EMA(0.5),
    ]


def trainer(folder, extra=(), **options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    every = [*callbacks(), *extra]
    return L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=every, **{**quiet, **options})


def data(folder):
    parts = dict(val=ROWS[:4], test=ROWS[:4], predict=ROWS)
    return InstructionDataModule(ROWS, **parts, batch_size=4, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """The folder of a whole run, its predictions included."""
    folder = tmp_path_factory.mktemp("finished")
    module = SFTModule(tiny_model_dir, optimizer=sgd(0.1))
    run = trainer(folder, max_epochs=1)
    run.fit(module, data(folder))
    run.predict(module, data(folder))
    run.save_checkpoint(folder / "interrupted.ckpt")
    names = {"samples.jsonl", "report.html", "win_rate.jsonl", "predictions.jsonl"}
    names |= {f"hf/{name}/model.safetensors" for name in ("best", "last")}
    assert names <= files(folder).keys()
    return folder


class Stop(L.Callback):
    """Ends the run when the sanity check is over."""

    def on_sanity_check_end(self, trainer, pl_module):
        raise RuntimeError("enough")


@pytest.mark.parametrize("what", ["fit", "validate", "test", "predict"])
def test_a_dry_run_writes_nothing(what, finished, tiny_model_dir, capsys):
    before = files(finished)
    module = SFTModule(tiny_model_dir, optimizer=sgd(5.0))
    getattr(trainer(finished, fast_dev_run=True), what)(module, datamodule=data(finished))
    assert files(finished) == before
    said = capsys.readouterr()
    assert ("Answers at step" in said.out) == (what == "fit")
    assert str(finished / "hf") not in said.out + said.err  # nor says that it did


class Interrupt(L.Callback):
    """Ctrl-C in the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_dry_run_writes_nothing(finished, tiny_model_dir):
    before = files(finished)
    with pytest.raises(Interrupted):
        run = trainer(finished, [Interrupt()], fast_dev_run=True)
        run.fit(SFTModule(tiny_model_dir, optimizer=sgd(5.0)), data(finished))
    assert files(finished) == before


@pytest.mark.parametrize("what", ["sanity check", "validate", "test"])
def test_evaluations_write_nothing_that_a_run_left(what, finished, tiny_model_dir):
    """A comparison of its own has a file of its own."""
    before = files(finished)
    module = SFTModule(tiny_model_dir, optimizer=sgd(5.0))
    if what == "sanity check":
        with pytest.raises(RuntimeError, match="enough"):
            trainer(finished, [Stop()], max_epochs=1, num_sanity_val_steps=2).fit(module, data(finished))
    else:
        getattr(trainer(finished), what)(module, datamodule=data(finished), verbose=False)
    after = files(finished)
    own = finished / "win_rate_validate.jsonl"
    assert own.exists() == (what == "validate")
    own.unlink(missing_ok=True)
    after.pop(own.name, None)
    assert after == before


def test_an_evaluation_leaves_the_settings_of_the_run(tiny_model_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = [
        "--model", "SFTModule", "--model.pretrained", str(tiny_model_dir), "--data", "InstructionDataModule",
        "--data.train", str(rows), "--data.val", str(rows), "--data.cache_dir", str(tmp_path / "cache"),
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    fit = ["--trainer.max_steps", "1", "--trainer.enable_checkpointing", "false"]
    main(["fit", *options, *fit])
    saved = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(saved)["trainer"]["max_steps"] == 1
    main(["validate", *options])
    main(["fit", *options, *fit, "--trainer.fast_dev_run", "true"])
    assert (tmp_path / "config.yaml").read_text() == saved


# ------------------------------------------------------------------------------------------------- what diverged


@pytest.mark.parametrize("adapter_only", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("kind", ["full", "lora", "saved"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_not_exported(
    kind, adapter_only, value, tiny_model_dir, tiny_tokenizer, tmp_path
):
    if kind == "full" and adapter_only:
        pytest.skip("no adapters")
    lora = LoRA(r=4, modules_to_save=["lm_head"] if kind == "saved" else [])
    model = load_causal_lm(tiny_model_dir, lora=None if kind == "full" else lora)
    target = tmp_path / "hf" / "last"
    save_pretrained(model, tiny_tokenizer, target, adapter_only=adapter_only)
    before = files(tmp_path)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in trained[-1:] + trained[2:3]:  # the first of them is named, however late it comes
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = value
        with pytest.raises(ValueError) as error:
            save_pretrained(model, tiny_tokenizer, target, adapter_only=adapter_only)
        assert f" {name} has " in str(error.value) and str(target) in str(error.value)
        assert "\n" not in str(error.value)
        assert files(tmp_path) == before
        with pytest.raises(ValueError):
            save_pretrained(model, tiny_tokenizer, tmp_path / "new" / "last", adapter_only=adapter_only)
        assert not (tmp_path / "new").exists()


def test_an_adapter_that_is_not_exported_may_be_anything(tiny_model_dir, tiny_tokenizer, tmp_path):
    model = load_causal_lm(tiny_model_dir, lora=LoRA(r=4))
    model.add_adapter("critic", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".critic." in name:
                parameter.fill_(torch.nan)
    for adapter_only in (False, True):
        save_pretrained(model, tiny_tokenizer, tmp_path / "hf", adapter_only=adapter_only)


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
def test_a_run_that_diverged_leaves_the_export_before_it(lora, tiny_model_dir, tmp_path):
    def fit(lr, steps):
        module = SFTModule(tiny_model_dir, lora=lora, optimizer=sgd(lr))
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        run = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[HFExport(when="end"), Poison(lr)],
                        default_root_dir=tmp_path, **quiet)  # fmt: skip
        run.fit(module, data(tmp_path))

    fit(0.01, 1)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"last was not written, because .* has NaN: the run has diverged"):
        fit(0.02, 1)
    assert files(tmp_path) == before
    assert all(value.isfinite().all() for value in load_file(tmp_path / "hf" / "last" / "model.safetensors").values())


class Poison(L.Callback):
    """What a step too far leaves, from the second run on."""

    def __init__(self, lr):
        self.on = lr > 0.01

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.on:
            with torch.no_grad():
                [p for p in pl_module.model_to_export.parameters() if p.requires_grad][3].fill_(torch.nan)


RANKS = """
import sys, torch, lightning.pytorch as L
from lightning_rlhf import HFExport, InstructionDataModule, SFTModule
torch.set_num_threads(1)

class Poison(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        with torch.no_grad():
            next(pl_module.policy.parameters()).fill_(torch.nan)

rows = [{"prompt": f"Say {i}", "completion": "dog"} for i in range(8)]
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, default_root_dir=sys.argv[2],
                    logger=False, enable_checkpointing=False, enable_progress_bar=False,
                    callbacks=[Poison(), HFExport(when="end")])
try:
    trainer.fit(SFTModule(sys.argv[1]), InstructionDataModule(rows, val_fraction=0.0, cache_dir=sys.argv[2] + "/cache"))
except (ValueError, RuntimeError) as error:
    open(f"{sys.argv[2]}/error{trainer.global_rank}", "w").write(f"{type(error).__name__}: {error}")
"""


@pytest.mark.distributed
def test_all_ranks_hear_that_an_export_failed(tiny_model_dir, tmp_path):
    """The one that writes fails, and none waits for it for ever."""
    (tmp_path / "run.py").write_text(RANKS)
    command = [python(), str(tmp_path / "run.py"), str(tiny_model_dir), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"error{rank}").read_text() for rank in (0, 1))
    assert first.startswith("ValueError") and "embed_tokens.weight has NaN" in first
    assert second.startswith("RuntimeError: HFExport: ValueError") and "embed_tokens.weight has NaN" in second
