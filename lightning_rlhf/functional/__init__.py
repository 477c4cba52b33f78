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
from lightning_rlhf.functional.kto import apo_zero_unpaired_loss, kto_loss, kto_reference_point
from lightning_rlhf.functional.logprobs import ScoredTokens, linear_logprobs, linear_nll
from lightning_rlhf.functional.ppo import (
    PolicyLoss,
    ValueLoss,
    explained_variance,
    policy_loss,
    value_loss,
    variance_explained,
)
from lightning_rlhf.functional.preference import (
    F_DIVERGENCES,
    LOSSES,
    PairLogprobs,
    PairLoss,
    bradley_terry_loss,
    centering_penalty,
    log_exp_loss,
    log_sig_loss,
    pair_logprobs,
)

__all__ = [
    "F_DIVERGENCES",
    "LOSSES",
    "Advantages",
    "PairLogprobs",
    "PairLoss",
    "PolicyLoss",
    "RunningMoments",
    "ScoredTokens",
    "ValueLoss",
    "adapt_kl_coef",
    "apo_zero_unpaired_loss",
    "bradley_terry_loss",
    "centering_penalty",
    "explained_variance",
    "gae",
    "k1",
    "k2",
    "k3",
    "kl_loss",
    "kto_loss",
    "kto_reference_point",
    "linear_logprobs",
    "linear_nll",
    "log_exp_loss",
    "log_sig_loss",
    "merge_moments",
    "moments",
    "pair_logprobs",
    "policy_loss",
    "token_rewards",
    "value_loss",
    "variance",
    "variance_explained",
    "whiten",
]
