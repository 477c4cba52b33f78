"""A small KTO run as a process of its own, for tests of several processes and of resume.

    python run_kto.py MODEL_DIR OUT_DIR '{"devices": 2, "accumulate": 1, ...}'

Writes to OUT_DIR gradients.pt (the first step's, as the optimizer got them), weights.pt (trained) and metrics.json.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_rlhf import KTOModule, LoRA, UnpairedDataModule

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped
from runs import load_script, train

torch.set_num_threads(1)
run_dpo = load_script(Path(__file__).with_name("run_dpo.py"))
First, reordered = run_dpo.First, run_dpo.reordered
merge, rounded_weights, real_pairs = run_dpo.merge, run_dpo.rounded_weights, run_dpo.real_pairs


def rows(n=24, each=1):
    """Answers of mixed length, ``each`` to a prompt, two of three good."""
    return [
        {
            "prompt": f"Say {i // each} " + "fox " * (i // each % 5),
            "completion": f"{i} " + ("dog 你好 " if i % 2 else "Paris ") * (1 + i % 4),
            "label": i % 3 != 1,
            "source": "books" if i // each % 2 else "hh",
        }
        for i in range(n)
    ]


def run(model_dir, out_dir, devices=1, accumulate=1, workers=0, lora=False, layout="auto", max_epochs=2, ckpt=None,
        max_steps=-1, save_every=0, batch_size=8, seed=0, order=0, lr=1e-2, val_fraction=0.3, each=1, n=24, fill=False,
        checkpointing=False, quantization=None, max_answers=8, precision="32-true", callbacks=(), data=None,
        **settings):  # fmt: skip
    """One run; returns the trainer, the module, and what the first step was."""
    L.seed_everything(seed, verbose=False)
    module = KTOModule(
        model_dir,
        **grouped(
            lora=LoRA(r=4) if lora else None,
            layout=layout,
            gradient_checkpointing=checkpointing,
            quantization=quantization,
            optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
        ),
        **settings,
    )
    data = data or UnpairedDataModule(
        reordered(rows(n, each), order),
        val_fraction=val_fraction,
        batch_size=batch_size,
        eval_batch_size=8,
        max_answers=max_answers,
        num_workers=workers,
        cache_dir=Path(out_dir) / "cache",
    )
    first = First(fill)
    trainer = train(
        module,
        data,
        out_dir,
        lambda module: module.policy.named_parameters(),
        [*callbacks, first],
        devices,
        save_every,
        ckpt,
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
        max_steps=max_steps,
        precision=precision,
    )
    if trainer.is_global_zero and hasattr(first, "gradients"):
        torch.save(first.gradients, Path(out_dir) / "gradients.pt")
    return trainer, module, first


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
