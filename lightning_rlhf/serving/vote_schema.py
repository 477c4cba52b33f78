"""What requests about votes hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lightning_rlhf.serving.schema import Body, FilledText, Text, Turns

Choice = Literal["left", "right", "tie", "both_bad", "good", "bad"]
SettingName = Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]


class ShownAnswer(Body):
    """An answer as a person saw it."""

    model: str = Field(min_length=1, max_length=256, description="the name of a model")
    content: Text = Field(description="a text")
    reward: float | None = Field(None, description="a number")
    finish_reason: Literal["stop", "length", "stopped"] | None = Field(
        None, description="stop, length, or stopped (by the person)"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="a whole number of at most 64 bits")


class EditedAnswer(Body):
    """An answer that a person has made better."""

    answer: int = Field(ge=0, le=1, description="0 or 1: which of the answers was edited")
    content: FilledText = Field(description="a text that is not empty")


class VoteBody(Body):
    """A vote on two answers, a thumb for one, or an edited answer."""

    messages: Turns = Field(description="the turns before the answer, the last of which is the user's")
    answers: Annotated[list[ShownAnswer], Field(min_length=1, max_length=2)] = Field(
        description="a list of one answer, or of two: the left one first"
    )
    vote: Choice | None = Field(None, description="left, right, tie or both_bad; for one answer good or bad")
    edited: EditedAnswer | None = Field(None, description="an object with answer and content")
    comment: Text | None = Field(None, max_length=10_000, description="a text of at most 10000 characters")
    blind: bool = Field(False, description="true or false: whether the names of the models were hidden")
    sampling: Annotated[dict[SettingName, int | float], Field(max_length=32)] = Field(
        {}, description="an object of at most 32 sampling settings with numbers"
    )

    @model_validator(mode="after")
    def _fields_together(self) -> Any:
        if self.messages[-1].role != "user":
            raise ValueError("messages must end with the user's turn.")
        choices = ("left", "right", "tie", "both_bad") if len(self.answers) == 2 else ("good", "bad")
        if self.vote is not None and self.vote not in choices:
            raise ValueError(f"vote must be one of {', '.join(choices)} with {len(self.answers)} answers.")
        if self.vote is None and self.edited is None:
            raise ValueError("give vote, edited, or both.")
        if self.edited is not None and self.edited.answer >= len(self.answers):
            raise ValueError("edited.answer must be 0: there is one answer.")
        return self


class UndoBody(Body):
    """A vote to take back."""

    id: str = Field(min_length=1, max_length=64, description="the id of a vote")
