"""Metrics that are exact over ranks and micro-batches, each with a function that computes the same."""

from lightning_rlhf.metrics.comparison import WinRate, WinRates, win_rate
from lightning_rlhf.metrics.preference import AnswerMeans, PreferenceAccuracy, calibration, calibration_error, share_won
from lightning_rlhf.metrics.stage import StageMetrics
from lightning_rlhf.metrics.tokens import Perplexity, TokenMean, perplexity, token_mean

__all__ = [
    "AnswerMeans",
    "Perplexity",
    "PreferenceAccuracy",
    "StageMetrics",
    "TokenMean",
    "WinRate",
    "WinRates",
    "calibration",
    "calibration_error",
    "perplexity",
    "share_won",
    "token_mean",
    "win_rate",
]
