"""Pure tensor functions: no Lightning, no transformers."""

from lightning_rlhf.functional.logprobs import ScoredTokens, linear_logprobs, linear_nll
from lightning_rlhf.functional.preference import bradley_terry_loss, centring_penalty, log_exp_loss, log_sig_loss

__all__ = [
    "ScoredTokens",
    "bradley_terry_loss",
    "centring_penalty",
    "linear_logprobs",
    "linear_nll",
    "log_exp_loss",
    "log_sig_loss",
]
