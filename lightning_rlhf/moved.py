"""Former names of arguments and their present places, by which Python, commands and configs refuse them.

Arguments that only another stage has are refused likewise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

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
#: What every stage of reinforcement learning takes.
RL = {
    **COMMON,
    "max_dropped": "updates.max_skipped",
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
}
MOVED: dict[str, dict[str, str]] = {
    "SFTModule": COMMON,
    "RewardModule": {**COMMON, "center": "centering_coef"},
    "RLStage": RL,
    "PPOModule": {
        **RL,
        "shared_backbone": "critic.kind",
        "critic_lr": "critic.lr",
        "clip_value": "critic.clip",
        "value_coef": "critic.loss_coef",
        "gamma": "gae.gamma",
        "lam": "gae.lam",
        "bootstrap": "gae.bootstrap_truncated",
        "whiten_advantages": "gae.whiten",
    },
    "InstructionDataModule": DATA,
    "PreferenceDataModule": DATA,
    "PromptDataModule": {**DATA, "ptx_batch_size": "ptx.batch_size", "ptx_max_length": "ptx.max_length"},
}
_STAYS = (
    "the reference of this stage stays where training starts. Leave it out, or train with DPOModule, whose reference "
    "can move."
)
#: Arguments of another stage that a stage is often given, and what to do.
LACKED = {name: {"reference_update": _STAYS} for name in ("KTOModule", "OnlineDPOModule")}
#: Classes of the groups, by the arguments that take them.
GROUPS = {"gae": "GAE", "kl": "KL"}


def find_moved(kind: type, given: Iterable[str]) -> dict[str, str]:
    """Finds former names among the arguments of a class, or of one that it extends.

    Args:
        kind: The class.
        given: Names of arguments.

    Returns:
        The present place of each former name.
    """
    own = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    tables = [MOVED[base.__name__] for base in kind.__mro__ if base.__name__ in MOVED]
    former = {name: place for table in reversed(tables) for name, place in table.items()}
    return {name: former[name] for name in given if name in former and name not in own}


def write_argument(place: str) -> str:
    """Returns how Python code gives the argument of a place.

    Example:
        >>> write_argument("kl.coef"), write_argument("max_skipped")
        ('kl=KL(coef=...)', 'max_skipped=...')
    """
    group, _, field = place.partition(".")
    return f"{group}={GROUPS.get(group, group.capitalize())}({field}=...)" if field else f"{group}=..."


def refuse_moved(kind: type, given: Iterable[str]) -> None:
    """Refuses former names of the arguments of a class, or of one that it extends, and those that it lacks.

    Raises:
        TypeError: It says what to write instead.
    """
    for base in kind.__mro__:
        for name in LACKED.get(base.__name__, {}).keys() & {*given}:
            raise TypeError(f"{kind.__name__}: there is no {name}: {LACKED[base.__name__][name]}")
    for name, place in find_moved(kind, given).items():
        raise TypeError(f"{kind.__name__}: {name} is {place} now. Write {write_argument(place)}; see docs/moving.md.")
