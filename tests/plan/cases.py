"""Stages whose memory is measured and foretold, and what they read."""

from torch.utils.data import DataLoader

from lightning_rlhf import (
    GRPOModule,
    PPOModule,
    PromptDataModule,
    RewardModule,
    Rollout,
    Sampling,
    SFTModule,
    Updates,
)
from lightning_rlhf.plan.shapes import Shape

NEW = Sampling(max_new_tokens=12, min_new_tokens=12)
#: Rows of a rank's micro-batch.
SHAPES = {"sft": Shape("instructions", 4, 40, 40, 1, 1), "reward": Shape("preferences", 4, 40, 40, 2, 1)}
#: Prompts of a copy in an iteration, and the completions of each.
PROMPTS = {"ppo": (8, 1), "grpo": (2, 4)}


def lengths(prompts, completions):
    return [float(i) for i, _ in enumerate(completions)]


def module_of(stage, model):
    """The stage's module, with all weights trained."""
    if stage in SHAPES:
        return {"sft": SFTModule, "reward": RewardModule}[stage](model)
    kind = {"ppo": PPOModule, "grpo": GRPOModule}[stage]
    return kind(model, lengths, rollout=Rollout(PROMPTS[stage][1], NEW), updates=Updates(epochs=2))


def data_of(stage, copies, out):
    """Its data: all rows are as long as each other."""
    if stage in SHAPES:
        return DataLoader([SHAPES[stage].batch() for _ in range(2)], batch_size=None)
    texts = [{"prompt": "fox dog " * 12} for _ in range(8 * copies)]
    return PromptDataModule(texts, batch_size=PROMPTS[stage][0] * copies, val_fraction=0.0, cache_dir=out)
