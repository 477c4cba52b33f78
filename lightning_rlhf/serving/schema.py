"""What requests hold. Every field is bounded; a field that is not here is refused by its name.

A field's description says what it must be, and completes the sentence of the error about it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

#: Texts that a request may hold are bounded by the size of its body; these bound how many there are.
MOST_MESSAGES, MOST_PROMPTS, MOST_STOPS, MOST_BIASES, MOST_CHOICES = 4096, 256, 16, 1024, 128
MOST_ALTERNATIVES = 20

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
TokenName = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _whole(text: str) -> str:
    """Refuses a lone surrogate, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is half of a surrogate pair.") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
FilledText = Annotated[Text, Field(min_length=1)]


class Body(BaseModel):
    """Base of all objects of a request. A field that is null counts as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="true or false: send a last chunk with the usage")


class SamplingBody(Body):
    """What chats and completions share."""

    model: str | None = Field(None, min_length=1, max_length=256, description="the name of a model (GET /v1/models)")
    max_tokens: int | None = Field(None, ge=0, le=2**31, description="a whole number of tokens")
    n: int = Field(1, ge=1, le=MOST_CHOICES, description=f"a whole number from 1 to {MOST_CHOICES}")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="a whole number of at most 64 bits")
    stop: FilledText | Annotated[list[FilledText], Field(max_length=MOST_STOPS)] = Field(
        [], description=f"a text or a list of at most {MOST_STOPS} texts, none of them empty"
    )
    temperature: float = Field(1.0, ge=0, le=100, description="0 (greedy) or a number from 0.001 to 100")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0 and at most 1")
    top_k: int = Field(0, ge=0, le=2**31, description="a whole number of at least 0 (0: off)")
    min_p: float = Field(0.0, ge=0, le=1, description="a number from 0 (off) to 1")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=MOST_BIASES)] = Field(
        {}, description=f"an object of at most {MOST_BIASES} token ids with numbers from -100 to 100"
    )
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="a number from 0.01 to 100 (1: off)")
    min_tokens: int = Field(0, ge=0, le=2**31, description="a whole number of at least 0, at most the maximum")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object, beside stream: true")

    @model_validator(mode="after")
    def _fields_together(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true.")
        if 0 < self.temperature < 0.001:  # logits divided by less could overflow
            raise ValueError(f"temperature must be 0 (greedy) or from 0.001 to 100; got {self.temperature!r}.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens of an answer, if it is given."""
        return self.max_tokens


class CompletionBody(SamplingBody):
    """A request for completions of plain texts."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(
        description=f"a text, a list of token ids, or a list of at most {MOST_PROMPTS} of either, which are not empty"
    )

    echo: bool = Field(False, description="true or false: put the prompt before the completion")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description=f"a whole number of alternatives from 0 to {MOST_ALTERNATIVES}"
    )

    @model_validator(mode="after")
    def _nothing_to_do(self) -> Any:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 without echo.")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Part(Body):
    """A part of a turn."""

    type: Literal["text"] = Field(description="'text': this server reads nothing else")
    text: Text = Field(description="a text")


class Turn(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant"
    )
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MOST_MESSAGES)] = Field(
        description="a text, or a list of parts of type text"
    )

    @property
    def message(self) -> dict[str, str]:
        """The turn as chat templates get it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Turns = Annotated[list[Turn], Field(min_length=1, max_length=MOST_MESSAGES)]


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text"] = Field(description="'text': this server has no other")


class ChatBody(SamplingBody):
    """A request for answers to a conversation."""

    messages: Turns = Field(description=f"a list of 1 to {MOST_MESSAGES} turns with role and content")
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31, description="a whole number of at least 1")
    response_format: ResponseFormat | None = Field(None, description="{'type': 'text'}")
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="'auto' (the oldest turns are dropped if all do not fit) or 'disabled'"
    )
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description=f"a whole number from 0 to {MOST_ALTERNATIVES}"
    )
    reward: bool = Field(False, description="true or false: add the reward's score to each answer")

    @model_validator(mode="after")
    def _one_limit(self) -> Any:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both.")
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be at least 1 in a chat.")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true.")
        return self

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens of an answer, if it is given."""
        return self.max_completion_tokens or self.max_tokens


class ScoredConversation(Body):
    """A conversation to score: messages that end with an answer, or a prompt with answers."""

    messages: Turns | None = Field(None, description="a list of turns, the last of which is the assistant's")
    prompt: Text | Turns | None = Field(None, description="a text or a list of turns")
    answers: Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)] | None = Field(
        None, description=f"a list of 1 to {MOST_PROMPTS} texts"
    )
    truncated: list[bool] | None = Field(
        None, description="a list of true (the length limit cut the answer) or false, one per answer"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Any:
        if (self.messages is None) == (self.prompt is None) or (self.prompt is None) != (self.answers is None):
            raise ValueError("give messages, or prompt and answers.")
        if self.messages is not None and (len(self.messages) < 2 or self.messages[-1].role != "assistant"):
            raise ValueError("messages must be a prompt and then the assistant's answer.")
        if self.truncated is not None and len(self.truncated) != len(self.answers or [""]):
            raise ValueError("truncated must have one entry per answer.")
        return self


class RewardBody(Body):
    """A request for scores."""

    model: str | None = Field(None, min_length=1, max_length=256, description="the name of the reward")
    conversations: Annotated[list[ScoredConversation], Field(min_length=1, max_length=MOST_PROMPTS)] = Field(
        description=f"a list of 1 to {MOST_PROMPTS} conversations"
    )


class Dialogue(Body):
    """A question and its answer, which is empty in the last one."""

    instruction: FilledText = Field(description="a text that is not empty")
    response: Text = Field(description="a text")


class CoatiBody(Body):
    """A request of Coati's chat server, with its bounds."""

    max_new_tokens: int = Field(gt=0, le=512, description="a whole number from 1 to 512")
    history: Annotated[list[Dialogue], Field(min_length=1, max_length=MOST_MESSAGES)] = Field(
        description="a list of at least one dialogue, the last of which has an empty response"
    )
    top_k: int | None = Field(None, gt=0, le=2**31, description="a whole number above 0")
    top_p: float | None = Field(None, gt=0, lt=1, description="a number above 0 and below 1")
    temperature: float | None = Field(None, ge=0.001, lt=1, description="a number from 0.001 and below 1")

    @model_validator(mode="after")
    def _open_end(self) -> Any:
        if self.history[-1].response:
            raise ValueError("the last dialogue must have an empty response.")
        return self
