"""Evaluation by win rate: two models answer prompts, and a judge chooses the better answers."""

from lightning_rlhf.evaluation.answers import generate_answers, names_file, read_answers
from lightning_rlhf.evaluation.chat_judge import ChatJudge
from lightning_rlhf.evaluation.judges import RewardJudge, make_judge
from lightning_rlhf.evaluation.pairs import rates
from lightning_rlhf.rewards.judges import (
    Answer,
    AnswerPair,
    Judge,
    JudgedPair,
    JudgeError,
    Question,
    Verdict,
    judge_pairs,
)

__all__ = [
    "Answer",
    "AnswerPair",
    "ChatJudge",
    "Judge",
    "JudgeError",
    "JudgedPair",
    "Question",
    "RewardJudge",
    "Verdict",
    "generate_answers",
    "judge_pairs",
    "make_judge",
    "names_file",
    "rates",
    "read_answers",
]
