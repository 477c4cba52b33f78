"""Evaluation by win rate: two models answer prompts, and a judge chooses the better answers."""

from lightning_rlhf.evaluation.answers import generate_answers, names_file, read_answers
from lightning_rlhf.evaluation.chat_judge import ChatJudge
from lightning_rlhf.evaluation.judges import Answer, Judge, JudgeError, Question, RewardJudge, Verdict, make_judge
from lightning_rlhf.evaluation.pairs import AnswerPair, JudgedPair, judge_pairs, rates

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
