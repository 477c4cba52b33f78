"""Generators: a model that runs here, its ledger, and turns that it continues."""

import pytest
from transformers import AutoTokenizer

from lightning_rlhf.collection.generators import EndpointGenerator, EngineGenerator, unfinished
from lightning_rlhf.collection.prompts import CONTINUE
from lightning_rlhf.data.templates import set_chat_template
from lightning_rlhf.endpoint import ChatRequest, Ledger

QUESTIONS = [
    ChatRequest([{"role": "user", "content": text}], sample=i, temperature=0.8, top_p=0.9, max_tokens=8 + 4 * (i % 2))
    for i, text in enumerate(["Once upon a time", "Lily had a red ball.", "Tom saw a big dog", "Once upon a time"])
]


def engine(folder, **options) -> EngineGenerator:
    return EngineGenerator(str(folder), chat_template="plain", device="cpu", **options)


def test_replies_depend_on_the_request_alone_and_come_from_the_ledger_again(stories_model_dir, tmp_path):
    arrived = []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = engine(stories_model_dir).generate(QUESTIONS, ledger, None, lambda i, reply: arrived.append(i))
        totals = ledger.totals()
        assert sorted(arrived) == [0, 1, 2, 3] and (totals.requests, totals.sent, totals.paid.money) == (4, 0, 0)
        again = engine(stories_model_dir)
        assert again.generate(QUESTIONS, ledger) == found and "_loaded" not in vars(again)  # nothing was generated
    assert found[0].text != found[3].text  # another sample of the same question
    for i, reply in enumerate(found):
        assert reply.text and reply.key == QUESTIONS[i].key(str(stories_model_dir))
        assert reply.usage.completion <= 8 + 4 * (i % 2) and reply.usage.prompt > 0
    assert [reply.text for reply in engine(stories_model_dir, batch_size=1).generate(QUESTIONS)] == [
        reply.text for reply in found
    ]


def test_a_batch_of_which_a_part_is_known_keeps_that_part(stories_model_dir):
    with Ledger() as ledger:
        found = engine(stories_model_dir).generate(QUESTIONS, ledger)
        with Ledger() as half:
            half.record(QUESTIONS[0], str(stories_model_dir), found[0], 0.0)
            assert engine(stories_model_dir).generate(QUESTIONS, half) == found
            assert half.totals().requests == 4


def test_a_prompt_that_fills_the_context_gets_no_reply(stories_model_dir):
    long = ChatRequest([{"role": "user", "content": "a big dog " * 500}], temperature=0.8, top_p=0.9, max_tokens=8)
    full, other = engine(stories_model_dir).generate([long, QUESTIONS[0]])
    assert full.text is None and full.kind == "too long" and "fills the model's context" in full.problem
    assert other.text == engine(stories_model_dir).generate(QUESTIONS[:1])[0].text


@pytest.mark.parametrize("preset", ["chatml", "alpaca", "llama3", "vicuna", "zephyr", "plain"])
def test_an_unfinished_turn_is_rendered_up_to_its_text(stories_model_dir, preset):
    tokenizer = AutoTokenizer.from_pretrained(stories_model_dir)
    set_chat_template(tokenizer, preset)
    turns = [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "1. One\n2."}]
    text = tokenizer.decode(unfinished(tokenizer, turns))
    whole = tokenizer.decode(
        tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
    )
    assert whole.startswith(text) and text.rstrip().endswith("2.") and "ue000" not in text
    opened = tokenizer.decode(unfinished(tokenizer, [{"role": "user", "content": ""}]))
    assert whole.startswith(opened.rstrip(" ")) and "Sing" not in opened


def test_a_turn_is_continued(stories_model_dir):
    request = ChatRequest(
        [{"role": "user", "content": "Tell a story. "}, {"role": "assistant", "content": "Once upon a time there was"}],
        temperature=0.0, max_tokens=6, extra=CONTINUE,
    )  # fmt: skip
    [reply] = engine(stories_model_dir).generate([request])
    assert reply.text.strip() and not reply.text.strip().startswith("Once")


def test_a_stop_text_ends_a_reply(stories_model_dir):
    request = ChatRequest(
        [{"role": "user", "content": "Once upon a time"}], temperature=0.0, max_tokens=60, stop=(".",)
    )
    [reply] = engine(stories_model_dir).generate([request])
    assert reply.finish_reason == "stop" and "." not in reply.text


def test_settings_that_are_wrong_are_named(stories_model_dir):
    with pytest.raises(ValueError, match="EngineGenerator: batch_size must be at least 1; got 0"):
        EngineGenerator("x", batch_size=0)
    with pytest.raises(ValueError, match="does not know the tokens of chat_template='chatml'"):
        EngineGenerator(str(stories_model_dir), device="cpu", chat_template="chatml").generate(QUESTIONS)
    with pytest.raises(ValueError, match="base_url"):
        EndpointGenerator("localhost", "m")
    assert EndpointGenerator("http://127.0.0.1:1/v1", "m").name == "m"
