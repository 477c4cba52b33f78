"""An interrupt loses nothing, and a broken-off epoch is taken for nothing else."""

import importlib.util
import signal
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_rlhf import SFTModule
from lightning_rlhf.callbacks import SaveOnInterrupt

SCRIPT = Path(__file__).with_name("run_interrupted.py")
spec = importlib.util.spec_from_file_location("run_interrupted", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
Send = script.Send


@pytest.fixture(autouse=True)
def handlers():
    """Lightning leaves Ctrl-C ignored after a KeyboardInterrupt."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_an_interrupt_saves_and_resumes_bit_for_bit(name, tiny_model_dir, tmp_path, handlers, capfd, caplog):
    options = dict(lora=True, dropout=0.2, accumulate=2)
    caplog.set_level("INFO")
    script.run(tiny_model_dir, tmp_path / "a", signal=name, **options)
    path = tmp_path / "a" / "interrupted.ckpt"  # not in the logger's folder
    assert saved(path)["global_step"] == 2
    assert "saving at the end of this step" in capfd.readouterr().err and f"--ckpt_path {path}" in caplog.text
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    _, resumed = script.run(tiny_model_dir, tmp_path / "b", ckpt=str(path), seed=5, **options)
    _, whole = script.run(tiny_model_dir, tmp_path / "c", **options)
    for (n, a), (_, b) in zip(resumed.policy.named_parameters(), whole.policy.named_parameters(), strict=True):
        assert torch.equal(a, b), n


@pytest.mark.distributed
def test_a_signal_to_one_of_two_ranks_stops_both_after_the_step(start, tiny_model_dir, tmp_path):
    """That a run of two resumes bit for bit, the stage's tests check."""
    start(SCRIPT, tiny_model_dir, tmp_path, dict(signal="SIGTERM", accumulate=2, devices=2, max_epochs=100))
    checkpoint = saved(tmp_path / "interrupted.ckpt")
    assert checkpoint["global_step"] == 2 and len(checkpoint["rng_states"]) == 2
    weights = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(weights[k], checkpoint["state_dict"][f"policy.{k}"]) for k in weights)


class Notes(L.Callback):
    """Notes hooks; counts steps in its state."""

    def __init__(self):
        self.hooks, self.steps = [], 0

    def state_dict(self):
        return {"steps": self.steps}

    def on_train_batch_end(self, trainer, *_):
        self.steps += 1

    def on_train_epoch_start(self, *_):
        self.hooks.append("epoch start")

    def on_train_epoch_end(self, *_):
        self.hooks.append("epoch end")

    def on_train_end(self, *_):
        self.hooks.append("end")


class Module(SFTModule):
    epochs = 0

    def on_train_epoch_end(self):
        self.epochs += 1


@pytest.mark.parametrize("given", [False, True])
def test_nobody_takes_a_broken_off_epoch_for_a_whole_one(given, short_fit, tiny_model_dir, tmp_path):
    """Wherever the callback stands; and its checkpoint holds what the others noted of the step."""
    early, notes = EarlyStopping("train/loss", patience=0, check_on_train_epoch_end=True), Notes()
    epochs = ModelCheckpoint(tmp_path / "epochs", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [
        *([SaveOnInterrupt(str(tmp_path / "mine"))] if given else []),
        early,
        notes,
        Send("SIGTERM", 5),
        epochs,
    ]
    trainer, module = short_fit(
        callbacks, Module(tiny_model_dir), max_epochs=3, min_epochs=3, enable_checkpointing=True
    )
    assert notes.hooks == ["epoch start", "epoch end", "epoch start", "end"] and module.epochs == 1
    assert early.wait_count == 0 and len(list((tmp_path / "epochs").iterdir())) == 1
    checkpoint = saved(tmp_path / ("mine" if given else "") / "interrupted.ckpt")
    assert checkpoint["global_step"] == checkpoint["callbacks"]["Notes"]["steps"] == notes.steps == 6
    assert trainer.global_step == 6


def test_a_signal_while_validating_acts_at_its_end(short_fit, tmp_path):
    class Validation(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking and trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    trainer, _ = short_fit([Validation()], val_check_interval=2)
    assert saved(tmp_path / "interrupted.ckpt")["global_step"] == trainer.global_step == 2


def test_a_second_ctrl_c_stops_at_once(short_fit, tmp_path):
    class Impatient(L.Callback):
        def on_train_batch_start(self, *_):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit):
        short_fit([Impatient()])
    assert not (tmp_path / "interrupted.ckpt").exists()


def test_one_trainer_is_interrupted_and_fits_on_without_words(short_fit, tiny_model_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    module = SFTModule(tiny_model_dir)
    first, last = Send("SIGTERM"), ModelCheckpoint(tmp_path / "last")
    trainer, _ = short_fit([first, last], module, enable_checkpointing=True, max_epochs=2)
    (callback,) = [c for c in trainer.callbacks if isinstance(c, SaveOnInterrupt)]
    assert callback.interrupted == str(tmp_path / "interrupted.ckpt")
    trainer.fit(module, trainer.datamodule, ckpt_path=callback.interrupted)
    assert trainer.global_step == 8 and callback.interrupted is None
    assert trainer.callbacks == [first, last, callback]
    assert "override" not in caplog.text
