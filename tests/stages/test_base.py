"""What all stages share: what they refuse, what their checkpoints hold."""

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from lightning_rlhf import InstructionDataModule, SFTModule
from lightning_rlhf.stages.base import rng_state, set_rng_state

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 3)} for i in range(8)]


def fit(model_dir, tmp_path, val=None, **options):
    settings = dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path)  # fmt: skip
    trainer = L.Trainer(**{**settings, **options})
    module = SFTModule(model_dir)
    trainer.fit(module, InstructionDataModule(ROWS, val=val, batch_size=4, val_fraction=0.0, cache_dir=tmp_path))
    return trainer, module


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random(), random.gauss(0, 1)]


def test_rng_states_come_back_through_a_safe_load(tmp_path):
    random.gauss(0, 1)  # leaves one value waiting, which belongs to the state
    torch.save(rng_state(), tmp_path / "state")
    want = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == want


def test_accumulation_that_changes_by_epoch_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        fit(tiny_model_dir, tmp_path, callbacks=[GradientAccumulationScheduler({0: 2})])


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
