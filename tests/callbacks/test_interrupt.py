"""An interrupt loses nothing, ends the work, and a broken-off epoch is taken for nothing else."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from runs import load_script

from lightning_rlhf import HFExport, Interrupted, SFTModule
from lightning_rlhf.callbacks import SaveOnInterrupt

SCRIPT = Path(__file__).with_name("run_interrupted.py")
script = load_script(SCRIPT)
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
def test_an_interrupt_saves_and_resumes_bit_for_bit(name, tiny_model_dir, tmp_path, handlers, capfd):
    options = dict(lora=True, dropout=0.2, accumulate=2)
    with pytest.raises(Interrupted) as caught:
        script.run(tiny_model_dir, tmp_path / "a", signal=name, **options)
    path = tmp_path / "a" / "interrupted.ckpt"  # not in the logger's folder
    assert saved(path)["global_step"] == 2
    error = capfd.readouterr().err
    assert "saving at the end of this step" in error and error.endswith(f"trainer.fit(..., ckpt_path='{path}')\n")
    assert error.endswith(f"{caught.value}\n")
    assert (caught.value.signal, caught.value.code) == (signal.Signals[name], 128 + signal.Signals[name])
    assert caught.value.checkpoint == str(path)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    _, resumed = script.run(tiny_model_dir, tmp_path / "b", ckpt=str(path), seed=5, **options)
    _, whole = script.run(tiny_model_dir, tmp_path / "c", **options)
    for (n, a), (_, b) in zip(resumed.policy.named_parameters(), whole.policy.named_parameters(), strict=True):
        assert torch.equal(a, b), n


@pytest.mark.distributed
def test_a_signal_to_one_of_two_ranks_stops_both_after_the_step(start, tiny_model_dir, tmp_path):
    """That a run of two resumes bit for bit, the stage's tests check."""
    done = start(
        SCRIPT, tiny_model_dir, tmp_path, dict(signal="SIGTERM", accumulate=2, devices=2, max_epochs=100), status=143
    )
    checkpoint = saved(tmp_path / "interrupted.ckpt")
    assert checkpoint["global_step"] == 2 and len(checkpoint["rng_states"]) == 2
    assert "Traceback" not in done.stderr and done.stderr.count("SIGTERM: stopped after step 2") == 1


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
    module = Module(tiny_model_dir)
    with pytest.raises(Interrupted):
        short_fit(callbacks, module, max_epochs=3, min_epochs=3, enable_checkpointing=True)
    assert notes.hooks == ["epoch start", "epoch end", "epoch start"] and module.epochs == 1
    assert early.wait_count == 0 and len(list((tmp_path / "epochs").iterdir())) == 1
    checkpoint = saved(tmp_path / ("mine" if given else "") / "interrupted.ckpt")
    assert checkpoint["global_step"] == checkpoint["callbacks"]["Notes"]["steps"] == notes.steps == 6


def test_a_signal_while_validating_acts_at_its_end(short_fit, tmp_path):
    class Validation(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking and trainer.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        short_fit([Validation()], val_check_interval=2)
    assert saved(tmp_path / "interrupted.ckpt")["global_step"] == 2


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGTERM")])
def test_a_second_signal_stops_at_once_and_names_the_last_checkpoint(first, second, short_fit, tmp_path, capfd):
    class Impatient(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                signal.raise_signal(signal.Signals[first])
                signal.raise_signal(signal.Signals[second])

    checkpoints = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1)
    with pytest.raises(Interrupted) as caught:
        short_fit([Impatient(), checkpoints], enable_checkpointing=True)
    assert not (tmp_path / "interrupted.ckpt").exists()
    assert caught.value.code == 128 + signal.Signals[second]
    assert caught.value.checkpoint == checkpoints.best_model_path
    text = f"{second}: stopped at once; step 3 is lost. The last checkpoint is {tmp_path / 'c'}"
    assert any(line.startswith(text) for line in capfd.readouterr().err.splitlines())  # the other thread speaks too


def test_a_signal_in_the_last_step_ends_the_work_after_a_whole_run(short_fit, tmp_path, capfd):
    with pytest.raises(Interrupted) as caught:
        short_fit([Send("SIGINT", 3), HFExport(str(tmp_path / "hf"), when="end")])
    assert caught.value.checkpoint is None and (tmp_path / "hf" / "last").is_dir()
    assert capfd.readouterr().err.endswith("SIGINT in the last step: the run is complete.\n")


def test_nothing_is_exported_that_looks_finished(short_fit, tmp_path):
    with pytest.raises(Interrupted):
        short_fit([Send("SIGINT", 1), HFExport(str(tmp_path / "hf"), when="end")])
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("function", ["validate", "predict"])
def test_evaluation_stops_at_once(function, name, short_fit, tmp_path, handlers, capfd):
    class Stop(L.Callback):
        def on_validation_batch_start(self, *_):
            signal.raise_signal(signal.Signals[name])

        on_predict_batch_start = on_validation_batch_start

    trainer, module = short_fit(limit_train_batches=0)
    trainer.callbacks.insert(0, Stop())
    with pytest.raises(Interrupted) as caught:
        getattr(trainer, function)(module, trainer.datamodule)
    assert caught.value.code == 128 + signal.Signals[name]
    assert capfd.readouterr().err.endswith(f"{name}: stopped.\n")
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_ctrl_c_while_all_is_set_up_ends_with_its_status_too(short_fit, tiny_model_dir, handlers):
    class Slow(SFTModule):
        def configure_model(self):
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(Interrupted) as caught:
        short_fit(module=Slow(tiny_model_dir))
    assert caught.value.code == 130
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_loader_worker_does_not_speak_for_its_process(short_fit, tiny_model_dir, tmp_path):
    """It inherits handlers and the socket by its fork; Ctrl-C goes to it too."""

    class Elsewhere(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                child = os.fork()
                if not child:
                    signal.raise_signal(signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGTERM)
                    os._exit(0)
                self.status = os.waitpid(child, 0)[1]

    elsewhere, save = Elsewhere(), SaveOnInterrupt(time_limit=0.0)
    trainer, _ = short_fit([elsewhere, save])
    assert elsewhere.status == signal.SIGTERM and trainer.global_step == 4 and save.interrupted is None


def test_one_trainer_is_interrupted_and_fits_on_without_words(short_fit, tiny_model_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    module = SFTModule(tiny_model_dir)
    first, last = Send("SIGTERM"), ModelCheckpoint(tmp_path / "last")
    with pytest.raises(Interrupted) as caught:
        short_fit([first, last], module, enable_checkpointing=True, max_epochs=2)
    trainer = module.trainer
    (callback,) = [c for c in trainer.callbacks if isinstance(c, SaveOnInterrupt)]
    assert callback.interrupted == caught.value.checkpoint == str(tmp_path / "interrupted.ckpt")
    trainer.fit(module, trainer.datamodule, ckpt_path=callback.interrupted)
    assert trainer.global_step == 8 and callback.interrupted is None
    assert trainer.callbacks == [first, last, callback]
    assert "override" not in caplog.text


# ---------------------------------------------------------------------------------------------------- whole processes

PROCESSES = SCRIPT.with_name("run_interrupts.py")
STATUS = {"none": 130, "tqdm": 143, "rich": 130, "stages": 130, "blocked": 143, "shell": 130, "demonstration": 130}


def process(*arguments):
    # not forked: ranks send signals to the process that started them
    command = [sys.executable, str(PROCESSES), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent)]), "COLUMNS": "100"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def processes(tiny_model_dir, tmp_path_factory):
    """What each said, and its status."""
    out = tmp_path_factory.mktemp("processes")
    done = process(tiny_model_dir, out, ",".join(STATUS))
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    return out, {name: (statuses[name], (out / f"{name}.txt").read_text()) for name in STATUS}


@pytest.mark.parametrize("name", STATUS)
def test_the_process_ends_with_the_status_of_its_signal_and_no_traceback(name, processes):
    status, said = processes[1][name]
    assert status == STATUS[name], said[-3000:]
    assert "Traceback" not in said and "Error" not in said


@pytest.mark.parametrize("name", ["none", "tqdm", "rich", "stages"])
def test_the_line_that_says_how_to_go_on_stands_whole_under_the_bar(name, processes):
    out, found = processes
    said = found[name][1].replace("\r\n", "\n").replace("\033[?25h", "")  # the cursor is back
    path = out / name / "interrupted.ckpt"
    resume = f"To go on, repeat trainer.fit(..., ckpt_path='{path}')"
    text = f"stopped after step 3. The run is saved in {path}. {resume}\n"
    assert re.search(rf"\nSIG(INT|TERM): {re.escape(text)}$", said), said[-2000:]
    if name in ("tqdm", "rich"):
        assert "/" in said  # there is a bar


def test_no_further_stage_of_a_script_starts(processes):
    assert "the next stage starts" not in processes[1]["stages"][1]


def test_a_step_that_never_ends_is_left_after_the_time_limit(processes):
    said = processes[1]["blocked"][1]
    assert said.endswith("SIGTERM: the step did not end within 0.2 s. There is no checkpoint.\n")


def test_a_shell_is_told_an_option_that_it_has(processes):
    out, found = processes
    line = found["shell"][1].splitlines()[-1]
    assert line.startswith("SIGINT: stopped after step 2. The run is saved in ")
    option = line.partition("repeat your command with ")[2].split()
    assert option == ["--ckpt_path", str(out / "shell" / "interrupted.ckpt")]


def test_the_demo_starts_no_further_stage_and_says_what_to_run(processes):
    out, found = processes
    said = found["demonstration"][1]
    assert "3. PPO" not in said and not (out / "demonstration" / "demo" / "ppo").exists()
    assert not (out / "demonstration" / "demo" / "reward" / "hf").exists()
    assert "ckpt_path" not in said
    assert said.endswith("To begin this stage again: lightning-rlhf demo reward ppo, with the same options\n")


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_spawned_ranks_end_the_script_with_the_status_too(tiny_model_dir, tmp_path):
    done = process(tiny_model_dir, tmp_path, "spawn")
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert saved(tmp_path / "interrupted.ckpt")["global_step"] == 3
    assert "SIGTERM: stopped after step 3. The run is saved" in done.stderr


@pytest.mark.distributed
def test_a_rank_that_waits_for_a_blocked_one_obeys_after_the_time_limit(tiny_model_dir, tmp_path):
    """It waits outside of Python, where no handler is called."""
    done = process(tiny_model_dir, tmp_path, "blocked_ranks")
    assert done.returncode == 143 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "SIGTERM: the step did not end within 0.2 s. There is no checkpoint." in done.stderr
    other = Path("/proc", (tmp_path / "blocked").read_text(), "stat")
    for _ in range(600):  # it was sent SIGKILL, and ends when it is next given a moment
        try:
            if other.read_text().split()[2] == "Z":  # nobody may be there to bury it
                return
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the other rank still runs")
