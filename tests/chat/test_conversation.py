"""A conversation's turns, and its file, which training reads."""

import pytest

from lightning_rlhf.chat.client import Answer
from lightning_rlhf.chat.conversation import Conversation, HistoryError
from lightning_rlhf.data import InstructionDataModule


def asked(*questions, system=""):
    chat = Conversation(system)
    for i, question in enumerate(questions):
        chat.turns.append({"role": "user", "content": question})
        chat.answers = [Answer("a", 0, f"a{i}"), Answer("b", 0, f"b{i}")]
        chat.keep(chat.answers[0])
    return chat


def contents(chat):
    return [turn["content"] for turn in chat.turns]


def test_the_prompt_is_what_the_answers_answer():
    chat = asked("one", "two", system="Be brief.")
    assert [turn["content"] for turn in chat.prompt] == ["Be brief.", "one", "a0", "two"]
    chat.keep(chat.answers[1])
    assert contents(chat) == ["one", "a0", "two", "b1"]
    assert [turn["content"] for turn in chat.prompt] == ["Be brief.", "one", "a0", "two"]


def test_undo_takes_a_question_and_its_answer_back():
    chat = asked("one", "two")
    assert chat.ask_again() == "two" and contents(chat) == ["one", "a0"]
    assert chat.ask_again() == "one" and contents(chat) == []
    assert chat.ask_again() is None and not chat.undo()


def test_the_file_is_read_back_and_trained_on(tmp_path, tiny_tokenizer):
    chat = asked("Say 你好", "two", system="Be brief.")
    chat.save(tmp_path / "new" / "chat.jsonl")
    again = Conversation.load(tmp_path / "new" / "chat.jsonl")
    assert (again.system, again.turns) == (chat.system, chat.turns)
    data = InstructionDataModule(
        str(tmp_path / "new" / "chat.jsonl"), val_fraction=0.0, tokenizer=tiny_tokenizer, cache_dir=tmp_path
    )
    data.setup("fit")
    assert len(data.train_dataloader()) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", '{"messages": [{"role": "user", "content": "x"}]}', '{"messages": [3]}', "\0"]
)
def test_another_file_is_refused_by_name(text, tmp_path):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(HistoryError, match=r"x\.jsonl is not a"):
        Conversation.load(tmp_path / "x.jsonl")
