"""Tools: which calls are read, what they answer, and which templates can show them."""

import json

import pytest
from transformers import AutoTokenizer

from lightning_rlhf.data.templates import CHAT_TEMPLATES
from lightning_rlhf.data.tokens import encode_prompt, encode_reply
from lightning_rlhf.rl import Rollout, Shaping
from lightning_rlhf.rl.environments import Calculator, ToolEnvironment
from lightning_rlhf.rl.environments.tools import parse_calls
from lightning_rlhf.rl.episodes import check_environment

#: What Qwen 2.5's template does with tools, in short.
QWEN = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def fail(why: str):
    """Fails.

    Args:
        why: The reason.
    """
    raise RuntimeError(why)


def leave():
    """Exits."""
    raise SystemExit(3)


def named(name, **arguments):
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', [named("add", a=1)]),
        ('<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b"}', [named("a"), named("b")]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [named("add", a=1)]),
        ('{"name": "add", "parameters": {"a": 1}}', [named("add", a=1)]),
        ('<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}', [named("a"), named("b")]),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', [named("add", a=1)]),
        ('[{"name": "add", "arguments": {"a": 1}}]', [named("add", a=1)]),
        ("The sum is 3.", []),
        ("[1, 2]", []),
        ('{"sum": 3}', []),
        ("{not json", []),
        ("", []),
    ],
)
def test_calls_are_read_from_text(text, calls):
    assert parse_calls(text) == calls


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<tool_call>add(1)</tool_call>", "the tool call is no JSON"),
        ("<tool_call>[1]</tool_call>", 'a tool call is {"name"'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "the arguments of add are no object"),
        ('<tool_call>{"name": "add", "arguments": "x"}</tool_call>', "the arguments of add are no JSON"),
        ("<tool_call>" + "[" * 100_000, "the tool call is no JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(text, why):
    [call] = parse_calls(text)
    assert why in call
    assert ToolEnvironment([add]).execute(call)["content"] == f"Error: {call}"


def test_results_and_errors_are_turns_of_the_tool():
    environment = ToolEnvironment([add, fail], max_turns=2, max_result_chars=40)
    environment.reset({"messages": []}, 0)
    text = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in (
        named("add", a=2, b=3), named("fail", why="rain " * 50), named("sub", a=1), named("add", c=1)))  # fmt: skip
    turn = environment.step([], text)
    assert not turn.done and turn.reward == 0 and [m["role"] for m in turn.messages] == ["tool"] * 4
    results = [m["content"] for m in turn.messages]
    assert results[0] == "5"
    assert results[1].startswith("Error: RuntimeError: rain") and "characters)" in results[1]
    assert results[2].startswith("Error: there is no tool 'sub'. There are")
    assert results[3].startswith("Error: TypeError: missing a required")
    assert environment.step([], text).done  # its last turn
    exits = ToolEnvironment([leave]).execute(named("leave"))
    assert exits["content"] == "Error: SystemExit: 3"
    environment.reset({"messages": []}, 0)
    assert environment.step([], "5").done


def echo(text: str) -> str:
    """Say it again.

    Args:
        text: What to say.
    """
    return text


@pytest.mark.parametrize(
    "call",
    [
        named("echo", text="a\ud83d"),
        named("a\ud83d"),
        {"name": "a\ud83d", "arguments": 1},
        named("echo", **{"\ud83d": "x"}),
    ],
    ids=["argument", "tool", "no arguments", "name of an argument"],
)
def test_half_a_surrogate_pair_in_a_call_does_not_end_the_run(tiny_tokenizer, call):
    tiny_tokenizer.chat_template = QWEN
    environment = ToolEnvironment([echo])
    environment.reset({"messages": []}, 0)
    turn = environment.step([], f"<tool_call>{json.dumps(call)}</tool_call>")
    assert encode_reply(tiny_tokenizer, turn.messages, 4, {"tools": environment.tools})


def no_schema(a):
    """Nothing of its argument."""


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], r"tools is \[\]. Give a list"),
        ("math.sqrt", r"tools is 'math.sqrt'. Give a list"),
        ([no_schema], r"The tool 'no_schema' has no schema: .* Give each argument an annotation"),
        ([add, add], r"Two tools have the name 'add'"),
        ([3], r"The tool 3 is a int, which can't be called"),
    ],
)
def test_tools_without_a_schema_are_refused(tools, message):
    with pytest.raises(ValueError, match=message) as error:
        ToolEnvironment(tools)
    assert "\n" not in str(error.value)


def test_a_missing_import_path_names_what_is_there():
    with pytest.raises(ImportError, match=r"did you mean evaluate\?"):
        ToolEnvironment(["lightning_rlhf.rl.environments.calculator.evaluat"])


def check(tokenizer, environment, has_reward=True, rollout=None, shaping=None):
    check_environment(environment, tokenizer, rollout or Rollout(2), shaping or Shaping(), has_reward)


def test_templates_that_cannot_show_tools_are_refused_in_a_line(tiny_tokenizer):
    tools = ToolEnvironment([add])
    with pytest.raises(ValueError, match=r"ToolEnvironment has tools, and the chat template can't show them") as error:
        check(tiny_tokenizer, tools)
    assert "\n" not in str(error.value)
    tiny_tokenizer.chat_template = QWEN
    check(tiny_tokenizer, tools)
    ids = encode_prompt(tiny_tokenizer, [{"role": "user", "content": "Hi"}], {"tools": tools.tools})
    assert '"description": "Adds two numbers."' in tiny_tokenizer.decode(ids)
    tiny_tokenizer.chat_template = QWEN.replace("'tool' %}{%", "'tool' %}{{ raise_exception('no role tool') }}{%", 1)
    with pytest.raises(ValueError, match=r"speaks as 'tool', and .*no role tool") as error:
        check(tiny_tokenizer, tools)
    tiny_tokenizer.chat_template = QWEN.replace("{{ m.content }}", "", 1)
    with pytest.raises(ValueError, match=r"speaks as 'tool', which the chat template does not show"):
        check(tiny_tokenizer, tools)


def test_what_contradicts_an_environment(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"max_total_tokens=10 is for all turns"):
        check(tiny_tokenizer, Calculator(), rollout=Rollout(2, max_total_tokens=10))
    with pytest.raises(ValueError, match=r"overlong_cache counts back from the length limit of one answer"):
        check(tiny_tokenizer, Calculator(), shaping=Shaping(overlong_cache=4))
    for name, value, rule in (("parallel", 0, "at least 1"), ("parallel", 2.5, "a whole number"),
                              ("deadline", 0.0, "above 0"), ("deadline", "5", "a number")):  # fmt: skip
        environment = Calculator()
        setattr(environment, name, value)
        with pytest.raises(ValueError, match=rf"Calculator\.{name} must be {rule}, got {value!r}"):
            check(tiny_tokenizer, environment)  # no thread would ever answer, or none would be waited for
    with pytest.raises(ValueError, match=r"environment is 'calculator'\. Give an object"):
        check(tiny_tokenizer, "calculator")
    tiny_tokenizer.chat_template = QWEN
    with pytest.raises(ValueError, match=r"ToolEnvironment gives no reward: set reward, or override its step"):
        check(tiny_tokenizer, ToolEnvironment([add]), has_reward=False)
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"Calculator needs a chat template"):
        check(tiny_tokenizer, Calculator())


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_all_presets_can_show_turns(stories_model_dir, template):
    from lightning_rlhf.data.templates import set_chat_template

    tokenizer = AutoTokenizer.from_pretrained(stories_model_dir)
    set_chat_template(tokenizer, template)
    check(tokenizer, Calculator())


@pytest.mark.parametrize("tools", [None, 5, [], "calculator", {"add": add}, add])
def test_what_is_no_list_of_tools_is_named(tools):
    with pytest.raises(ValueError, match=r"tools is .*\. Give a list of functions or of their import paths"):
        ToolEnvironment(tools)
