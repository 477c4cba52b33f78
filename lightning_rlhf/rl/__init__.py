"""What stages that learn from their own samples are composed of: settings, experience, actors, updates."""

from lightning_rlhf.rl.actors import Actors
from lightning_rlhf.rl.experience import Experience, UpdateStats, to_experience
from lightning_rlhf.rl.settings import GAE, KL, Critic, GroupLoss, Groups, Loss, Rollout, Shaping, Updates
from lightning_rlhf.rl.updater import Updater

__all__ = [
    "GAE",
    "KL",
    "Actors",
    "Critic",
    "Experience",
    "GroupLoss",
    "Groups",
    "Loss",
    "Rollout",
    "Shaping",
    "UpdateStats",
    "Updater",
    "Updates",
    "to_experience",
]
