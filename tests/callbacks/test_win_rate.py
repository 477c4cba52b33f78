"""Win rates in a run: of the right answers, written once, monitored, and without a trace in the training."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from runs import load_script

from lightning_rlhf import (
    HFExport,
    InstructionDataModule,
    MeasureWinRate,
    PPOModule,
    PromptDataModule,
    Sampling,
    SFTModule,
)
from lightning_rlhf.cli import cli
from lightning_rlhf.evaluation import ChatJudge, JudgeError, generate_answers
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.models.saving import save_pretrained

HERE = Path(__file__).parent


def load(path):
    return load_script(path)


fake_judge = load(HERE.parent / "evaluation" / "fake_judge.py")
PROMPTS = ["Say 1", "Say 2", "Say 3"]


def rows(folder, name="win_rate.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]


def steps(folder, name="win_rate.jsonl"):
    return [row["step"] for row in rows(folder, name)]


def letters(prompts, completions):
    return [len(set(c)) for c in completions]


def answers(model, prompts=PROMPTS, most=6, **options):
    chats = {i: [{"role": "user", "content": text}] for i, text in enumerate(prompts)}
    found = generate_answers(model, chats, Sampling(most, temperature=options.pop("temperature", 0.0)), **options)
    return [answer.text for _, answer in found]


@pytest.fixture
def sft(tiny_model_dir, tmp_path):
    """``sft(callbacks, **options)``: four epochs of two steps; returns trainer and module."""

    def run(callbacks, folder=tmp_path, ckpt=None, lr=1e-2, validate=False, **options):
        settings = dict(
            accelerator="cpu",
            max_epochs=4,
            logger=False,
            enable_progress_bar=False,
            num_sanity_val_steps=1,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer = L.Trainer(callbacks=list(callbacks), **{**settings, **options})
        data = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 3)} for i in range(8)]
        module = SFTModule(tiny_model_dir, optimizer=lambda p: torch.optim.AdamW(p, lr=lr))
        module_data = InstructionDataModule(data, val=data[:4], batch_size=4, cache_dir=folder / "cache")
        (trainer.validate if validate else trainer.fit)(module, module_data, ckpt_path=ckpt)
        return trainer, module

    return run


def test_the_model_is_compared_with_what_it_was(sft, tiny_model_dir, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer, module = sft([MeasureWinRate(letters, prompts=PROMPTS, max_new_tokens=6)], logger=logger, max_epochs=2)
    assert steps(tmp_path) == [2] * 3 + [4] * 3
    start = answers(tiny_model_dir)
    assert [row["b"] for row in rows(tmp_path)] == start * 2
    save_pretrained(module.model_to_export.model, module.tokenizer, tmp_path / "trained")
    assert [row["a"] for row in rows(tmp_path)[3:]] == answers(tmp_path / "trained") != start
    scores = [
        (len(set(row["a"])) > len(set(row["b"]))) - (len(set(row["a"])) < len(set(row["b"]))) for row in rows(tmp_path)
    ]
    assert [row["outcome"] for row in rows(tmp_path)] == [{1: "a", 0: "tie", -1: "b"}[s] for s in scores]
    last = scores[3:]
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert found["val/win_rate"] == pytest.approx((last.count(1) + last.count(0) / 2) / 3)
    assert found["val/ties"] == pytest.approx(last.count(0) / 3)
    assert 0 <= found["val/win_rate_low"] <= found["val/win_rate"] <= found["val/win_rate_high"] <= 1
    assert "val/win_rate_low" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_a_model_that_does_not_learn_is_even(sft, tmp_path):
    trainer, _ = sft(
        [MeasureWinRate(letters, prompts=PROMPTS, temperature=1.0, max_new_tokens=6)], lr=0.0, max_epochs=1
    )
    assert trainer.callback_metrics["val/win_rate"] == 0.5 and trainer.callback_metrics["val/ties"] == 1
    assert len({row["a"] for row in rows(tmp_path)}) > 1


def test_the_baseline_may_be_a_file_or_another_model(sft, tiny_model_dir, tmp_path):
    lines = [{"prompt": text, "completion": f"answer to {text}"} for text in reversed(PROMPTS)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = dict(prompts=PROMPTS, max_new_tokens=6)
    sft([MeasureWinRate(letters, tmp_path / "answers.jsonl", **options)], tmp_path / "a", max_epochs=1)
    assert [row["b"] for row in rows(tmp_path / "a")] == [f"answer to {text}" for text in PROMPTS]
    sft(
        [MeasureWinRate(letters, str(tiny_model_dir), temperature=0.8, seed=4, **options)], tmp_path / "b", max_epochs=1
    )
    assert [row["b"] for row in rows(tmp_path / "b")] == answers(tiny_model_dir, temperature=0.8, seed=4)


def test_prompts_are_the_validation_rows(sft, tmp_path):
    sft([MeasureWinRate(letters, num_prompts=3, max_new_tokens=4)], max_epochs=1)
    assert [row["prompt"][0]["content"] for row in rows(tmp_path)] == ["Say 0", "Say 1", "Say 2"]


def test_training_is_not_disturbed(fit, tiny_model_dir, tmp_path):
    options = dict(lora=True, dropout=0.2, max_epochs=2)
    _, plain = fit(tmp_path / "a", **options)
    wins = [
        MeasureWinRate(letters, prompts=PROMPTS, temperature=1.0, max_new_tokens=5),
        MeasureWinRate(letters, str(tiny_model_dir), prompts=PROMPTS, max_new_tokens=5, every_n_steps=3, name="other"),
    ]
    _, module = fit(tmp_path / "b", wins, **options)
    for (n, a), (_, b) in zip(plain.policy.named_parameters(), module.policy.named_parameters(), strict=True):
        assert torch.equal(a, b), n


def test_every_few_steps_is_logged_whatever_the_loggers_interval(sft, tmp_path):
    logger = CSVLogger(tmp_path)
    callback = MeasureWinRate(letters, prompts=PROMPTS, max_new_tokens=4, every_n_steps=3)
    trainer, _ = sft([callback], logger=logger, log_every_n_steps=50)
    assert steps(tmp_path) == [3] * 3 + [6] * 3
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    place = header.split(",").index("val/win_rate")
    assert sum(bool(line.split(",")[place]) for line in lines) == 2
    assert "val/win_rate" in trainer.callback_metrics


def test_the_best_can_be_exported_by_it(sft, tmp_path):
    callbacks = [
        MeasureWinRate(letters, prompts=PROMPTS, max_new_tokens=6),
        HFExport(monitor="val/win_rate", mode="max"),
    ]
    sft(callbacks, max_epochs=2)
    found = rows(tmp_path)
    halves = [sum({"a": 1, "tie": 0.5, "b": 0}[row["outcome"]] for row in part) for part in (found[:3], found[3:])]
    best = max((0, 1), key=lambda i: halves[i])
    assert [row["a"] for row in found[3 * best : 3 * best + 3]] == answers(tmp_path / "hf" / "best")


def test_several_have_names(sft, tmp_path):
    longer = dict(prompts=PROMPTS, max_new_tokens=6, name="length")
    callbacks = [MeasureWinRate(letters, prompts=PROMPTS, max_new_tokens=4),
        MeasureWinRate(lambda prompts, completions: [len(c) for c in completions], **longer)]  # fmt: skip
    trainer, _ = sft(callbacks, max_epochs=1)
    names = {f"val/{prefix}{n}" for prefix in ("", "length/")
             for n in ("win_rate", "win_rate_low", "win_rate_high", "ties")}  # fmt: skip
    assert names <= trainer.callback_metrics.keys()
    assert steps(tmp_path) == steps(tmp_path, "win_rate_length.jsonl") == [2] * 3
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        sft([MeasureWinRate(letters), MeasureWinRate(letters)])


# ------------------------------------------------------------------------------------------------- resume


def test_a_resumed_run_repeats_and_loses_nothing(sft, tmp_path):
    def callbacks(folder):
        checkpoint = ModelCheckpoint(
            folder, filename="step{step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1
        )
        return [MeasureWinRate(letters, prompts=PROMPTS, max_new_tokens=6, temperature=0.5), checkpoint]

    whole = tmp_path / "whole"
    sft(callbacks(whole), whole, enable_checkpointing=True)
    assert steps(whole) == [2] * 3 + [4] * 3 + [6] * 3 + [8] * 3
    for step in (3, 4, 5):  # within an epoch, and at a validation
        cut = tmp_path / f"cut{step}"
        cut.mkdir()
        # it was killed after the third validation, while it wrote, and goes on from an earlier step
        lines = (whole / "win_rate.jsonl").read_text(encoding="utf-8").split("\n")
        (cut / "win_rate.jsonl").write_text("\n".join(lines[:9]) + '\n{"step": 8, "pro', encoding="utf-8")
        sft(callbacks(cut), cut, whole / f"step{step}.ckpt", enable_checkpointing=True)
        assert rows(cut) == rows(whole)


def test_a_resumed_run_needs_the_baseline_no_more(sft, tmp_path):
    lines = [{"prompt": text, "completion": f"answer to {text}"} for text in PROMPTS]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=2)
    callback = dict(judge=letters, against=file, prompts=PROMPTS, max_new_tokens=4)
    sft([MeasureWinRate(**callback), checkpoint], enable_checkpointing=True, max_epochs=1)
    file.unlink()
    sft([MeasureWinRate(**callback)], ckpt=tmp_path / "last.ckpt", max_epochs=2)
    assert [row["b"] for row in rows(tmp_path)] == [f"answer to {text}" for text in PROMPTS] * 2
    assert steps(tmp_path) == [2] * 3 + [4] * 3


def test_a_callback_that_came_later_takes_the_start_from_its_directory(sft, tiny_model_dir, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=2)
    sft([checkpoint], enable_checkpointing=True, max_epochs=1)
    sft([MeasureWinRate(letters, prompts=PROMPTS, max_new_tokens=6)], ckpt=tmp_path / "last.ckpt", max_epochs=2)
    assert [row["b"] for row in rows(tmp_path)] == answers(tiny_model_dir)


def test_a_new_run_leaves_the_file_of_the_old_one(sft, tmp_path):
    for _ in range(3):
        sft([MeasureWinRate(letters, prompts=PROMPTS, max_new_tokens=2)], max_epochs=1)
    assert [steps(tmp_path, f"win_rate{n}.jsonl") for n in ("", ".1", ".2")] == [[2] * 3] * 3


def test_validate_alone_compares_too(sft, tiny_model_dir, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=2)
    _, module = sft([checkpoint], enable_checkpointing=True, max_epochs=1)
    for _ in range(2):
        callback = MeasureWinRate(letters, prompts=PROMPTS, max_new_tokens=6)
        trainer, _ = sft([callback], ckpt=tmp_path / "last.ckpt", validate=True)
    save_pretrained(module.model_to_export.model, module.tokenizer, tmp_path / "trained")
    found = rows(tmp_path, "win_rate_validate.jsonl")
    assert [row["b"] for row in found] == answers(tiny_model_dir)
    assert [row["a"] for row in found] == answers(tmp_path / "trained")
    assert (tmp_path / "win_rate_validate.1.jsonl").read_text() == (tmp_path / "win_rate_validate.jsonl").read_text()
    assert "val/win_rate" in trainer.callback_metrics and not (tmp_path / "win_rate.jsonl").exists()


# ------------------------------------------------------------------------------------------------- judges


def test_a_reward_model_judges(sft, tiny_model_dir, tiny_tokenizer, tmp_path):
    torch.manual_seed(1)
    model = load_reward_model(tiny_model_dir, pad_token_id=tiny_tokenizer.pad_token_id)
    save_pretrained(model, tiny_tokenizer, tmp_path / "reward")
    sft([MeasureWinRate(str(tmp_path / "reward"), prompts=PROMPTS, max_new_tokens=6)], max_epochs=1)
    for row in rows(tmp_path):
        a, b = map(float, row["reasons"][0].split(" against "))
        assert row["outcome"] == ("a" if a > b else "b" if b > a else "tie")
    assert {row["outcome"] for row in rows(tmp_path)} - {"tie"}


def test_an_endpoint_judges_and_its_bias_cancels(sft, tmp_path):
    with fake_judge.FakeJudge(fake_judge.first) as judge:
        trainer, _ = sft(
            [MeasureWinRate(ChatJudge(judge.url, "fake"), prompts=PROMPTS, max_new_tokens=4)], max_epochs=1
        )
    assert trainer.callback_metrics["val/win_rate"] == 0.5
    assert rows(tmp_path)[0]["reasons"] == ["I like the beginning."] * 2 and len(judge.requests) == 6


def test_a_judge_that_fails_ends_a_run_at_first_and_later_is_told(sft, tmp_path):
    def from_request(first):
        return lambda n: (401, "no more", {}) if n >= first else None

    with fake_judge.FakeJudge(fail=from_request(0)) as judge, pytest.raises(JudgeError, match="no more"):
        sft([MeasureWinRate(ChatJudge(judge.url, "fake"), prompts=PROMPTS, max_new_tokens=2)], max_epochs=2)
    with (
        fake_judge.FakeJudge(fail=from_request(6)) as judge,
        pytest.warns(UserWarning, match="the comparison at step 4 failed"),
    ):
        trainer, _ = sft(
            [MeasureWinRate(ChatJudge(judge.url, "fake"), prompts=PROMPTS, max_new_tokens=2)], max_epochs=2
        )
    assert trainer.callback_metrics["val/win_rate"].isnan() and steps(tmp_path) == [2] * 3


def wanted_letters(prompts, completions, wanted):
    return [c.count(w) for c, w in zip(completions, wanted, strict=True)]


def test_ppo_with_a_judge_that_reads_columns(tiny_model_dir, tmp_path):
    prompts = [{"prompt": f"Say {i}", "wanted": "aeo"[i % 3]} for i in range(8)]
    module = PPOModule(
        tiny_model_dir,
        wanted_letters,
        **grouped(sampling=Sampling(max_new_tokens=5), epochs=1, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        val_check_interval=1,
        callbacks=[MeasureWinRate(wanted_letters, num_prompts=4, max_new_tokens=6)],
    )
    trainer.fit(module, PromptDataModule(prompts, val=prompts, batch_size=4, cache_dir=tmp_path / "cache"))
    found = rows(tmp_path)
    assert steps(tmp_path) == [1] * 4 + [2] * 4
    assert [row["b"] for row in found[:4]] == answers(tiny_model_dir, [f"Say {i}" for i in range(4)])
    for row, letter in zip(found, "aeoaaeoa", strict=True):
        a, b = (row[side].count(letter) for side in "ab")
        assert row["outcome"] == ("a" if a > b else "b" if b > a else "tie")
    save_pretrained(module.model_to_export.model, module.tokenizer, tmp_path / "trained")
    assert [row["a"] for row in found[4:]] == answers(tmp_path / "trained", [f"Say {i}" for i in range(4)])
    assert "val/score" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(judge="nothing"), "is not a directory in"),
        (dict(judge="http://127.0.0.1:1/v1"), "ChatJudge"),
        (dict(judge=wanted_letters), "needs the column wanted"),
        (dict(judge=letters, every_n_steps=0), "every_n_steps"),
        (dict(judge=letters, prompts=[]), "MeasureWinRate: there are no prompts"),
        (dict(judge=letters, prompts=["one " * 400]), "fills the model's context"),
    ],
    ids=["no judge", "no url", "no column", "never", "no prompt", "long prompt"],
)
def test_what_can_not_work_is_told_before_training(options, message, sft):
    with pytest.raises(ValueError, match=message):
        sft([MeasureWinRate(**{"prompts": PROMPTS, **options})])


def test_a_start_that_is_gone_is_told():
    callback = MeasureWinRate(letters)
    trainer = SimpleNamespace(global_step=3, state=SimpleNamespace(fn="fit"), strategy=None)
    with pytest.raises(ValueError, match="is not available"):
        callback._prepare(trainer, SimpleNamespace(pretrained=object(), tokenizer=None))


def test_a_config_names_judges(tiny_model_dir, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"""
model: {{class_path: SFTModule, init_args: {{pretrained: {tiny_model_dir}}}}}
data: {{class_path: InstructionDataModule}}
trainer:
  callbacks:
  - class_path: MeasureWinRate
    init_args:
      against: answers.jsonl
      judge:
        class_path: lightning_rlhf.evaluation.ChatJudge
        init_args:
          base_url: http://127.0.0.1:8000/v1
          model: qwen
          api_key_env: null
          ledger: judge.db
          budget: {{money: 5, prices: {{in: 0.15, out: 0.6}}}}
  - class_path: MeasureWinRate
    init_args: {{judge: lightning_rlhf.rewards.verifiers.length, every_n_steps: 5, name: length}}
"""
    )
    one, two = (c for c in cli(["--config", str(config)], run=False).trainer.callbacks if isinstance(c, MeasureWinRate))
    assert isinstance(one.judge, ChatJudge) and one.judge.endpoint.model == "qwen" and one.against == "answers.jsonl"
    assert one.judge.ledger == "judge.db" and one.judge.budget.prices == {"in": 0.15, "out": 0.6}
    assert two.judge == "lightning_rlhf.rewards.verifiers.length" or callable(two.judge)
    assert one.state_key != two.state_key


# ------------------------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def one_process(start, tiny_model_dir, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("one")
    start(HERE / "run_win_rate.py", tiny_model_dir, folder, {"devices": 1})
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_find_what_one_finds(strategy, one_process, start, tiny_model_dir, tmp_path):
    start(HERE / "run_win_rate.py", tiny_model_dir, tmp_path, {"strategy": strategy})
    one = json.loads((one_process / "rank0.json").read_text())
    for rank in range(2):
        values, baseline = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert values == pytest.approx(one[0]) and baseline == one[1]
    assert len(one[0]) == 6 and len(rows(one_process)) == 10
    for name in ("win_rate.jsonl", "win_rate_other.jsonl"):
        assert rows(tmp_path, name) == rows(one_process, name)
