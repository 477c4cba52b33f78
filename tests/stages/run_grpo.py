"""A small GRPO run as a process of its own, for tests of several processes, resume and kills.

    python run_grpo.py MODEL_DIR OUT_DIR '{"devices": 2, "algorithm": "dapo", ...}'

Writes to OUT_DIR weights.pt (all that was trained) and metrics.json (the last iteration's).
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_rlhf import (
    KL,
    CompletionsTable,
    GroupLoss,
    Groups,
    GRPOModule,
    LoRA,
    PromptDataModule,
    Rollout,
    Sampling,
    Shaping,
    Updates,
)
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.rollout import VLLMEngine
from lightning_rlhf.utils.collectives import gather_objects

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from runs import train
from talkative import Talkative

torch.set_num_threads(1)


def prompts(n=20):
    """Prompts of mixed length, each with a column for the reward."""
    return [{"prompt": f"Say {i} " + "fox " * (i % 5), "wanted": "aeiou"[i % 5]} for i in range(n)]


def letters(prompts, completions, wanted):
    """How often a completion has the letter that its row wants, and any other."""
    return [c.count(w) + 0.1 * len(set(c)) for c, w in zip(completions, wanted, strict=True)]


def has(prompts, completions, wanted):
    """Whether a completion has the letter: groups may be flat."""
    return [float(w in c) for c, w in zip(completions, wanted, strict=True)]


def trained(module):
    return {k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad}


class Recorded(GRPOModule):
    """Keeps what happened, for the reference to do again."""

    def score_experience(self, experience, samples):
        super().score_experience(experience, samples)
        self.iterations = [*getattr(self, "iterations", []), (experience, [], [], samples)]

    def backward_minibatch(self, experience, chosen, ptx):
        found = super().backward_minibatch(experience, chosen, ptx)
        if not hasattr(self, "gradient"):
            self.gradient = {k: p.grad.clone() for k, p in self.named_parameters() if p.grad is not None}
        self.iterations[-1][1].append((chosen, found))
        return found

    def update_policy(self, experience, ptx):
        found = super().update_policy(experience, ptx)
        self.iterations[-1][2].append(trained(self))
        return found


class Uneven(GRPOModule):
    """All prompts are rank 0's; the others have none."""

    def training_step(self, batch, batch_idx):
        parts = gather_objects(batch)
        rows = [(row, part, i) for part in parts for i, row in enumerate(part.rows)] if self.global_rank == 0 else []
        every = [part.select([i]) for _, part, i in sorted(rows, key=lambda each: each[0])]
        names = ("prompts", "messages", "rows")
        whole = {name: [x for one in every for x in getattr(one, name)] for name in names}
        columns = {name: [x for one in every for x in one.columns[name]] for name in batch.columns}
        whole = {**whole, "rows": tuple(whole["rows"])}
        super().training_step(PromptBatch(**whole, columns=columns, total=batch.total), batch_idx)


def run(model_dir, out_dir, devices=1, lora=False, dropout=0.0, max_steps=3, ckpt=None, save_every=0, batch_size=4,
        rows=None, reward="letters", lr=3e-3, seed=0, samples=3, kl=None, shaping=None, groups=None, loss=None,
        updates=None, kind=GRPOModule, val_fraction=0.0, sampling=None, callbacks=(), table=0,
        uneven=False, data=None, environment=None, max_total_tokens=None, engine=None, **options):  # fmt: skip
    """One run; returns the trainer and the module. With ``uneven``, rank 0 has all prompts of a batch."""
    L.seed_everything(seed, verbose=False)
    module = (Uneven if uneven else kind)(
        model_dir,
        {"letters": letters, "has": has}.get(reward, reward) if isinstance(reward, str) else reward,
        lora=LoRA(r=4, dropout=dropout) if lora else None,
        rollout=Rollout(samples, Sampling(**(sampling or dict(max_new_tokens=10, temperature=0.7,
                                                              stop_strings=("e", "o")))), max_total_tokens),
        engine=VLLMEngine(**engine) if isinstance(engine, dict) else engine,
        environment=Talkative(**environment) if isinstance(environment, dict) else environment,
        kl=KL(**(kl or {"coef": 0.0})),
        shaping=Shaping(**(shaping or {})),
        groups=Groups(**(groups or {})),
        loss=GroupLoss(**(loss or {})),
        updates=Updates(**{"epochs": 2, "minibatches": 2, "micro_batch_tokens": 90, **(updates or {})}),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, eps=1e-5),
        **options,
    )  # fmt: skip
    data = PromptDataModule(rows or prompts(), batch_size=batch_size, val_fraction=val_fraction,
                            cache_dir=Path(out_dir) / "cache", **(data or {}))  # fmt: skip
    callbacks = [*callbacks, *([CompletionsTable(table)] if table else [])]
    trainer = train(
        module, data, out_dir, lambda m: trained(m).items(), callbacks, devices, save_every, ckpt, max_steps=max_steps
    )
    return trainer, module


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
