"""Interrupts of whole processes.

    python run_interrupts.py MODEL_DIR OUT_DIR NAME ...

Names of one process, such as tqdm, run as forks of this one, since what takes long to import is then imported once.
What one says goes to OUT_DIR/NAME.txt, and the statuses to standard output, as JSON. ``spawn`` and ``blocked_ranks``
are runs of two ranks, and the whole of this process.
"""

import json
import os
import pty
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

import lightning_rlhf.stages  # noqa: F401  # before the forks
from lightning_rlhf import InstructionDataModule, PreferenceDataModule, RewardModule, SaveOnInterrupt, SFTModule
from lightning_rlhf.cli import main as cli
from lightning_rlhf.demo import main as demo

sys.path.insert(0, str(Path(__file__).parent))
from run_interrupted import Send

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} fox"} for i in range(48)]
PAIRS = [{"prompt": f"Say {i}", "chosen": f"{i} fox", "rejected": "dog"} for i in range(48)]


class Block(L.Callback):
    """A step that never ends, on the last rank; the signal goes to the first one."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            Path(trainer.default_root_dir, "blocked").write_text(str(os.getpid()))
            os.kill(os.getppid() if trainer.world_size > 1 else os.getpid(), signal.SIGTERM)
            time.sleep(1000)


def fit(model, out, *callbacks, bar=False, **options):
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=bar, default_root_dir=out, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(SFTModule(model), InstructionDataModule(ROWS, batch_size=4, cache_dir=out / "cache"))


def none(model, out):
    fit(model, out, Send("SIGINT", 2))


def tqdm(model, out):
    fit(model, out, Send("SIGTERM", 2), TQDMProgressBar(), bar=True)


def rich(model, out):
    fit(model, out, Send("SIGINT", 2), RichProgressBar(), bar=True)


def stages(model, out):
    fit(model, out, Send("SIGINT", 2))
    print("the next stage starts")
    data = PreferenceDataModule(PAIRS, batch_size=8)
    L.Trainer(accelerator="cpu", max_steps=1, logger=False).fit(RewardModule(model), data)


def blocked(model, out):
    fit(model, out, Block(), SaveOnInterrupt(time_limit=0.2))


def shell(model, out):
    rows = out / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cli(
        [
            "fit", "--model", "SFTModule", "--model.pretrained", str(model), "--data", "InstructionDataModule",
            "--data.train", str(rows), "--data.batch_size", "4", "--trainer.max_epochs", "2", "--trainer.logger",
            "false", "--trainer.default_root_dir", str(out), "--trainer.callbacks+", "run_interrupted.Send",
            "--trainer.callbacks.name", "SIGINT", *sys.argv[4:],
        ]
    )  # fmt: skip


def demonstration(model, out):
    step = RewardModule.training_step

    def interrupted(self, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    RewardModule.training_step = interrupted
    for name, rows in {"rows": ROWS, "pairs": PAIRS}.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--train", str(out / "rows.jsonl"), "--pairs", str(out / "pairs.jsonl")]
    sizes = ["--steps", "1", "--reward-steps", "2", "--iterations", "1", "--new-tokens", "4"]
    demo(["--model", str(model), "--output", str(out / "demo"), *sizes, *data, "--prompts", str(out / "rows.jsonl")])


def spawn(model, out):
    fit(model, out, Send("SIGTERM", 2), SaveOnInterrupt(), devices=2, strategy="ddp_spawn")


def blocked_ranks(model, out):
    fit(model, out, Block(), SaveOnInterrupt(time_limit=0.2), devices=2, strategy="ddp")


def apart(name, model, out):
    """A fork that speaks to a file, or to a terminal whose screen goes there; its status."""
    folder = out / name
    folder.mkdir()
    terminal = name == "rich"
    child, screen = pty.fork() if terminal else (os.fork(), -1)
    if not child:
        if not terminal:
            file = os.open(out / f"{name}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout.reconfigure(line_buffering=False)  # as a file is
        status = 0
        try:
            globals()[name](model, folder)
        except SystemExit as end:
            status = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        os._exit(status)
    with (out / f"{name}.txt").open("ab") as file:
        while terminal:
            try:
                file.write(os.read(screen, 4096))
            except OSError:
                break
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    model, out, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(",")
    if names[0] in ("spawn", "blocked_ranks"):
        globals()[names[0]](model, out)
    else:
        print(json.dumps({name: apart(name, model, out) for name in names}))
