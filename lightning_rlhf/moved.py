"""Former names of arguments and their present places, by which Python, commands and configs refuse them."""

from __future__ import annotations

import inspect
from collections.abc import Set

#: What every stage takes.
COMMON = {
    "dtype": "load.dtype",
    "quantization": "load.quantization",
    "gradient_checkpointing": "load.gradient_checkpointing",
    "layout": "load.layout",
    "trust_remote_code": "load.trust_remote_code",
    "max_dropped": "max_skipped",
}
#: Arguments of every data module.
DATA = {"streaming": "streaming_window", "window_rows": "streaming_window"}
MOVED: dict[str, dict[str, str]] = {
    "SFTModule": COMMON,
    "RewardModule": {**COMMON, "center": "centering_coef"},
    "PPOModule": {
        **COMMON,
        "max_dropped": "updates.max_skipped",
        "shared_backbone": "critic.shared_backbone",
        "critic_lr": "critic.lr",
        "clip_value": "critic.clip",
        "value_coef": "critic.loss_coef",
        "sampling": "rollout.sampling",
        "samples_per_prompt": "rollout.samples_per_prompt",
        "kl_coef": "kl.coef",
        "kl_penalty": "kl.where",
        "kl_target": "kl.target",
        "kl_horizon": "kl.horizon",
        "scale_scores": "shaping.scale",
        "clip_scores": "shaping.clip",
        "missing_stop_penalty": "shaping.missing_eos_penalty",
        "whiten_rewards": "shaping.whiten",
        "bad_scores": "shaping.bad_scores",
        "gamma": "gae.gamma",
        "lam": "gae.lam",
        "bootstrap": "gae.bootstrap_truncated",
        "whiten_advantages": "gae.whiten",
        "clip_low": "loss.clip_low",
        "clip_high": "loss.clip_high",
        "entropy_coef": "loss.entropy_coef",
        "ptx_coef": "loss.ptx_coef",
        "loss_mean": "loss.aggregation",
        "old_logprobs": "loss.old_logprobs",
        "epochs": "updates.epochs",
        "minibatches": "updates.minibatches",
        "micro_batch_tokens": "updates.micro_batch_tokens",
        "max_norm": "updates.max_grad_norm",
        "target_kl": "updates.target_kl",
        "reuse_passes": "updates.reuse_forward",
    },
    "InstructionDataModule": DATA,
    "PreferenceDataModule": DATA,
    "PromptDataModule": {**DATA, "ptx_batch_size": "ptx.batch_size", "ptx_max_length": "ptx.max_length"},
}
#: Classes of the groups, by the arguments that take them.
GROUPS = {"gae": "GAE", "kl": "KL"}


def refuse_moved(kind: type, given: Set[str]) -> None:
    """Refuses former names of the arguments of a class, or of one that it extends.

    Raises:
        TypeError: It says what to write instead.
    """
    own = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    tables = [MOVED[base.__name__] for base in kind.__mro__ if base.__name__ in MOVED]
    for name in given - own.keys():
        if place := next((table[name] for table in tables if name in table), None):
            group, _, field = place.partition(".")
            how = f"{group}={GROUPS.get(group, group.capitalize())}({field}=...)" if field else f"{group}=..."
            raise TypeError(f"{kind.__name__}: {name} is {place} now. Write {how}; see docs/moving.md.")
