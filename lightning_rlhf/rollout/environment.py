"""What a policy can talk to in several turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_rlhf.data import Message


class Turn(NamedTuple):
    """An environment's reaction to a turn of the policy.

    Attributes:
        messages: What the policy reads before its next turn: ``{"role": ..., "content": ...}``, the role being
            ``user``, ``tool`` or ``system``. At least one, unless the episode is done; then nothing reads them.
        reward: Added to the episode's reward.
        done: Whether the episode ends here.
    """

    messages: Sequence[Message] = ()
    reward: float = 0.0
    done: bool = False


class TurnError(ValueError):
    """An environment failed, or said what can't be said; the message is for people."""


class Environment(ABC):
    """What a policy talks to in several turns: a tool, a game, a user.

    There is one object, and each completion gets a copy of it (``copy.copy``). So ``__init__`` holds settings and what
    all episodes share, such as a client, and :meth:`reset` makes the state of one episode, as attributes of ``self``.
    An episode is to depend on its row, its seed and what the policy says alone; then a resumed run is exact.

    Attributes:
        tools: JSON schemas of functions that the chat template shows to the policy.
        deadline: Seconds that a call of ``reset`` or ``step`` may take before the run ends with an error; None sets no
            limit. With a limit, calls run in threads: a stuck thread can be left behind, not ended.
        parallel: Number of episodes whose calls run at the same time, in threads. A larger value is faster if the
            environment waits for something else, such as a server.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    deadline: float | None = None
    parallel: int = 1

    @abstractmethod
    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Begins an episode.

        Args:
            row: The prompt's row: ``messages``, and its other columns.
            seed: For what the environment draws. All completions of a prompt in an iteration have the same one, so that
                a group has the same task.

        Returns:
            The messages that the policy answers first: the row's, or others. They must be the same for all completions
            of a prompt.
        """

    @abstractmethod
    def step(self, messages: Sequence[Message], text: str) -> Turn:
        """Reacts to a turn of the policy.

        Args:
            messages: What was said before.
            text: What the policy says now, without special tokens.

        Returns:
            The reaction.
        """
