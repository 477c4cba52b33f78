"""Answers of models are those of plain transformers; answers of files belong to their prompts."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.evaluation import Answer, generate_answers, names_file, read_answers
from lightning_rlhf.rollout import Sampling


def chat(text, system=None):
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]


def answers(model, prompts, sampling, **options):
    return [answer for _, answer in generate_answers(model, dict(enumerate(prompts)), sampling, **options)]


def test_greedy_answers_are_those_of_plain_transformers(tiny_model_dir, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    prompts = [chat("Say 1"), "Once upon", chat("你好", system="Be brief.")]
    got = answers(tiny_model_dir, prompts, Sampling(9, temperature=0.0), batch_size=2)
    for prompt, answer in zip(prompts, got, strict=True):
        text = prompt
        if not isinstance(prompt, str):
            text = tiny_tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tiny_tokenizer(text).input_ids
        start = len(ids)
        while len(ids) < start + 9 and ids[-1] != tiny_tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        ended = ids[-1] == tiny_tokenizer.eos_token_id
        assert answer == Answer(tiny_tokenizer.decode(ids[start:], skip_special_tokens=True), not ended)


def test_samples_follow_seed_and_number_alone(tiny_model_dir):
    prompts = [chat(f"Say {i}") for i in range(5)]
    sampling = Sampling(8, temperature=1.0)
    found = answers(tiny_model_dir, prompts, sampling)
    torch.rand(1)
    assert answers(tiny_model_dir, prompts, sampling, batch_size=1) == found
    first = next(generate_answers(tiny_model_dir, {0: prompts[0]}, sampling))
    assert torch.is_grad_enabled() and first == (0, found[0])
    [(number, alone)] = generate_answers(tiny_model_dir, {3: prompts[3]}, sampling)
    assert (number, alone) == (3, found[3])
    assert answers(tiny_model_dir, prompts, sampling, seed=1) != found


def test_answers_end_with_the_context_and_prompts_that_fill_it_are_told(tiny_model_dir, tiny_tokenizer):
    long = "one " * (next(n for n in range(200) if len(tiny_tokenizer("one " * n).input_ids) > 250) - 1)
    [answer] = answers(tiny_model_dir, [long], Sampling(10_000, temperature=0.0))
    assert answer.truncated and 0 < len(answer.text) < 12
    with pytest.raises(ValueError, match=r"'one one .* fills the context"):
        answers(tiny_model_dir, [long * 2], Sampling(5))


def test_a_model_without_a_chat_template_is_told(tiny_model_dir, tiny_tokenizer, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    tiny_tokenizer.chat_template = None
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        answers(tmp_path, [chat("Say 1")], Sampling(3))
    assert answers(tmp_path, [chat("Say 1")], Sampling(3), chat_template="chatml")
    with pytest.raises(ValueError, match="does not know the tokens of chat_template='llama3'"):
        answers(tmp_path, [chat("Say 1")], Sampling(3), chat_template="llama3")
    assert answers(tmp_path, ["Once"], Sampling(3))


# ------------------------------------------------------------------------------------------------- files


def file(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


PROMPTS = [chat("Say 1"), chat("你好", system="Be brief."), chat("Say 3")]


def texts(*args):
    return [answer.text for answer in read_answers(*args)]


def test_rows_with_prompts_answer_them_in_any_order(tmp_path):
    rows = [
        {"prompt": "Say 3", "completion": "three", "ended": False},
        {"messages": [*PROMPTS[1], {"role": "assistant", "content": "嗨"}]},
        {"instruction": "Say 1", "output": "one"},
        {"prompt": "Say 4", "completion": "nobody asked"},
    ]
    found = read_answers(file(tmp_path / "a.jsonl", *rows), PROMPTS)
    assert found == [Answer("one"), Answer("嗨"), Answer("three", truncated=True)]


def test_rows_without_prompts_are_in_order(tmp_path):
    rows = [{"row": i, "completion": f"answer {i}", "truncated": i == 1, "score": 0.5} for i in range(3)]
    found = read_answers(file(tmp_path / "predictions.jsonl", *rows), PROMPTS)
    assert found == [Answer("answer 0"), Answer("answer 1", truncated=True), Answer("answer 2")]
    with pytest.raises(ValueError, match="has 3 answers without prompts, but there are 2 prompts"):
        read_answers(tmp_path / "predictions.jsonl", PROMPTS[:2])


def test_what_sample_completions_writes_is_matched_by_the_last_turn_and_the_last_answer_counts(tmp_path):
    rows = [
        {"step": step, "prompt": text, "completion": f"{text} at {step}", "ended": True}
        for step in (0, 4)
        for text in ("Say 1", "你好", "Say 3")
    ]
    with pytest.warns(UserWarning, match="3 of 6 answers are left out"):
        assert texts(file(tmp_path / "samples.jsonl", *rows), PROMPTS) == ["Say 1 at 4", "你好 at 4", "Say 3 at 4"]


def test_a_last_turn_that_several_prompts_share_is_not_guessed(tmp_path):
    prompts = [chat("again", system="One."), chat("again", system="Two.")]
    with pytest.raises(ValueError, match="no answer to prompt 1 of 2: 'again'"):
        read_answers(file(tmp_path / "a.jsonl", {"prompt": "again", "completion": "x"}), prompts)


def test_texts_are_matched_as_texts(tmp_path):
    rows = [{"prompt": "b", "completion": "2"}, {"prompt": "a", "completion": "1"}]
    assert texts(file(tmp_path / "a.jsonl", *rows), ["a", "b"]) == ["1", "2"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "Say 1", "completion": "x"}], "no answer to prompt 2 of 3"),
        ([{"prompt": "Say 1", "completion": "x"}, {"prompt": "Say 3"}], r"a\.jsonl:2: the row has no answer"),
        ([{"prompt": "Say 1", "completion": "x"}, {"completion": "y"}], r"a\.jsonl:2: the row has no prompt"),
        ([{"prompt": "Say 1", "completion": 7}], r"a\.jsonl:1: the row has no answer"),
        ([{"messages": [{"role": "user", "content": "Say 1"}]}], r"a\.jsonl:1: the row has no answer"),
        ([{"prompt": "", "completion": "x"}], r"a\.jsonl:1: "),
    ],
    ids=str,
)
def test_what_is_missing_is_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_answers(file(tmp_path / "a.jsonl", *rows), PROMPTS)


def test_what_is_a_file(tmp_path, tiny_model_dir):
    assert names_file("not/there.jsonl") and names_file("a.jsonl.gz") and names_file(str(file(tmp_path / "x")))
    assert not names_file(str(tiny_model_dir)) and not names_file("org/name")
    (tmp_path / "model.json").mkdir()
    assert not names_file(str(tmp_path / "model.json"))
    with pytest.raises(FileNotFoundError):
        read_answers("not/there.jsonl", PROMPTS)
