"""A chat with a real server: answers stream, several models answer one question, commands do what they say."""

import json
import subprocess

import httpx
import pytest
from forked import python

from lightning_rlhf.chat.client import ChatError, Client
from lightning_rlhf.chat.terminal import Terminal
from lightning_rlhf.data import PreferenceDataModule


class Chat:
    """A terminal whose lines are given and whose text is collected."""

    def __init__(self, url, models, **settings):
        self.written = []
        settings.setdefault("sampling", {"temperature": 0.7, "max_completion_tokens": 12})
        self.terminal = Terminal(Client(url), models, write=self.written.append, **settings)

    def __call__(self, *lines):
        """Types lines, and returns what was written."""
        self.written.clear()
        left = iter(lines)

        def read():
            line = next(left, None)
            if line is None:
                raise EOFError
            if isinstance(line, BaseException):
                raise line
            return line

        self.terminal.run(read)
        return "".join(self.written)


@pytest.fixture
def votes_folder(server):
    return server.votes


@pytest.fixture
def chat(server):
    return Chat(server.url, ["sft", "ppo"])


def test_models_answer_side_by_side_with_the_rewards_scores(chat, server):
    text = chat("Tell a story")
    sft, ppo = chat.terminal.conversation.answers
    assert f"sft: {sft.content}\n" in text and f"ppo: {ppo.content}\n" in text
    assert sft.content != ppo.content and sft.seed == ppo.seed
    # each is what the server says to the same question
    for answer in (sft, ppo):
        body = {"model": answer.model, "messages": [{"role": "user", "content": "Tell a story"}], "seed": answer.seed}
        body |= {"reward": True, **chat.terminal.sampling}
        (found,) = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"]
        assert (found["message"]["content"], found["finish_reason"]) == (answer.content, answer.finish_reason)
        assert found["reward"] == pytest.approx(answer.reward, abs=1e-4)
        assert f"(reward {answer.reward:.2f}" in text


def test_the_chat_goes_on_with_what_was_said(chat):
    chat("One", "/system Be brief.", "Two")
    roles = [turn["role"] for turn in chat.terminal.conversation.turns]
    assert roles == ["user", "assistant"] * 2
    assert chat.terminal.conversation.prompt[0] == {"role": "system", "content": "Be brief."}
    assert chat.terminal.conversation.turns[-1]["content"] == chat.terminal.conversation.answers[0].content


def test_better_keeps_that_answer_and_is_a_preference_to_train_on(chat, votes_folder, tiny_tokenizer, tmp_path):
    text = chat("Tell a story", "/better ppo")
    sft, ppo = chat.terminal.conversation.answers
    assert chat.terminal.conversation.turns[-1]["content"] == ppo.content and "1 preferences" in text
    row = json.loads((votes_folder / "preferences.jsonl").read_text().splitlines()[-1])
    assert row["prompt"] == [{"role": "user", "content": "Tell a story"}]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == (ppo.content, sft.content)
    data = PreferenceDataModule(
        str(votes_folder / "preferences.jsonl"), val_fraction=0.0, tokenizer=tiny_tokenizer, cache_dir=tmp_path
    )
    data.setup("fit")
    assert len(data.train_dataloader()) >= 1


def test_a_vote_is_on_what_the_answers_were_made_of(chat, votes_folder):
    """Whatever was set since, and on the sides on which they were shown."""
    chat("/system Be A.", "/temperature 0.5", "Tell", "/system Be B.", "/temperature 1.5", "/better ppo")
    row = json.loads((votes_folder / "votes.jsonl").read_text().splitlines()[-1])
    assert [turn["content"] for turn in row["messages"]] == ["Be A.", "Tell"]
    assert row["sampling"]["temperature"] == 0.5
    assert ([answer["model"] for answer in row["answers"]], row["vote"]) == (["sft", "ppo"], "right")


def test_a_question_that_fails_leaves_the_chat_as_it_was(chat, monkeypatch):
    chat("One", "Two")
    before = [*chat.terminal.conversation.turns], chat.terminal.conversation.answers

    def busy(*args):
        raise ChatError("Try again later.")

    monkeypatch.setattr(chat.terminal.client, "stream", busy)
    for line in ("/regen", "Three"):
        assert "Try again later." in chat(line)
        assert (chat.terminal.conversation.turns, chat.terminal.conversation.answers) == before


def test_thumbs_are_saved(chat, votes_folder):
    assert "1 single answers" in chat("Tell a story", "/good ppo")
    chat("/bad")
    good, bad = (json.loads(line) for line in (votes_folder / "unpaired.jsonl").read_text().splitlines()[-2:])
    sft, ppo = chat.terminal.conversation.answers
    assert (good["label"], good["completion"][0]["content"]) == (True, ppo.content)
    assert (bad["label"], bad["completion"][0]["content"]) == (False, sft.content)


def test_commands_change_what_is_asked(chat):
    assert "asking base" in chat("/model base")
    first = chat("/temperature 0", "Hello")
    assert chat("/regen") == first  # greedy
    assert chat.terminal.conversation.turns[0]["content"] == "Hello"
    chat("/undo")
    assert chat.terminal.conversation.turns == []
    chat("/temperature 1.5", "Hello")
    assert chat("/regen") != first


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["/modle base"], "no command /modle; did you mean model?"),
        (["/model bse"], "no model bse; did you mean base?"),
        (["/temperature hot"], "needs a number"),
        (["/temperature -1"], "from 0 to 100"),
        (["/regen"], "no question"),
        (["/undo"], "nothing to take back"),
        (["/good"], "no answer yet"),
        (["/save"], "needs a file"),
        (["/model base", "Hi", "/better base"], "needs two answers"),
        (["Hi", "/better"], "sft or ppo"),
        (["Hi", "/good base"], "base has not answered"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(chat, lines, words):
    assert words in chat(*lines)
    assert "sft: " in chat("/model sft", "Still there?")


def test_ctrl_c_stops_an_answer_and_not_the_chat(server):
    chat = Chat(server.url, ["base"], sampling={"max_completion_tokens": 400, "temperature": 2.0})
    pieces = []

    def interrupt(text):
        pieces.append(text)
        if len(pieces) == 8:
            raise KeyboardInterrupt

    chat.terminal.write = interrupt
    chat("Tell a long story")
    assert chat.terminal.conversation.answers[0].finish_reason == "stopped"
    assert "(stopped)" in "".join(pieces)
    pieces[:] = [""] * 9
    chat(KeyboardInterrupt(), "And then?")
    assert len(chat.terminal.conversation.turns) == 4


def test_the_history_is_kept_and_gone_on_with(server, tmp_path):
    history = tmp_path / "chat.jsonl"
    Chat(server.url, ["base"], history=history)("One")
    lines = "Two\n/quit\n"
    command = [python(), "-m", "lightning_rlhf", "chat", server.url, "--history", str(history), "--models", "sft"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "5"], input=lines, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("> One\n") and "sft: " in done.stdout
    kept = json.loads(history.read_text())["messages"]
    assert [turn["content"] for turn in kept if turn["role"] == "user"] == ["One", "Two"]


@pytest.mark.slow
def test_a_run_is_served_for_the_chat_alone(run_dir, tmp_path):
    command = [python(), "-m", "lightning_rlhf", "chat", str(run_dir), "--votes", str(tmp_path / "votes")]
    done = subprocess.run(
        [*command, "--models", "sft", "ppo", "--max-new-tokens", "5"],
        input="Hello\n/better sft\n",
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert "sft: " in done.stdout and "ppo: " in done.stdout and "(reward " in done.stdout
    assert (tmp_path / "votes" / "votes.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://127.0.0.1:9"], "cannot be reached"),
        (["ftp://x"], "no directory"),
        (["nowhere"], "nowhere is not a directory in"),
    ],
)
def test_a_wrong_run_is_one_line(arguments, words):
    command = [python(), "-m", "lightning_rlhf", "chat", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode and words in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_error_of_the_server_is_its_message(server):
    client = Client(server.url)
    with pytest.raises(ChatError, match="temperature"):
        list(client.stream(_answer(), [{"role": "user", "content": "x"}], {"temperature": -1}))


def _answer():
    from lightning_rlhf.chat.client import Answer

    return Answer("base", 0)
