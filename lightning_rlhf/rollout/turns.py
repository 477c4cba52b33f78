"""Completions of several turns: policy and environment speak by turns, and no token is tokenized twice."""

from __future__ import annotations

import copy
import math
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data import Message, PromptBatch
from lightning_rlhf.data.templates import answer_lead
from lightning_rlhf.data.tokens import TokenizeError, encode_prompt, encode_reply
from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.rollout.environment import Environment, Turn, TurnError
from lightning_rlhf.rollout.types import Completion, Episode, Request, RolloutEngine, Sampling
from lightning_rlhf.utils.collectives import once_per_copy
from lightning_rlhf.utils.processes import one_process
from lightning_rlhf.utils.random import sample_key
from lightning_rlhf.utils.text import one_line, show

_T = TypeVar("_T")
#: Roles of what an environment says; it may begin with answers too, as examples.
ROLES = ("user", "tool", "system")


@dataclass
class _Player:
    """A completion on its way, with its copy of the environment."""

    environment: Environment
    row: int
    data: dict[str, Any]
    seed: int
    key: int
    prompt: list[int] = field(default_factory=list)
    opening: list[Message] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reward: float = 0.0
    left: int = 0  # tokens that it may still have
    end: Literal["stop", "length"] | None = None

    @property
    def turn_key(self) -> int:
        """Seed of the policy's next turn; that of the first is the completion's own."""
        number = sum(turn["role"] == "assistant" for turn in self.turns)
        return sample_key(self.key, number) if number else self.key

    def add(self, ids: Sequence[int], sampled: bool) -> None:
        """Appends tokens of the policy or of the environment."""
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.left -= len(ids)

    def says(self, what: str) -> TurnError:
        """An error with its place."""
        return TurnError(f"The environment {type(self.environment).__name__}, row {self.row} of the prompts: {what}")

    def finished(self) -> Completion:
        """The completion."""
        lines = [t["content"] if t["role"] == "assistant" else f"[{t['role']}] {t['content']}" for t in self.turns]
        episode = Episode(self.prompt, self.opening, self.turns, self.sampled, self.reward)
        return Completion(self.ids, self.logprobs, "\n".join(lines), self.end or "stop", episode=episode)


def play_episodes(
    engine: RolloutEngine,
    policy: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    environment: Environment,
    prompts: PromptBatch,
    keys: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    max_total_tokens: int | None = None,
    limits: Mapping[str, int] | None = None,
) -> list[list[Completion]]:
    """Lets a policy and an environment speak by turns, until each episode is done or cut by a limit.

    All unfinished episodes take their next turn in one call of the engine. The policy's tokens stay as they were
    sampled; the environment's are what the chat template writes between two answers.

    Args:
        engine: The rollout engine.
        policy: A backbone whose model can generate.
        tokenizer: The model's tokenizer.
        environment: Copied for each completion.
        prompts: B prompts; their messages and columns are what ``reset`` gets.
        keys: Seeds of the completions of each prompt. The first is the seed of the prompt's episodes too.
        sampling: Sampling settings; ``max_new_tokens`` holds for each turn. A turn that it cuts is the last.
        stop_token_ids: Tokens that end a turn.
        max_total_tokens: Most tokens of a completion, with all turns and what the environment says; None: what the
            model's context leaves.
        limits: Further limits on the tokens of a prompt with its completion, by what sets them.

    Returns:
        Completions of each prompt with their episodes. One that a limit ended is truncated.

    Raises:
        TurnError: The environment fails, does not return in time, returns something else than it should, or says
            what the chat template refuses; the message names the row. Or a prompt leaves no room.
    """
    options = _template_options(environment)
    call = _Caller(environment.deadline, environment.parallel)
    groups = _begin_groups(call, tokenizer, environment, prompts, keys, stop_token_ids)
    players = [player for group in groups for player in group]
    context = getattr(policy.transformer.config.get_text_config(), "max_position_embeddings", None)
    for player in players:
        player.left = _room(player, context, max_total_tokens, limits or {})
    lead = answer_lead(tokenizer)
    waiting = players
    while waiting:
        requests = [
            Request([*p.prompt, *p.ids], [p.turn_key], max_new_tokens=min(sampling.max_new_tokens, p.left))
            for p in waiting
        ]
        speak = partial(engine.generate, policy, tokenizer, requests, sampling, stop_token_ids)
        found = once_per_copy(speak, together=True)
        for player, (completion,) in zip(waiting, found, strict=True):
            player.add(completion.input_ids, sampled=True)
            player.logprobs += completion.logprobs
            player.end = "length" if completion.truncated else None
            text = completion.text.removeprefix(lead)
            player.turns.append(Message(role="assistant", content=text))
        asked = [player for player in waiting if player.end is None]
        for player, turn in zip(asked, call(_step, asked), strict=True):
            _take(player, turn, tokenizer, options, stop_token_ids)
        waiting = [player for player in asked if player.end is None]
    return [[player.finished() for player in group] for group in groups]


def read_openings(
    tokenizer: PreTrainedTokenizerBase,
    environment: Environment,
    prompts: PromptBatch,
    keys: Sequence[int],
    stop_token_ids: Sequence[int],
) -> list[list[int]]:
    """Reads what a policy is shown before its first turn, in place of the prompts.

    Args:
        tokenizer: The model's tokenizer.
        environment: Copied for each prompt.
        prompts: B prompts; their messages and columns are what ``reset`` gets.
        keys: For each prompt the seed of its first completion.
        stop_token_ids: Tokens that end a turn.

    Returns:
        (B,) tokens of what :func:`play_episodes` begins with.

    Raises:
        TurnError: The environment fails, or begins with what the chat template refuses; the message names the row.
    """
    call = _Caller(environment.deadline, environment.parallel)
    groups = _begin_groups(call, tokenizer, environment, prompts, [[key] for key in keys], stop_token_ids)
    return [player.prompt for (player,) in groups]


def _template_options(environment: Environment) -> dict[str, Any]:
    return {"tools": list(environment.tools)} if environment.tools else {}


def _begin_groups(
    call: _Caller,
    tokenizer: PreTrainedTokenizerBase,
    environment: Environment,
    prompts: PromptBatch,
    keys: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
) -> list[list[_Player]]:
    """Begins the episodes of each prompt, and sets their openings and the tokens of these."""
    options = _template_options(environment)
    groups: list[list[_Player]] = []
    for i, (row, own) in enumerate(zip(prompts.rows, keys, strict=True)):
        data = {name: column[i] for name, column in prompts.columns.items()} | {"messages": prompts.messages[i]}
        seed = sample_key(own[0], 0)
        groups.append([_Player(copy.copy(environment), row, copy.deepcopy(data), seed, key) for key in own])
    players = [player for group in groups for player in group]
    for player, begun in zip(players, call(_begin, players), strict=True):
        player.opening = _messages(player, begun, "reset", ("assistant", *ROLES))
    for group, ids, messages in zip(groups, prompts.prompts, prompts.messages, strict=True):
        known = ids if group[0].opening == messages and not options else None
        _share_prompt(group, known, tokenizer, options, stop_ids)
    return groups


def _begin(player: _Player) -> Sequence[Message]:
    if isinstance(player.data["messages"], str):
        raise player.says("its prompt is a plain text, and turns need messages. Set data.as_text to false.")
    return player.environment.reset(player.data, player.seed)


def _share_prompt(
    group: Sequence[_Player],
    ids: list[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    stop_ids: Sequence[int],
) -> None:
    """Sets the tokens of a group's prompt, which its episodes share; None where they are not known yet."""
    opening = group[0].opening
    if other := next((player for player in group if player.opening != opening), None):
        raise other.says(
            "reset returned other messages for another completion of this prompt. Draw by the seed alone, which they "
            f"share: {show(opening, 80)} and {show(other.opening, 80)}."
        )
    try:
        ids = encode_prompt(tokenizer, opening, options, stop_ids) if ids is None else ids
    except TokenizeError as error:
        raise group[0].says(f"reset returned what can't be shown to the policy: {error}.") from error
    for player in group:
        player.prompt = ids


def _step(player: _Player) -> Turn:
    *before, answer = copy.deepcopy([*player.opening, *player.turns])
    return player.environment.step(before, answer["content"])


def _take(
    player: _Player,
    turn: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    stop_ids: Sequence[int],
) -> None:
    """Takes a reaction: its reward, and its messages if the episode goes on."""
    if not isinstance(turn, Turn):
        raise player.says(f"step returned {show(turn)}. Return Turn(messages, reward, done).")
    try:
        reward = math.nan if isinstance(turn.reward, (str, bytes)) else float(turn.reward)
    except (OverflowError, TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise player.says(f"step returned the reward {show(turn.reward)}, which is not a finite number.")
    if not isinstance(turn.done, (bool, np.bool_)):  # a text such as "no" would count as true
        raise player.says(f"step returned done={show(turn.done)}. Return True or False.")
    player.reward += reward
    if turn.done:
        player.end = "stop"
        return
    messages = _messages(player, turn.messages, "step", ROLES)
    try:
        ids = encode_reply(tokenizer, messages, player.ids[-1], options, stop_ids)
    except TokenizeError as error:
        raise player.says(f"step returned what can't be shown to the policy: {error}.") from error
    if len(ids) >= player.left:
        player.end = "length"  # no room for an answer: what it would answer to is left out
        return
    player.add(ids, sampled=False)
    player.turns += messages


def _messages(player: _Player, given: Any, method: str, roles: Sequence[str]) -> list[Message]:
    """The messages that a method of an environment returned, checked."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        raise player.says(f"{method} returned {show(given)} for messages. Return a list of {{role, content}}.")
    if not given:
        why = (
            " and the episode is not done. Return what the policy reads next, or done=True" if method == "step" else ""
        )
        raise player.says(f"{method} returned no messages{why}.")
    for message in given:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise player.says(f"{method} returned the message {show(message)}. It needs a role, and a text as content.")
        if message.get("role") not in roles:
            raise player.says(
                f"{method} returned a message with the role {show(message.get('role'))}. Choose one of: "
                f"{', '.join(roles)}."
            )
    return [cast(Message, dict(message)) for message in given]


def _room(player: _Player, context: int | None, most: int | None, limits: Mapping[str, int]) -> int:
    """Tokens that a completion may have."""
    length = len(player.prompt)
    left = [most] if most is not None else []
    if context is not None:
        if context <= length:
            raise player.says(f"its prompt has {length} tokens and fills the model's context of {context}. Shorten it.")
        left.append(context - length)
    if not left:
        raise player.says("the model names no context. Set rollout.max_total_tokens.")
    for name, limit in limits.items():
        if length + min(left) > limit:
            raise player.says(
                f"its prompt of {length} tokens and a completion of rollout.max_total_tokens={most} may have "
                f"{length + min(left)}, over {limit}: {name}. Set rollout.max_total_tokens to at most "
                f"{limit - length}, or raise that."
            )
    return min(left)


# ------------------------------------------------------------------------------------------------- calls


class _Caller:
    """Calls a method of many players' environments, at once or one after the other.

    Of the ranks that hold a copy of the model together only the first calls them: all must go on alike, and what a
    tool does is done once.

    Args:
        deadline: Seconds that a call may take; None for no limit.
        parallel: Number of calls at the same time.
    """

    def __init__(self, deadline: float | None, parallel: int) -> None:
        self.deadline, self.parallel = deadline, parallel

    def __call__(self, function: Callable[[_Player], _T], players: Sequence[_Player]) -> list[_T]:
        """Returns what the calls return, in order.

        Raises:
            TurnError: A call fails or takes too long.
        """
        return once_per_copy(lambda: self._call(function, players))

    def _call(self, function: Callable[[_Player], _T], players: Sequence[_Player]) -> list[_T]:
        if self.deadline is None and self.parallel == 1:  # in the main thread, where signals work
            outcomes = [_outcome(function, player) for player in players]
        else:
            outcomes = self._in_threads(function, players)
        for player, outcome in zip(players, outcomes, strict=True):
            if isinstance(outcome, _Failed):
                if isinstance(outcome.error, TurnError):
                    raise outcome.error
                error, where = outcome.error, traceback.extract_tb(outcome.error.__traceback__)[-1]
                place = f"{where.filename}:{where.lineno}"
                raise player.says(f"{type(error).__name__}: {one_line(str(error), 300)} ({place})") from error
        return cast("list[_T]", outcomes)

    def _in_threads(self, function: Callable[[_Player], _T], players: Sequence[_Player]) -> list[_T | _Failed]:
        outcomes: dict[int, _T | _Failed] = {}
        begun: dict[int, float] = {}
        changed = threading.Condition()
        numbers = iter(range(len(players)))

        def work() -> None:
            while True:
                with changed:
                    if (number := next(numbers, None)) is None:
                        return
                    begun[number] = time.monotonic()
                try:
                    outcome = _outcome(function, players[number])
                except BaseException as error:  # of the environment's own: signals are for the main thread
                    outcome = _Failed(error)
                with changed:
                    outcomes[number] = outcome
                    changed.notify_all()

        for _ in range(min(self.parallel, len(players))):
            threading.Thread(target=work, daemon=True, name="environment").start()  # one that hangs must not hold us
        with changed:
            while len(outcomes) < len(players):
                now = time.monotonic()
                running = {number: start for number, start in begun.items() if number not in outcomes}
                if self.deadline is not None:
                    for number, start in running.items():
                        if now - start >= self.deadline:
                            raise players[number].says(
                                f"a call did not return within its deadline of {self.deadline:g} seconds. Raise the "
                                "environment's deadline, or find out what it waits for."
                            )
                first = min(running.values(), default=now)
                changed.wait(None if self.deadline is None else max(0.0, first + self.deadline - now))
        return [outcomes[number] for number in range(len(players))]


@dataclass
class _Failed:
    error: BaseException


def _outcome(function: Callable[[_Player], _T], player: _Player) -> _T | _Failed:
    try:
        with one_process():
            return function(player)
    except (Exception, SystemExit) as error:  # sys.exit() would end a thread for which others wait, or the run
        if isinstance(error, SystemExit) and type(error) is not SystemExit:  # Ctrl-C or SIGTERM
            raise
        return _Failed(error)
