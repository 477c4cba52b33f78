"""A small PPO run as a process of its own, for tests of several processes, resume and interrupts.

    python run_ppo.py MODEL_DIR OUT_DIR '{"devices": 2, "lora": true, ...}'

Writes to OUT_DIR weights.pt (all that was trained) and metrics.json (the last iteration's).
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_rlhf import LoRA, PPOModule, PromptDataModule, Ptx, Sampling

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped
from runs import train

torch.set_num_threads(1)
TEXTS = [{"prompt": f"Say {i}", "completion": f"dog {i} " * (1 + i % 3)} for i in range(10)]


def prompts(n=20):
    """Prompts of mixed length, each with a column for the reward."""
    return [{"prompt": f"Say {i} " + "fox " * (i % 5), "wanted": "aeiou"[i % 5]} for i in range(n)]


def letters(prompts, completions, wanted):
    """How often a completion has the letter that its row wants, and any other."""
    return [c.count(w) + 0.1 * len(set(c)) for c, w in zip(completions, wanted, strict=True)]


def patchy(prompts, completions, wanted):
    """As :func:`letters`, but for the rows that want an a: their scores are no numbers."""
    scores = letters(prompts, completions, wanted)
    return [float("nan") if w == "a" else score for score, w in zip(scores, wanted, strict=True)]


def trained(module):
    return {k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad}


def run(model_dir, out_dir, devices=1, lora=False, dropout=0.0, max_steps=4, ckpt=None, save_every=0,
        batch_size=4, ptx=False, callbacks=(), sampling=None, reward=letters, lr=3e-3, val_fraction=0.0, seed=0,
        precision="32-true", **options):  # fmt: skip
    """One run; returns the trainer and the module."""
    L.seed_everything(seed, verbose=False)
    module = PPOModule(
        model_dir,
        reward,
        **grouped(
            lora=LoRA(r=4, dropout=dropout) if lora else None,
            sampling=Sampling(**(sampling or {"max_new_tokens": 10, "temperature": 0.7, "stop_strings": ["e", "o"]})),
            optimizer=lambda params: torch.optim.AdamW(params, lr=lr, eps=1e-5),
            ptx_coef=0.5 if ptx else 0.0,
            **{"epochs": 2, "minibatches": 2, "micro_batch_tokens": 90, **options},
        ),
    )
    data = PromptDataModule(
        prompts(),
        batch_size=batch_size,
        val_fraction=val_fraction,
        ptx=Ptx(TEXTS if ptx else None, batch_size=3),
        cache_dir=Path(out_dir) / "cache",
    )
    options = dict(max_steps=max_steps, precision=precision)
    trainer = train(
        module, data, out_dir, lambda m: trained(m).items(), callbacks, devices, save_every, ckpt, **options
    )
    return trainer, module


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
