"""A conversation: its turns, and the file that keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from lightning_rlhf.chat.client import Answer
from lightning_rlhf.data.formats import Message


class HistoryError(ValueError):
    """A file that is not a conversation."""


@dataclass
class Conversation:
    """The turns of a chat. All models see the same ones.

    Attributes:
        system: The system prompt; empty: none.
        turns: Turns of the user and, after each, of the assistant.
        answers: The models' answers to the last turn of the user. The kept one is the last turn.
    """

    system: str = ""
    turns: list[Message] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def prompt(self) -> list[Message]:
        """What the answers are answers to: all turns up to the last one of the user."""
        first = [Message(role="system", content=self.system)] if self.system else []
        return first + (self.turns[:-1] if self.turns and self.turns[-1]["role"] == "assistant" else self.turns)

    def keep(self, answer: Answer) -> None:
        """Makes one of the answers the assistant's last turn."""
        if self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        self.turns.append(Message(role="assistant", content=answer.content))

    def undo(self) -> bool:
        """Takes the last question with its answers back. Returns False if there is none."""
        while self.turns and self.turns.pop()["role"] != "user":
            pass
        had, self.answers = bool(self.answers), []
        return had

    def ask_again(self) -> str | None:
        """Takes the last question back and returns it."""
        asked = next((turn["content"] for turn in reversed(self.turns) if turn["role"] == "user"), None)
        self.undo()
        return asked

    def save(self, path: Path) -> None:
        """Writes the conversation as a row of messages, which ``InstructionDataModule`` reads.

        Raises:
            OSError: It cannot be written.
        """
        first = [{"role": "system", "content": self.system}] if self.system else []
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        row = {"messages": [*first, *self.turns]}
        partial.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Reads what :meth:`save` wrote.

        Raises:
            HistoryError: It is not a conversation; the message names the file.
            OSError: It cannot be read.
        """
        try:
            turns = json.loads(path.read_text(encoding="utf-8"))["messages"]
            found = [Message(role=turn["role"], content=turn["content"]) for turn in turns]
        except (ValueError, KeyError, TypeError) as error:
            raise HistoryError(f"{path} is not a saved conversation. Give another file as --history.") from error
        system = ""
        if found and found[0]["role"] == "system":
            system = found.pop(0)["content"]
        if [turn["role"] for turn in found] != ["user", "assistant"] * (len(found) // 2):
            raise HistoryError(
                f"{path} is not a conversation of questions and answers. Give another file as --history."
            )
        return cls(system, found)
