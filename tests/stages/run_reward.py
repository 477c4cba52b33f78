"""A small reward run as a process of its own, for tests of several processes and of resume.

    python run_reward.py MODEL_DIR OUT_DIR '{"devices": 2, "accumulate": 1, ...}'

Writes to OUT_DIR gradients.pt (the first step's, as the optimizer got them), weights.pt (trained) and metrics.json
(with the score's offset).
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_rlhf import LoRA, PreferenceDataModule, RewardModule

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped
from runs import train

torch.set_num_threads(1)


def rows(n=24, order=0, words="dog 你好 "):
    """Pairs, some with margins, and rankings of three, of mixed length; any other order than 0 shuffles them."""
    out = []
    for i in range(n):
        row = {
            "prompt": f"Say {i} " + "fox " * (i % 5),
            "source": "books" if i % 2 else "hh",
            "lang": "zh" if i % 3 == 1 else "en",
        }
        answers = [f"{i} " + words * (1 + i % 7), f"Paris {i}", "fine " * (1 + i % 4)]
        if i % 3 == 0:
            row |= {"ranked": answers, "scores": [3.5, 2.5, 2.25]}
        else:
            row |= {"chosen": answers[i % 2], "rejected": answers[1 - i % 2]}
            row |= {"margin": 0.1 * i} if i % 3 == 1 else {}
        out.append(row)
    return out if not order else [out[i] for i in torch.randperm(n, generator=torch.Generator().manual_seed(order))]


class FirstGradients(L.Callback):
    """Keeps what the optimizer is handed at the first step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not trainer.global_step:
            named = pl_module.reward_model.named_parameters()
            self.gradients = {k: p.grad.clone() for k, p in named if p.grad is not None}


def run(model_dir, out_dir, devices=1, accumulate=1, workers=0, lora=False, layout="auto", max_epochs=2, ckpt=None,
        max_steps=-1, save_every=0, batch_size=12, seed=0, dropout=0.0, order=0, lr=1e-2, val_fraction=0.3,
        centering_coef=0.0, pair_weight="pair", use_margin=False, val_check_interval=1.0, check_val_every_n_epoch=1,
        limit_val_batches=1.0, callbacks=(), quantization=None):  # fmt: skip
    """One run; returns the trainer and the module."""
    L.seed_everything(seed, verbose=False)
    module = RewardModule(
        model_dir,
        **grouped(
            lora=LoRA(r=4, dropout=dropout) if lora else None,
            quantization=quantization,
            layout=layout,
            centering_coef=centering_coef,
            optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        ),
    )
    data = PreferenceDataModule(
        rows(order=order),
        val_fraction=val_fraction,
        batch_size=batch_size,
        eval_batch_size=8,
        num_workers=workers,
        pair_weight=pair_weight,
        use_margin=use_margin,
        cache_dir=Path(out_dir) / "cache",
    )
    first = FirstGradients()
    trainer = train(
        module,
        data,
        out_dir,
        lambda module: module.reward_model.named_parameters(),
        [*callbacks, first],
        devices,
        save_every,
        ckpt,
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
        max_steps=max_steps,
        val_check_interval=val_check_interval,
        check_val_every_n_epoch=check_val_every_n_epoch,
        limit_val_batches=limit_val_batches,
    )
    if trainer.is_global_zero:
        if hasattr(first, "gradients"):
            torch.save(first.gradients, Path(out_dir) / "gradients.pt")
        file = Path(out_dir) / "metrics.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "score_offset": module.reward_model.score_offset}))
    return trainer, module


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
