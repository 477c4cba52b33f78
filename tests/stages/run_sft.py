"""A small SFT run as a process of its own, for tests of several processes, resume and interrupts.

    python run_sft.py MODEL_DIR OUT_DIR '{"devices": 2, "accumulate": 1, ...}'

Writes to OUT_DIR gradients.pt (the first step's, as the optimizer got them), weights.pt (trained), metrics.json
and, with ema, average.pt.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_rlhf import InstructionDataModule, LoRA, SFTModule
from lightning_rlhf.callbacks import EMA

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped
from runs import train

torch.set_num_threads(1)


def rows(n=24, order=0):
    """Conversations of mixed length, some of two turns; any other order than 0 shuffles them."""
    out = []
    for i in range(n):
        messages = [
            {"role": "user", "content": f"Say {i} " + "fox " * (i % 5)},
            {"role": "assistant", "content": f"{i} " + "dog 你好 " * (1 + i % 7)},
        ]
        if i % 3 == 0:
            messages += [{"role": "user", "content": "again"}, {"role": "assistant", "content": f"Paris {i}"}]
        out.append({"messages": messages})
    return out if not order else [out[i] for i in torch.randperm(n, generator=torch.Generator().manual_seed(order))]


class FirstGradients(L.Callback):
    """Keeps what the optimizer is handed at the first step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not trainer.global_step:
            self.gradients = {k: p.grad.clone() for k, p in pl_module.policy.named_parameters() if p.grad is not None}


class Spoiled(L.Callback):
    """One rank's loss is no number in chosen steps."""

    def __init__(self, rank, steps):
        self.rank, self.steps = rank, steps

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank == self.rank and trainer.global_step in self.steps:
            loss.register_hook(lambda gradient: gradient * float("nan"))


def run(model_dir, out_dir, devices=1, accumulate=1, workers=0, lora=False, layout="auto", max_epochs=2, ckpt=None,
        max_steps=-1, save_every=0, batch_size=6, seed=0, dropout=0.0, order=0, lr=1e-2, val_fraction=0.2,
        callbacks=(), quantization=None, ema=None, spoiled=None, **options):  # fmt: skip
    """One run; returns the trainer and the module."""
    L.seed_everything(seed, verbose=False)
    module = SFTModule(
        model_dir,
        **grouped(
            lora=LoRA(r=4, dropout=dropout) if lora else None,
            quantization=quantization,
            layout=layout,
            optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
            **options,
        ),
    )
    data = InstructionDataModule(
        rows(order=order),
        val_fraction=val_fraction,
        batch_size=batch_size,
        num_workers=workers,
        cache_dir=Path(out_dir) / "cache",
    )
    first = FirstGradients()
    callbacks = [*callbacks, first, *([Spoiled(*spoiled)] if spoiled else [])]
    if ema is not None:
        callbacks.append(EMA(ema))
    trainer = train(
        module,
        data,
        out_dir,
        lambda module: module.policy.named_parameters(),
        callbacks,
        devices,
        save_every,
        ckpt,
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
        max_steps=max_steps,
    )
    if trainer.is_global_zero:
        if ema is not None:
            torch.save(callbacks[-1].state_dict()["average"], Path(out_dir) / "average.pt")
        if hasattr(first, "gradients"):
            torch.save(first.gradients, Path(out_dir) / "gradients.pt")
    return trainer, module


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
