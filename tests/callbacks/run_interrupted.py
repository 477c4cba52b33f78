"""A small SFT run that gets a signal in its second step, on the last rank.

    python run_interrupted.py MODEL_DIR OUT_DIR '{"signal": "SIGTERM", "devices": 2, ...}'

The other options are those of ``run_sft.py``; without ``signal`` it runs to its end.
"""

import json
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as L

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
import run_sft


class Send(L.Callback):
    """Sends a signal to this process in the middle of an accumulation window."""

    def __init__(self, name, step=1):
        self.number, self.step = signal.Signals[name], step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        here = trainer.global_rank == trainer.world_size - 1
        if here and trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == 0:
            assert callable(signal.getsignal(self.number)), "the signal would end the process"
            os.kill(os.getpid(), self.number)


def run(model_dir, out, signal=None, callbacks=(), **options):
    return run_sft.run(model_dir, out, callbacks=[*callbacks, *([Send(signal)] if signal else [])], **options)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
