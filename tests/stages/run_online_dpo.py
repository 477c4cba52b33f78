"""A small run of online DPO as a process of its own, for tests of several processes and of resume.

    python run_online_dpo.py MODEL_DIR OUT_DIR '{"devices": 2, "lora": true, ...}'

Writes to OUT_DIR gradients.pt (the last update's, as the optimizer got them), weights.pt and metrics.json.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_rlhf import DataPairs, LoRA, OnlineDPOModule, OnlinePairShaping, PromptDataModule, Rollout, Sampling
from lightning_rlhf.rewards.judges import Judge, Verdict

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped
from runs import load_script, train

torch.set_num_threads(1)
run_ppo = load_script(Path(__file__).with_name("run_ppo.py"))
prompts, letters = run_ppo.prompts, run_ppo.letters
PAIRS = [
    {"prompt": f"Say {i} " + "fox " * (i % 3), "chosen": "dog " * (1 + i % 4), "rejected": f"Paris {i}"}
    for i in range(7)
]


class Longest(Judge):
    """Prefers the longer answer, wherever it stands."""

    def compare(self, questions):
        sizes = [(len(q.first.text), len(q.second.text)) for q in questions]
        return [Verdict("first" if a > b else "second" if b > a else "tie") for a, b in sizes]


class AlwaysFirst(Judge):
    """Says A, whatever it is shown."""

    def compare(self, questions):
        return [Verdict("first") for _ in questions]


def even(prompts, completions):
    """The same score for all."""
    return [1.0] * len(completions)


class Kept(OnlineDPOModule):
    """Keeps the pairs, the data's pairs, the weights and the gradients of each update; deals prompts in any order."""

    order = 0

    def training_step(self, batch, batch_idx):
        prompts = batch["prompts"] if isinstance(batch, dict) else batch
        if self.order:
            by = torch.randperm(len(prompts.rows), generator=torch.Generator().manual_seed(self.order)).tolist()
            for name in ("prompts", "messages", "rows"):
                setattr(prompts, name, type(getattr(prompts, name))(getattr(prompts, name)[i] for i in by))
            prompts.columns = {k: [v[i] for i in by] for k, v in prompts.columns.items()}
        super().training_step(batch, batch_idx)

    def backward_minibatch(self, experience, chosen, beside):
        before = {k: p.detach().clone() for k, p in self.policy.named_parameters()}
        found = super().backward_minibatch(experience, chosen, beside)
        self.updates_seen = [*getattr(self, "updates_seen", []), (experience, chosen, beside, before, found)]
        return found

    def on_before_optimizer_step(self, optimizer):
        named = self.policy.named_parameters()
        self.gradients = {k: p.grad.clone() for k, p in named if p.grad is not None}
        super().on_before_optimizer_step(optimizer)


def trained(module):
    return {k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad}


def run(model_dir, out_dir, devices=1, lora=False, max_steps=2, ckpt=None, save_every=0, batch_size=4, samples=2,
        data_pairs=False, callbacks=(), reward="letters", judge=None, lr=1e-2, val_fraction=0.0, seed=0, order=0,
        shaping=None, rows=None, temperature=1.0, **options):  # fmt: skip
    """One run; returns the trainer and the module."""
    L.seed_everything(seed, verbose=False)
    judge = {"longest": Longest(), "first": AlwaysFirst()}.get(judge, judge)
    reward = None if judge else {"letters": letters, "even": even}.get(reward, reward)
    updates = {"epochs": 1, "minibatches": 1, "micro_batch_tokens": 90, "max_norm": None}
    groups = grouped(**{**updates, **{k: options.pop(k) for k in (*updates, "layout", "target_kl") if k in options}})
    module = Kept(
        model_dir,
        reward,
        judge,
        lora=LoRA(r=4) if lora else None,
        rollout=Rollout(samples, Sampling(max_new_tokens=10, temperature=temperature, stop_strings=["e", "o"])),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, eps=1e-5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        shaping=OnlinePairShaping(**(shaping or {})),
        **groups,
        **options,
    )
    module.order = order
    data = PromptDataModule(
        prompts() if rows is None else prompts()[:rows],
        batch_size=batch_size,
        val_fraction=val_fraction,
        pairs=DataPairs(PAIRS if data_pairs else None, batch_size=4),
        cache_dir=Path(out_dir) / "cache",
    )
    trainer = train(
        module, data, out_dir, lambda m: trained(m).items(), callbacks, devices, save_every, ckpt, max_steps=max_steps
    )
    if trainer.is_global_zero and hasattr(module, "gradients"):
        torch.save(module.gradients, Path(out_dir) / "gradients.pt")
    return trainer, module


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
