"""Pure tensor functions, without Lightning or transformers."""

from lightning_rlhf.functional.advantages import (
    Advantages,
    RunningMoments,
    adapt_kl_coef,
    gae,
    merge_moments,
    moments,
    token_rewards,
    variance,
    whiten,
)
from lightning_rlhf.functional.kl import k1, k2, k3, kl_loss
from lightning_rlhf.functional.logprobs import ScoredTokens, linear_logprobs, linear_nll
from lightning_rlhf.functional.ppo import (
    PolicyLoss,
    ValueLoss,
    explained_variance,
    policy_loss,
    value_loss,
    variance_explained,
)
from lightning_rlhf.functional.preference import bradley_terry_loss, centering_penalty, log_exp_loss, log_sig_loss

__all__ = [
    "Advantages",
    "PolicyLoss",
    "RunningMoments",
    "ScoredTokens",
    "ValueLoss",
    "adapt_kl_coef",
    "bradley_terry_loss",
    "centering_penalty",
    "explained_variance",
    "gae",
    "k1",
    "k2",
    "k3",
    "kl_loss",
    "linear_logprobs",
    "linear_nll",
    "log_exp_loss",
    "log_sig_loss",
    "merge_moments",
    "moments",
    "policy_loss",
    "token_rewards",
    "value_loss",
    "variance",
    "variance_explained",
    "whiten",
]
