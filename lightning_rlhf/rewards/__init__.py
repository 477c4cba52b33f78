"""Where rewards come from: reward models, Python functions, weighted sums of both, judges.

Names load when they are used: workers, which judge completions, import modules from here and must not load torch.
"""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.rewards.base import FAULTS, BadScores, Reward, RewardError, Samples, Scores, check_scores
    from lightning_rlhf.rewards.function import FunctionReward
    from lightning_rlhf.rewards.judges import JudgedReward
    from lightning_rlhf.rewards.model import RewardModelReward, render
    from lightning_rlhf.rewards.texts import score_texts
    from lightning_rlhf.rewards.weighted import WeightedReward, WeightedSum, make_reward, names_model

_HOMES = {
    "FAULTS": "base",
    "BadScores": "base",
    "FunctionReward": "function",
    "JudgedReward": "judges",
    "Reward": "base",
    "RewardError": "base",
    "RewardModelReward": "model",
    "Samples": "base",
    "Scores": "base",
    "WeightedReward": "weighted",
    "WeightedSum": "weighted",
    "check_scores": "base",
    "make_reward": "weighted",
    "names_model": "weighted",
    "render": "model",
    "score_texts": "texts",
}

__all__ = [
    "FAULTS",
    "BadScores",
    "FunctionReward",
    "JudgedReward",
    "Reward",
    "RewardError",
    "RewardModelReward",
    "Samples",
    "Scores",
    "WeightedReward",
    "WeightedSum",
    "check_scores",
    "make_reward",
    "names_model",
    "render",
    "score_texts",
]


__getattr__ = loader(__name__, _HOMES)
