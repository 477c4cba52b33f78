"""Small runs, in this process and in others."""

import json
import os
import subprocess
from pathlib import Path

import lightning.pytorch as L
import pytest
from forked import python
from runs import load_script

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN_SFT = HERE.parent / "stages" / "run_sft.py"


@pytest.fixture
def fit(tiny_model_dir):
    """``fit(out, callbacks, **options)``: a run of the SFT stage; returns the trainer and the module."""
    run_sft = load_script(RUN_SFT)

    def run(out, callbacks=(), **options):
        return run_sft.run(tiny_model_dir, out, callbacks=list(callbacks), **options)

    return run


@pytest.fixture
def short_fit(tiny_model_dir, tmp_path):
    """``short_fit(callbacks, **trainer_options)``: four steps of one epoch, without logger and checkpoints."""
    from lightning_rlhf import InstructionDataModule, SFTModule

    def run(callbacks=(), module=None, rows=16, val=(), max_length=None, **options):
        settings = dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path)  # fmt: skip
        trainer = L.Trainer(callbacks=list(callbacks), **{**settings, **options})
        data = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 3)} for i in range(rows)]
        module = module or SFTModule(tiny_model_dir)
        held_out, files = [*val, *data[:4]], dict(cache_dir=tmp_path / "cache")
        trainer.fit(module, InstructionDataModule(data, val=held_out, batch_size=4, max_length=max_length, **files))
        return trainer, module

    return run


@pytest.fixture(scope="session")
def start():
    """``start(script, model_dir, out, options, status=0)``: the script in processes of its own, to its end."""

    def run(script, model_dir, out, options, status=0):
        out.mkdir(parents=True, exist_ok=True)
        command = [python(), str(script), str(model_dir), str(out), json.dumps(options)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == status, done.stderr[-3000:]
        return done

    return run
