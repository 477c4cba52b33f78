"""Small runs of a stage, in this process and in processes of their own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
from forked import python
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

ROOT = Path(__file__).parents[2]


def load_script(path):
    """The module of a script, by its file's name."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(module, data, out_dir, weights, callbacks=(), devices=1, save_every=0, ckpt=None, **options):
    """Fits, and writes to OUT_DIR the log, checkpoints, weights.pt (of ``weights(module)``) and metrics.json.

    Returns the trainer.
    """
    callbacks = list(callbacks)
    if save_every:
        callbacks.append(
            ModelCheckpoint(out_dir, filename="step{step}", auto_insert_metric_name=False, save_top_k=-1,
                            every_n_train_steps=save_every)
        )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=callbacks,
        enable_checkpointing=bool(save_every),
        logger=CSVLogger(out_dir, name="log"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out_dir,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt)
    if trainer.is_global_zero:
        torch.save({k: v.detach().clone() for k, v in weights(module)}, Path(out_dir) / "weights.pt")
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
        (Path(out_dir) / "metrics.json").write_text(json.dumps(metrics))
    return trainer


def quiet(tmp_path, **options):
    """A Trainer that writes and shows nothing."""
    settings = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
                    enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    return L.Trainer(**{**settings, **options})


def difference(a, b):
    """The relative distance of two sets of tensors by name."""
    assert a.keys() == b.keys()
    flat = [torch.cat([x[k].flatten().double() for k in b]) for x in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def spawn(script, model_dir, out, **options):
    """The run of a script in processes of its own; returns its weights."""
    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    command = [python(), str(script), str(model_dir), str(out), json.dumps(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "weights.pt")


def spawn_killed(name, model_dir, out, kills, **options):
    """A run of tests/stages/NAME.py with so many kill -9, each of which it is resumed from; returns its weights."""
    out.mkdir(parents=True)
    script = ROOT / "tests" / "stages" / "run_killed.py"
    # not forked: its hashes of strings, and so the order of sets, are others than the whole run's
    command = [sys.executable, str(script), name, str(model_dir), str(out), str(kills), json.dumps(options)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == str(kills)
    return torch.load(out / "weights.pt")


def assert_same_steps(a, b):
    """Two folders of runs have the same weights after each step that both saved, bit for bit."""
    steps = {path.name for path in a.glob("step*.ckpt")} & {path.name for path in b.glob("step*.ckpt")}
    assert steps
    for step in sorted(steps, key=lambda name: (len(name), name)):
        x, y = (torch.load(folder / step, weights_only=False)["state_dict"] for folder in (a, b))
        unlike = {name: (x[name] - y[name]).abs().max() for name in y if not torch.equal(x[name], y[name])}
        assert not unlike, (step, unlike)


def assert_equal(a, b):
    """Two runs have the same weights, bit for bit."""
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k
