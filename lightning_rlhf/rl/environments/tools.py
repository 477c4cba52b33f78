"""Python functions as tools, by the chat template."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import Message
from lightning_rlhf.rollout.environment import Environment, Turn
from lightning_rlhf.utils.imports import import_object
from lightning_rlhf.utils.text import one_line, replace_surrogates, shorten

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ToolEnvironment(Environment):
    """Python functions that the policy can call; an episode ends with a turn that calls none.

    The chat template shows the functions' JSON schemas, which come from their annotations and docstrings, to the
    policy. Calls are read from the text of a turn, in the forms of Hermes and Qwen
    (``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number), Llama 3 (a turn that is
    ``{"name": ..., "parameters": {...}}``, several with ``;`` between them) and Mistral (a turn that is a list of
    them). Results are turns with the role ``tool``: a text as it is, anything else as JSON. A call that can't be read,
    a name that no tool has, and a tool that raises have the error as their result.

    It gives no reward: rewards read the whole text, or override :meth:`step`.

    Args:
        tools: Functions, or their import paths. Each needs annotations and a docstring in Google's style.
        max_turns: Most turns of the policy. Calls in the last one are not executed.
        max_result_chars: Most characters of a result; a longer one is cut, and says so. A larger value leaves less room
            for turns.

    Raises:
        ImportError: Nothing is at an import path.
        ValueError: There is no tool, two have one name, or one has no schema; the message says what it lacks.
    """

    def __init__(
        self, tools: Sequence[str | Callable[..., Any]], max_turns: int = 4, max_result_chars: int = 2000
    ) -> None:
        check_arguments(ToolEnvironment.__init__, locals(), max_turns=Range(1), max_result_chars=Range(1))
        if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence) or not tools:
            raise ValueError(f"tools is {tools!r}. Give a list of functions or of their import paths.")
        self.max_turns, self.max_result_chars = max_turns, max_result_chars
        self.functions: dict[str, Callable[..., Any]] = {}
        schemas = []
        for tool in tools:
            function = import_object(tool, "tool") if isinstance(tool, str) else tool
            schema = _schema(function, tool)
            name = schema["function"]["name"]
            if name in self.functions:
                raise ValueError(f"Two tools have the name {name!r}. Rename one.")
            self.functions[name] = function
            schemas.append(schema)
        self.tools = schemas

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Begins with the row's messages."""
        self.turns = 0
        messages: list[Message] = row["messages"]
        return messages

    def step(self, messages: Sequence[Message], text: str) -> Turn:
        """Executes the calls of a turn."""
        self.turns += 1
        calls = parse_calls(text)
        if not calls or self.turns >= self.max_turns:
            return Turn(done=True)
        return Turn([self.execute(call) for call in calls])

    def execute(self, call: Mapping[str, Any] | str) -> Message:
        """Executes a call.

        Args:
            call: Its ``name`` and ``arguments``; or why it can't be read.

        Returns:
            A turn with the result, or with the error.
        """
        if isinstance(call, str):
            return Message(role="tool", name="error", content=replace_surrogates(f"Error: {call}"))
        name, arguments = call["name"], call["arguments"]
        function = self.functions.get(name)
        if function is None:
            content = f"Error: there is no tool {name!r}. There are: {', '.join(self.functions)}."
        else:
            try:
                inspect.signature(function).bind(**arguments)
                result = function(**arguments)
                content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
            except (Exception, SystemExit) as error:
                if isinstance(error, SystemExit) and type(error) is not SystemExit:  # Ctrl-C or SIGTERM
                    raise
                content = f"Error: {type(error).__name__}: {one_line(str(error), 300)}"
        shown = shorten(content, self.max_result_chars, count=True)
        return Message(role="tool", name=replace_surrogates(name), content=replace_surrogates(shown))


def _schema(function: Any, given: object) -> dict[str, Any]:
    if not callable(function):
        raise ValueError(f"The tool {given!r} is a {type(function).__name__}, which can't be called.")
    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # of classes that transformers does not export
        raise ValueError(
            f"The tool {getattr(function, '__name__', given)!r} has no schema: {one_line(str(error), 300)} Give each "
            "argument an annotation, and a line in a docstring in Google's style."
        ) from error
    return schema


def parse_calls(text: str) -> list[dict[str, Any] | str]:
    """Reads the calls of a turn.

    Args:
        text: The turn.

    Returns:
        ``name`` and ``arguments`` of each call; in place of one that can't be read, why.

    Example:
        >>> parse_calls('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
        [{'name': 'add', 'arguments': {'a': 1}}]
        >>> parse_calls('{"name": "add", "parameters": {"a": 1}}')
        [{'name': 'add', 'arguments': {'a': 1}}]
        >>> parse_calls("The sum is 3.")
        []
    """
    if _OPEN in text:
        return [_read(part.partition(_CLOSE)[0]) for part in text.split(_OPEN)[1:]]
    whole = text.strip().removeprefix("<|python_tag|>").removeprefix("[TOOL_CALLS]").strip()
    if not whole.startswith(("{", "[")):
        return []
    found: list[Any] = []
    decoder = json.JSONDecoder()
    while whole:
        try:
            value, end = decoder.raw_decode(whole)
        except (ValueError, RecursionError):
            return []  # it begins like JSON, and is none: an answer
        found += value if isinstance(value, list) else [value]
        whole = whole[end:].lstrip("; \n\t")
    if not all(isinstance(call, dict) and "name" in call and call.keys() & _ARGUMENTS for call in found):
        return []
    return [_checked(call) for call in found]


_ARGUMENTS = {"arguments", "parameters"}


def _read(text: str) -> dict[str, Any] | str:
    """The call between two markers."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the tool call is no JSON: {one_line(str(error), 200)}"
    return _checked(call)


def _checked(call: Any) -> dict[str, Any] | str:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return 'a tool call is {"name": ..., "arguments": {...}}'
    arguments: Any = next((call[key] for key in sorted(_ARGUMENTS) if key in call), {})
    if isinstance(arguments, str):  # OpenAI's API writes them as text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return f"the arguments of {call['name']} are no JSON: {one_line(str(error), 200)}"
    if not isinstance(arguments, dict):
        return f"the arguments of {call['name']} are no object with names"
    return {"name": call["name"], "arguments": arguments}
