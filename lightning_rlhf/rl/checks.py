"""Refuses, before the first rollout, what would end a run in its middle or do nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.functional import adapt_kl_coef
from lightning_rlhf.protocols import GivesPrompts, KnowsLengths
from lightning_rlhf.rl.settings import KL
from lightning_rlhf.rollout import Sampling


def check_lengths(
    data: Any,
    parts: Sequence[str],
    most: int,
    limits: Mapping[str, int],
    setting: str = "rollout.sampling.max_new_tokens",
) -> None:
    """Refuses prompts that could have completions which a model cannot read.

    Args:
        data: The data module; who brings loaders of their own knows the lengths of their prompts.
        parts: Which of its parts are read: ``train``, ``val``, ``test``, ``predict``.
        most: Most tokens of a completion.
        limits: Most tokens of a prompt with its completion, by what sets the limit.
        setting: What sets the completion's.

    Raises:
        ValueError: There are such prompts; the message says which settings would do.
    """
    if not isinstance(data, KnowsLengths):
        return
    longest = max(map(data.longest, parts))
    whole = longest + most
    for name, limit in limits.items():
        if longest and whole > limit:
            do = []
            if limit > longest:
                do.append(f"{setting} to at most {limit - longest}")
            if limit > most:
                do.append(f"data.max_length (of prompts) to at most {limit - most}")
            if name == "updates.micro_batch_tokens":
                do.append(f"{name} to at least {whole}")
            raise ValueError(
                f"A prompt of {longest} tokens and a completion of {setting}={most} "
                f"have {whole}, over {limit}: {name}. Set {', or '.join(do) or 'shorter ones'}."
            )


class Beside(NamedTuple):
    """What a stage learns from beside its prompts.

    Attributes:
        name: Its key in a batch, and its group among the settings of the data module.
        setting: The module's setting that weighs it.
        rows: What its rows are.
        kinds: What its source can be.
    """

    name: str
    setting: str
    rows: str
    kinds: str


PTX = Beside("ptx", "loss.ptx_coef", "text", "instruction data or plain texts")
PAIRS = Beside("pairs", "mixture", "pair", "preference data")


def check_beside(
    what: Beside, weight: float, micro_batch_tokens: int | None, data: Any = None, given: bool | None = None
) -> None:
    """Refuses a weight without rows, warns of rows without a weight, and refuses rows that are too long.

    Args:
        what: What the stage learns from beside its prompts.
        weight: Its weight in the loss.
        micro_batch_tokens: Most tokens of a micro-batch.
        data: The data module.
        given: Whether a batch has such rows; None asks the data module.

    Raises:
        ValueError: The message says what to set.
    """
    name, setting, rows, kinds = what
    if given is None:
        if not isinstance(data, GivesPrompts):
            return
        given = name in data.beside
        for other in data.beside.keys() - {name}:
            rank_zero_warn(f"data.{other} is read, and this stage has no use for it: leave out data.{other}.source.")
        if given and not weight:
            rank_zero_warn(
                f"data.{name} is read and not learned from: model.{setting} is 0. Set it, or leave out "
                f"data.{name}.source."
            )
        longest = data.beside[name].longest("train") if given and weight else 0
        if micro_batch_tokens is not None and longest > micro_batch_tokens:
            raise ValueError(
                f"A {rows} of data.{name} has {longest} tokens, over updates.micro_batch_tokens={micro_batch_tokens}. "
                f"Raise it to {longest}, or set data.{name}.max_length to at most {micro_batch_tokens}."
            )
    if weight and not given:
        raise ValueError(
            f"{setting}={weight} weighs a loss on {rows}s, and the data have none. Give data.{name}.source ({kinds}), "
            f"or set model.{setting} to 0."
        )


def check_adaptive_kl(kl: KL, samples_per_prompt: int, data: Any) -> None:
    """Refuses a horizon that is too short for the completions of an iteration.

    Raises:
        ValueError: It is.
    """
    if kl.target is not None and isinstance(data, GivesPrompts):
        adapt_kl_coef(kl.coef, kl.target, kl.target, kl.horizon, data.batch_size * samples_per_prompt)


def warn_of_biased_sampling(sampling: Sampling) -> None:
    """Warns if completions come from another distribution than the losses assume."""
    off = Sampling()
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    names = ("top_k", "top_p", "min_p", *penalties, "logit_bias", "min_new_tokens")
    if changed := [name for name in names if getattr(sampling, name) != getattr(off, name)]:
        given = ", ".join(f"sampling.{name}={getattr(sampling, name)}" for name in changed)
        rank_zero_warn(
            f"{given}: completions are drawn from another distribution than log-probs, ratios and KL are computed for, "
            "so gradients and KL are biased (docs/ppo.md, Sampling). To train without bias leave "
            f"{'it' if len(changed) == 1 else 'them'} out."
        )
