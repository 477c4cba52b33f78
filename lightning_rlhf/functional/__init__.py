"""Pure tensor functions: no Lightning, no transformers."""

from lightning_rlhf.functional.logprobs import ScoredTokens, linear_logprobs, linear_nll

__all__ = ["ScoredTokens", "linear_logprobs", "linear_nll"]
