"""What an environment adds to a stage: its reward, its figures, and what is refused before a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import Message, Tree
from lightning_rlhf.data.templates import turn_end
from lightning_rlhf.data.tokens import TokenizeError, encode_prompt, encode_reply, spell
from lightning_rlhf.rewards import Reward, Samples, Scores, WeightedSum
from lightning_rlhf.rl.environments import Environment, ToolEnvironment
from lightning_rlhf.rl.settings import Rollout, Shaping
from lightning_rlhf.utils.text import show

#: Name of the environment's part of the score.
PART = "environment"


class EnvironmentReward(Reward):
    """The sum of an environment's rewards in a completion's episode."""

    def forward(self, samples: Samples) -> Scores:
        """Returns the sums, which the samples have."""
        assert samples.environment is not None
        return Scores(torch.tensor(samples.environment, dtype=torch.float32, device=samples.batch.last.device))


def with_environment(reward: Reward | None) -> WeightedSum:
    """A reward with the environment's as a part named ``environment``, whose weight is 1.

    Args:
        reward: The other rewards, if any.

    Raises:
        ValueError: A part has that name already.
    """
    parts: dict[str, Any] = {}
    weights: list[float] = []
    if isinstance(reward, WeightedSum):
        parts, weights = dict(zip(reward.names, reward.parts, strict=True)), list(reward.weights)
    elif reward is not None:
        parts, weights = {reward.name or "reward": reward}, [1.0]
    if PART in parts:
        raise ValueError(f"reward: a part has the name {PART!r}, which is the environment's. Give it another name.")
    found = WeightedSum({**parts, PART: EnvironmentReward()}, [*weights, 1.0])
    found.relative = reward is not None and reward.relative
    return found


def check_environment(
    environment: Environment,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    shaping: Shaping,
    has_reward: bool,
) -> None:
    """Refuses an environment that can't be shown to a policy, or whose episodes teach nothing.

    Raises:
        ValueError: The message says what the chat template can't do, what is missing, or what contradicts turns.
    """
    if not isinstance(environment, Environment):
        raise ValueError(f"environment is {show(environment)}. Give an object of a subclass of Environment.")
    name, most, each = type(environment).__name__, rollout.max_total_tokens, rollout.sampling.max_new_tokens
    calls = {"deadline": environment.deadline, "parallel": environment.parallel}
    check_arguments(Environment, calls, f"{name}.", deadline=Range(0, above=True), parallel=Range(1))
    if most is not None and most < each:
        raise ValueError(
            f"rollout.max_total_tokens={most} is for all turns, and rollout.sampling.max_new_tokens={each} for one: "
            "raise the first, or lower the second."
        )
    if shaping.overlong_cache is not None:
        raise ValueError(
            "shaping.overlong_cache counts back from the length limit of one answer, and an environment has several: "
            "set it to null, or have the environment's reward be less for long episodes."
        )
    if not tokenizer.chat_template:
        raise ValueError(f"The environment {name} needs a chat template: set chat_template, such as chatml or plain.")
    options = {"tools": list(environment.tools)} if environment.tools else {}
    role, answer = ("tool" if options else "user"), turn_end(tokenizer) or tokenizer.eos_token_id
    advice = "Set chat_template to one that does, such as that of Qwen 2.5 or Llama 3.1"
    try:
        encode_prompt(tokenizer, [Message(role="user", content="question")], options)
    except TokenizeError as error:
        raise ValueError(
            f"The environment {name} has tools, and the chat template can't show them. {advice}."
        ) from error
    try:
        said = (
            Message(role=role, name="probe", content="reply 17") if options else Message(role=role, content="reply 17")
        )
        shown = "17" in spell(tokenizer, encode_reply(tokenizer, [said], answer or 0, options))
    except TokenizeError as error:
        raise ValueError(f"The environment {name} speaks as {role!r}, and {error}. {advice}.") from error
    if not shown:
        raise ValueError(f"The environment {name} speaks as {role!r}, which the chat template does not show. {advice}.")
    if not has_reward and isinstance(environment, ToolEnvironment) and type(environment).step is ToolEnvironment.step:
        raise ValueError(f"{name} gives no reward: set reward, or override its step.")


def count_turns(trees: Sequence[Tree]) -> list[int]:
    """The number of the policy's turns in each completion."""
    every = ([True] if branch.scored is None else list(branch.scored) for tree in trees for branch in tree.branches)
    return [sum(now and not before for before, now in zip([False, *own], own, strict=False)) for own in every]
