"""Where rewards come from: reward models, Python functions, weighted sums of both, judges."""

from lightning_rlhf.rewards.base import BadScores, Reward, RewardError, Samples, Scores, check_scores
from lightning_rlhf.rewards.function import FunctionReward
from lightning_rlhf.rewards.judges import JudgedReward
from lightning_rlhf.rewards.model import RewardModelReward, render
from lightning_rlhf.rewards.texts import score_texts
from lightning_rlhf.rewards.weighted import WeightedReward, WeightedSum, make_reward, names_model

__all__ = [
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
