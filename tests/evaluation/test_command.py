"""``lightning-rlhf win-rate``, offline, from models and from files."""

import json
from pathlib import Path

import pytest
import torch
from runs import load_script
from transformers import AutoModelForCausalLM

from lightning_rlhf.cli import main

fake_judge = load_script(Path(__file__).with_name("fake_judge.py"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with prompts and answers."""
    monkeypatch.chdir(tmp_path)
    prompts = [{"prompt": f"Say {i}", "wanted": "aeo"[i % 3]} for i in range(9)]
    for name, rows in {
        "prompts": prompts,
        "short": [{**row, "completion": "e", "ended": True} for row in prompts],
        "long": [{**row, "completion": "ea long"[: 1 + i], "ended": True} for i, row in enumerate(prompts)],
    }.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(*args):
    main(["win-rate", *map(str, args)])


def rows(name="win_rate.jsonl"):
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_two_files_before_a_biased_judge(folder, capsys):
    with fake_judge.FakeJudge(fake_judge.first) as judge:
        run("long.jsonl", "short.jsonl", "--judge", judge.url, "--judge-model", "fake")
    out = capsys.readouterr().out
    assert "win rate of A       50.0%, 95 % interval" in out and "first answer wins   100.0%" in out
    assert "orders agree        0.0%" in out and "All pairs with their verdicts: win_rate.jsonl" in out
    assert [row["outcome"] for row in rows()] == ["tie"] * 9
    assert {(row["a_first"], row["b_first"]) for row in rows()} == {("a", "b")}


def test_two_files_before_one_that_prefers_length(folder, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with fake_judge.FakeJudge(fake_judge.longer) as judge:
        options = ["--judge-model", "fake", "--judge-key-env", "JUDGE_KEY", "--limit", 5, "--out", "out/pairs.jsonl"]
        run("long.jsonl", "short.jsonl", "--prompts", "prompts.jsonl", "--judge", judge.url, *options)
    out, err = capsys.readouterr()
    assert "win rate of A       90.0%" in out and "the longer answer won 4 of 4" in out
    assert "80.0%    20.0%     0.0%" in out and "judging  5/5" in err
    assert rows("out/pairs.jsonl")[4] == {
        "prompt": [{"role": "user", "content": "Say 4"}],
        "a": "ea lo",
        "b": "e",
        "outcome": "a",
        "a_first": "a",
        "b_first": "a",
        "reasons": ["Length decides.", "Length decides."],
    }
    everything = out + err + "".join(p.read_text() for p in folder.rglob("*.jsonl"))
    assert "sk-very-secret" not in everything and judge.requests[0][0]["Authorization"] == "Bearer sk-very-secret"


def wanted_letters(prompts, completions, wanted):
    return [c.count(letter) for c, letter in zip(completions, wanted, strict=True)]


def test_two_models_before_a_reward_model_and_their_answers_once_more(folder, tiny_model_dir, reward_dir, capsys):
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1 * torch.randn_like(p)
    other.save_pretrained("other")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model_dir / name).exists():
            Path("other", name).write_bytes((tiny_model_dir / name).read_bytes())
    options = ["--max-new-tokens", 6, "--temperature", 1, "--batch-size", 4]
    run("other", tiny_model_dir, "--prompts", "prompts.jsonl", "--judge", reward_dir, *options)
    out, err = capsys.readouterr()
    assert "first answer wins   50.0%" in out and "orders agree        100.0%" in out
    assert "answers of A  9/9" in err and "answers of B  9/9" in err
    found = rows()
    assert {row["outcome"] for row in found} >= {"a", "b"}
    kept = rows("win_rate.a.jsonl")
    assert [row["completion"] for row in kept] == [row["a"] for row in found] and kept[4]["wanted"] == "e"

    # what is kept can be judged again, by another judge
    run("win_rate.a.jsonl", "win_rate.b.jsonl", "--judge", reward_dir, "--out", "again.jsonl")
    assert rows("again.jsonl") == found
    Path("mine.py").write_text("def wanted_letters(prompts, completions, wanted):\n    return [len(c) for c in wanted]")
    run("win_rate.a.jsonl", "win_rate.b.jsonl", "--judge", "mine.wanted_letters", "--out", "again.jsonl")
    assert {row["outcome"] for row in rows("again.jsonl")} == {"tie"}


def test_a_model_against_itself_is_even(folder, tiny_model_dir, reward_dir, capsys):
    options = ["--max-new-tokens", 6, "--temperature", 1, "--seed", 3]
    run(tiny_model_dir, tiny_model_dir, "--prompts", "prompts.jsonl", "--judge", reward_dir, *options)
    assert "win rate of A       50.0%" in capsys.readouterr().out
    assert all(row["a"] == row["b"] for row in rows()) and len({row["a"] for row in rows()}) > 1


def test_prompts_as_texts_and_with_a_system_prompt(folder, tiny_model_dir):
    options = ["--prompts", "prompts.jsonl", "--limit", 2, "--max-new-tokens", 2, "--judge"]
    options.append("lightning_rlhf.rewards.verifiers.length")
    run(tiny_model_dir, "long.jsonl", "--as-text", *options)
    assert [(row["prompt"], row["b"]) for row in rows()] == [("Say 0", "e"), ("Say 1", "ea")]
    run(tiny_model_dir, "long.jsonl", "--system", "Be brief.", *options)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 1"}]
    assert (rows()[1]["prompt"], rows()[1]["b"]) == (chat, "ea")
    run(tiny_model_dir, "win_rate.a.jsonl", "--system", "Be brief.", "--out", "again.jsonl", *options)
    assert [row["a"] for row in rows("again.jsonl")] == [row["b"] for row in rows("again.jsonl")]


def test_verdicts_that_can_not_be_read_are_counted_and_shown(folder, capsys):
    with fake_judge.FakeJudge(lambda prompt, a, b: "Hm." if "7" in prompt else "Verdict: tie") as judge:
        run("long.jsonl", "short.jsonl", "--judge", judge.url, "--judge-model", "fake")
    out = capsys.readouterr().out
    assert "without a verdict   1 pairs, which are not counted. First: unreadable: Hm." in out
    assert [row["outcome"] for row in rows()].count(None) == 1
    with fake_judge.FakeJudge(lambda prompt, a, b: "Hm.") as judge, pytest.raises(SystemExit, match="no pair has a"):
        run("long.jsonl", "short.jsonl", "--judge", judge.url, "--judge-model", "fake")


def test_a_judge_that_breaks_off_leaves_what_was_judged(folder):
    for name in "xy":  # equal questions would be asked once
        many = "".join(json.dumps({"prompt": f"Say {i}", "completion": name}) + "\n" for i in range(40))
        Path(f"{name}.jsonl").write_text(many)
    end = pytest.raises(SystemExit, match=r"win-rate: The judge .* account is empty")
    with fake_judge.FakeJudge(fail=lambda n: (401, "the account is empty", {}) if n >= 70 else None) as judge, end:
        run("x.jsonl", "y.jsonl", "--judge", judge.url, "--judge-model", "fake")
    assert len(rows()) == 32


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("long.jsonl", "none.jsonl", "--judge", "builtins.len"), "reward function len must have the arguments"),
        (("long.jsonl", "none.jsonl", "--judge", "{length}"), "none.jsonl: no such file"),
        (("org/a", "org/b", "--judge", "{length}"), "both A and B are models"),
        (("long.jsonl", "short.jsonl", "--judge", "http://127.0.0.1:1/v1"), "--judge-model"),
        (("long.jsonl", "short.jsonl", "--judge", "nothing"), "is not a directory in"),
        (("long.jsonl", "short.jsonl", "--judge", "{length}", "--out", "short.jsonl"), "would overwrite"),
        (("long.jsonl", "prompts.jsonl", "--judge", "{length}"), r"prompts\.jsonl:1: the row has no answer"),
        (("long.jsonl", "short.jsonl", "--judge", "{length}", "--limit", "0"), "--limit must be at least 1"),
        (("long.jsonl", "nowhere", "--judge", "{length}"), "nowhere"),
    ],
    ids=str,
)
def test_what_can_not_work_is_told_without_a_traceback(args, message, folder):
    with pytest.raises(SystemExit, match=message):
        run(*(arg.format(length="lightning_rlhf.rewards.verifiers.length") for arg in args))
