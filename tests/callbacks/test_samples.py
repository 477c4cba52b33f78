"""Answers are the model's, are shown where and when they should be, and change nothing."""

import io
import json
import random
import sys
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from grouping import grouped
from lightning.pytorch.loggers import CSVLogger, Logger
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaModel

from lightning_rlhf import LoRA, PPOModule, PromptDataModule, Sampling, SFTModule
from lightning_rlhf.callbacks import SampleCompletions
from lightning_rlhf.callbacks.samples import columns, markdown, table, wrap


def rows(folder, name="samples.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def steps(folder):
    return [row["step"] for row in rows(folder)]


class Rng(L.Callback):
    """Notes the global generators' states."""

    def __init__(self):
        self.states = []

    def _note(self, *_):
        self.states.append((torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()))

    on_train_start = on_validation_end = on_train_end = _note


def test_samples_do_not_disturb_training(fit, tmp_path, capsys):
    options = dict(lora=True, dropout=0.2, max_epochs=2)
    _, plain = fit(tmp_path / "a", **options)
    before, after = Rng(), Rng()
    samples = [SampleCompletions(temperature=1.0, max_new_tokens=5), SampleCompletions(["Say 1"], max_new_tokens=5)]
    _, module = fit(tmp_path / "b", [before, *samples, after], **options)
    assert before.states == after.states
    for (n, a), (_, b) in zip(plain.policy.named_parameters(), module.policy.named_parameters(), strict=True):
        assert torch.equal(a, b), n
    assert set(steps(tmp_path / "b")) == {0, 4, 8}
    assert rows(tmp_path / "b")[0].keys() == {"step", "prompt", "completion", "ended"}
    assert "Answers at step 0" in capsys.readouterr().out


def test_greedy_answers_are_those_of_plain_transformers(short_fit, tiny_model_dir, tmp_path):
    """Although the model's own config says to sample, and to search by beams."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts = ["Say 1", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]]
    chats = [[{"role": "user", "content": "Say 1"}], prompts[1]]
    want = []
    for chat in chats:
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
        start = len(ids)
        while len(ids) < start + 9 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        want.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=5, num_beams=2)
    module = SFTModule(model, tokenizer=tokenizer)
    short_fit([SampleCompletions(prompts, max_new_tokens=9)], module)
    assert [row["completion"] for row in rows(tmp_path)[:2]] == want
    assert [row["prompt"] for row in rows(tmp_path)[:2]] == ["Say 1", "你好"]


def test_sampling_is_keyed_by_seed_and_step_alone(short_fit, tiny_model_dir, tmp_path):
    def sample(seed):
        torch.rand(1)  # the global generator stands elsewhere each time
        optimizer = dict(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        callback = SampleCompletions(["Say 1"], temperature=1.0, max_new_tokens=12, seed=seed)
        short_fit([callback], SFTModule(tiny_model_dir, **grouped(**optimizer)))
        return [row["completion"] for row in rows(tmp_path)]

    one = sample(0)
    assert one == sample(0) and len(set(one)) == 2  # the same model draws anew at each step
    assert one != sample(2**40)


def test_a_prompt_that_fills_the_context_is_told_before_training(short_fit, tiny_model_dir):
    with pytest.raises(ValueError, match=r"'one one .* fills the model's context"):
        short_fit([SampleCompletions(["one " * 400], max_new_tokens=5)])


def test_validation_prompts_that_fill_the_context_are_left_out_and_counted(short_fit, tmp_path):
    long = [{"prompt": "one " * 400, "completion": "1"}, {"prompt": "two " * 400, "completion": "2"}]
    with pytest.warns(UserWarning, match=r"SampleCompletions: 2 of 4 prompts are left out. The first: the prompt 'one"):
        short_fit([SampleCompletions(max_new_tokens=5, num_prompts=4)], val=long, max_length=2048)
    assert [row["prompt"] for row in rows(tmp_path)[:3]] == ["Say 0", "Say 1", "Say 0"]


def test_an_answer_ends_with_the_context(short_fit, tiny_tokenizer, tmp_path):
    words = "one " * (next(n for n in range(200) if len(tiny_tokenizer("one " * n).input_ids) > 220) - 1)
    short_fit([SampleCompletions([words], max_new_tokens=10_000)])
    assert rows(tmp_path)[0]["completion"]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (dict(), [0, 2, 4]),
        (dict(on_start=False), [2, 4]),
        (dict(every_n_steps=3), [0, 3, 4]),
        (dict(every_n_steps=1, on_start=False), [1, 2, 3, 4]),
    ],
    ids=str,
)
def test_when_answers_are_shown(options, want, short_fit, tmp_path):
    callback = SampleCompletions(["Say 1"], max_new_tokens=2, **options)
    short_fit([callback], accumulate_grad_batches=2, val_check_interval=4)
    assert steps(tmp_path) == want


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every_n_steps"):
        SampleCompletions(every_n_steps=0)


# ------------------------------------------------------------------------------------------------- beside answers


def wanted_letters(prompts, completions, wanted):
    return [completion.count(letter) + 0.5 for completion, letter in zip(completions, wanted, strict=True)]


@pytest.fixture
def ppo_fit(tiny_model_dir, tmp_path):
    """Fits a small PPO module for two iterations."""

    def fit(callback, reward, rows, **data):
        module = PPOModule(
            tiny_model_dir,
            reward,
            **grouped(
                lora=LoRA(r=4),
                sampling=Sampling(max_new_tokens=6, temperature=0.7),
                optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
            ),
        )
        folder = dict(default_root_dir=tmp_path, logger=CSVLogger(tmp_path))
        quiet = dict(enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False)
        trainer = L.Trainer(accelerator="cpu", max_steps=2, callbacks=[callback], **folder, **quiet)
        trainer.fit(module, PromptDataModule(rows, batch_size=4, cache_dir=tmp_path / "cache", **data))
        return module

    return fit


def test_ppo_shows_scores_and_kl(ppo_fit, tiny_model_dir, tmp_path, capsys):
    prompts = [{"prompt": f"Say {i}", "wanted": "aeo"[i % 3]} for i in range(12)]
    module = ppo_fit(SampleCompletions(num_prompts=2, max_new_tokens=5), wanted_letters, prompts, val=prompts)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [0, 0, 2, 2]
    for row, letter in zip(found, "aeae", strict=True):
        assert row["score"] == row["completion"].count(letter) + 0.5
    assert [row["kl"] for row in found[:2]] == [pytest.approx(0, abs=1e-5)] * 2
    assert f"(score {found[-1]['score']:.3g}, kl {found[-1]['kl']:.3g})" in capsys.readouterr().out

    # by plain transformers: the merged policy and the model that it started from
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    policy = module.model_to_export.model.merge_and_unload()
    ids = module.tokenizer.apply_chat_template([{"role": "user", "content": "Say 0"}], add_generation_prompt=True)
    ids = torch.tensor([ids if isinstance(ids, list) else ids["input_ids"]])
    whole = policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    logprobs = []
    for model in (policy, start):
        with torch.no_grad():
            logits = model(whole).logits[0, ids.shape[1] - 1 : -1] / 0.7
        logprobs.append(logits.log_softmax(-1).gather(1, whole[0, ids.shape[1] :, None]).sum())
    assert abs(found[2]["kl"]) > 1e-3
    assert found[2]["kl"] == pytest.approx((logprobs[0] - logprobs[1]).item(), abs=1e-4)


def test_prompts_without_the_columns_of_a_reward_show_no_score(ppo_fit, tmp_path):
    prompts = [{"prompt": f"Say {i}", "wanted": "a"} for i in range(12)]
    (tmp_path / "own.jsonl").write_text('{"prompt": "Say 1", "wanted": "e"}\n')
    ppo_fit(SampleCompletions(["Say 1"]), wanted_letters, prompts)
    ppo_fit(SampleCompletions(str(tmp_path / "own.jsonl"), on_start=False), wanted_letters, prompts)
    found = rows(tmp_path, "samples.1.jsonl") + rows(tmp_path)
    assert [sorted(row.keys() & {"score", "kl"}) for row in found] == [["kl"], ["kl"], ["kl", "score"]]
    assert found[-1]["score"] == found[-1]["completion"].count("e") + 0.5


def test_texts_are_shown_as_the_data_has_them(ppo_fit, tmp_path):
    prompts = [{"prompt": f"Once upon {i}"} for i in range(12)]
    callback = SampleCompletions(num_prompts=1)
    module = ppo_fit(callback, lambda prompts, completions: [1.0] * len(completions), prompts, as_text=True)
    (ids,) = callback._prompts.prompts
    assert module.tokenizer.decode(ids) == rows(tmp_path)[0]["prompt"] == callback._prompts.messages[0]
    tokenizer = SimpleNamespace(tokenizer=module.tokenizer)
    own = SampleCompletions(["One day"])
    own.setup(SimpleNamespace(datamodule=SimpleNamespace(as_text=True), is_global_zero=False), tokenizer, "fit")
    assert module.tokenizer.decode(own._prompts.prompts[0]) == "One day"


# ------------------------------------------------------------------------------------------------- prompts


def encoded(prompts, tiny_tokenizer, datamodule=None):
    callback = SampleCompletions(prompts)
    trainer = SimpleNamespace(datamodule=datamodule, is_global_zero=False)
    callback.setup(trainer, SimpleNamespace(tokenizer=tiny_tokenizer), "fit")
    found = callback._prompts
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in found.messages]
    return [(text, tiny_tokenizer.decode(ids)) for text, ids in zip(texts, found.prompts, strict=True)]


def test_prompts_come_from_files(tiny_tokenizer, tmp_path):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    (tmp_path / "a.txt").write_text("Say 1\n\n你好\n", encoding="utf-8")
    lines = [{"prompt": "Say 1"}, {"prompt": turns[:1]}, {"messages": turns}, {"messages": [*turns, *turns[:1]]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [text for text, _ in encoded(str(tmp_path / "a.txt"), tiny_tokenizer)] == ["Say 1", "你好"]
    got = encoded(tmp_path / "b.jsonl", tiny_tokenizer)
    assert [text for text, _ in got] == ["Say 1", "Hello", "Hello", "Hello"]
    assert got[1] == got[2] and got[3][1].count("Hi<|im_end|>") == 1
    assert all(whole.endswith("<|im_start|>assistant\n") for _, whole in got)
    assert got[:1] == encoded(["Say 1"], tiny_tokenizer)


@pytest.mark.parametrize(
    "line", ['{"prompt": 3}', '{"question": "why?"}', '{"messages": []}', '{"messages": [{"role": "user"}]}',
             '{"messages": [{"role": "assistant", "content": "Hi"}]}', '{"prompt": ""}', '{"prompt": "Say', "[1]"]
)  # fmt: skip
def test_a_bad_prompt_is_named_with_file_and_line(line, tiny_tokenizer, tmp_path):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "Say 1"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:2: ") as error:
        encoded(str(tmp_path / "p.jsonl"), tiny_tokenizer)
    assert "skip" not in str(error.value)


def test_prompts_that_are_not_there_are_told(tiny_tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        encoded(str(tmp_path / "empty.txt"), tiny_tokenizer)
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        encoded(str(tmp_path / "none.txt"), tiny_tokenizer)
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        encoded(["Say 1", {"role": "user"}], tiny_tokenizer)
    with pytest.raises(ValueError, match="sample_prompts"):
        encoded(None, tiny_tokenizer)
    tiny_tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ValueError, match=r"prompts\[0\].*no users here"):
        encoded(["Say 1"], tiny_tokenizer)


def test_a_model_that_can_not_generate_is_refused():
    model = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                   num_attention_heads=1))  # fmt: skip
    module = SimpleNamespace(model_to_export=SimpleNamespace(transformer=model))
    with pytest.raises(ValueError, match="LlamaModel cannot generate"):
        SampleCompletions().on_fit_start(None, module)


# ------------------------------------------------------------------------------------------------- output


class Fake(Logger):
    """A logger that takes numbers; subclasses take text."""

    name = version = "fake"

    def __init__(self):
        self.got = []

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


class Board(Fake):
    @property
    def experiment(self):
        return SimpleNamespace(add_text=lambda tag, text, step: self.got.append((tag, text, step)))


class Text(Fake):
    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.got.append((key, columns, data, step))


class Table(Text):
    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.got.append(("table", key, columns, data, step))


def test_loggers_that_take_text_get_it(short_fit, tmp_path):
    loggers = [Board(), Text(), Table(), Fake(), CSVLogger(tmp_path)]
    short_fit([SampleCompletions(["Say | 1"], max_new_tokens=3)], logger=loggers, log_every_n_steps=1)
    board, text, both, fake, _ = loggers
    data = [[row["prompt"], row["completion"], str(row["ended"])] for row in rows(tmp_path)]
    header = ["prompt", "completion", "ended"]
    assert board.got == [("samples", markdown(header, [row]), step) for row, step in zip(data, (0, 4), strict=True)]
    assert text.got == [("samples", header, [row], step) for row, step in zip(data, (0, 4), strict=True)]
    assert both.got == [("table", *entry) for entry in text.got] and fake.got == []


def test_markdown_tables_keep_bars_and_line_breaks():
    assert markdown(["a", "b"], [["x|y", "1\n2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y | 1<br>2 |"]


def test_a_terminal_without_chinese_shows_what_it_can(short_fit, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    short_fit([SampleCompletions(["你好 Say 1"], max_new_tokens=2)])
    assert b"?? Say 1" in terminal.buffer.getvalue()


@pytest.mark.parametrize(
    ("text", "width"), [("abc", 3), ("你好", 4), ("a，b", 4), ("e\u0301", 1), ("", 0), ("ｱ", 1), ("Ａ", 2)]
)
def test_columns_of_a_terminal(text, width):
    assert columns(text) == width


def test_lines_break_at_blanks_and_between_chinese_characters():
    assert wrap("the quick brown fox", 10) == ["the quick", "brown fox"]
    assert wrap("今天天气很好", 5) == ["今天", "天气", "很好"]
    assert wrap("天气 weather很好", 8) == ["天气", "weather", "很好"]
    assert wrap("incomprehensibly", 6) == ["incomp", "rehens", "ibly"]
    assert wrap("one\n\ntwo\x1b[31m", 20) == ["one", "", "two [31m"]


@pytest.mark.parametrize("width", [40, 60, 100])
def test_tables_fit_the_terminal_and_columns_line_up(width):
    answers = ["the quick brown fox " * 9, "今天天气很好，我们去公园散步吧。" * 5, "", "a\nb"]
    prompts = ["Say 1", "你好，请问北京在哪里？" * 20, "x" * 50, "two\nlines"]
    lines = table(list(zip(prompts, answers, strict=True)), width).splitlines()
    assert all(columns(line) <= width for line in lines)
    bars = {columns(line[: min(i for i in (line.find(" | "), line.find("-+-")) if i >= 0)]) for line in lines}
    assert len(bars) == 1
    assert "".join(line.split(" | ")[1] for line in lines if " | " in line and "今" in line).startswith("今天天气很好")
