"""Metrics, each exact over ranks and micro-batches, with a functional twin."""

from lightning_rlhf.metrics.tokens import Perplexity, TokenMean, perplexity, token_mean

__all__ = ["Perplexity", "TokenMean", "perplexity", "token_mean"]
