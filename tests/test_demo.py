"""The demo at smoke size: what it prints, what it leaves behind, and that its config file is the same run."""

import contextlib
import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import demo
from lightning_rlhf.cli import main
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.report import read_report

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "sft" / "demo.yaml"
MEASURED = r"loss (\d+\.\d{3})  perplexity \d+\.\d{3}  token accuracy \d\.\d{3}"


@pytest.fixture(scope="module")
def arguments(tiny_model_dir, tmp_path_factory):
    """What makes the demo small."""
    folder = tmp_path_factory.mktemp("rows")
    answers = ("fox", "dog", "the lazy dog")
    rows = [{"instruction": f"question {i}", "output": answers[i % 3]} for i in range(48)]
    pairs = [{"prompt": f"question {i}", "chosen": answers[i % 3], "rejected": answers[i % 3 - 1]} for i in range(48)]
    for name, lines in {"rows": rows, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = ["--steps", "2", "--dpo-steps", "2", "--reward-steps", "2", "--iterations", "2", "--new-tokens", "8"]
    data = ["--train", str(folder / "rows.jsonl"), "--pairs", str(folder / "pairs.jsonl")]
    return ["--model", str(tiny_model_dir), *sizes, *data, "--prompts", str(folder / "rows.jsonl")]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The whole demo, once: its folder, and what it printed."""
    output, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["demo", *arguments, "--output", str(output)])
    return output, printed.getvalue()


def test_each_stage_measures_before_and_after(whole):
    _, printed = whole
    [loss_before] = re.findall(rf"before  {MEASURED}", printed)
    [loss_after] = re.findall(rf"after   {MEASURED}", printed)
    assert loss_before != loss_after
    accuracies = re.findall(r"(?:before|after ) +loss \d\.\d{3}  accuracy (\d\.\d{3})$", printed, re.MULTILINE)
    assert len(accuracies) == 2
    assert "before  loss 0.693  accuracy 0.500  margin 0.000\n" in printed
    assert len(re.findall(r"after   loss 0\.\d{3}  accuracy \d\.\d{3}  margin -?\d\.\d{3}\n", printed)) == 1
    assert re.search(r"KL from where it started of -?\d+\.\d nats", printed)


def test_same_prompts_are_answered_before_and_after(whole):
    output, _ = whole
    for stage in ("sft", "dpo", "ppo"):
        lines = (output / stage / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        asked = [(row["step"], row["prompt"]) for row in map(json.loads, lines)]
        assert asked == [(step, prompt) for step in (0, 2) for prompt in demo.PROMPTS]


def shown(printed):
    """Of each prompt shown at the end: the prompt, and (answer, one sentence, reward model) before and after."""
    part = r"   {}  ((?:.*\n)+?) +\(one sentence (\S+), reward model (\S+)\)\n"
    found = re.findall(rf"\n   (question .*)\n{part.format('before')}{part.format('after ')}", printed)
    return [
        (question, (" ".join(one.split()), *scores[:2]), (" ".join(scores[2].split()), *scores[3:]))
        for question, one, *scores in found
    ]


def reloaded(folder, judge, question):
    """What a directory answers by plain transformers, and what the exported reward model says of it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    answer = out[0, ids["input_ids"].shape[1] :]
    text = " ".join(tokenizer.decode(answer, skip_special_tokens=True).split())
    with torch.no_grad():
        score = judge(out).logits.item() - judge.config.score_offset
    return text if answer[-1] == tokenizer.eos_token_id else f"{text} …", score


def test_answers_and_scores_shown_are_those_of_the_reloaded_exports(whole):
    output, printed = whole
    judge = load_reward_model(output / "reward" / "hf" / "last", needs_head=True)
    found = shown(printed)
    assert len({question for question, *_ in found}) == 3
    for question, *both in found:
        for stage, (text, sentence, score) in zip(("sft", "ppo"), both, strict=True):
            want, judged = reloaded(output / stage / "hf" / "last", judge, question)
            assert text == want
            assert float(score) == pytest.approx(judged, abs=6e-3)
            assert float(sentence) == demo.one_sentence([question], [want])[0]


def test_means_shown_are_of_all_held_out_prompts(whole):
    rows = re.findall(r"(one sentence|reward model) +(\S+) +(\S+) +(\S+) \(\S+\): ", whole[1])
    assert [name for name, *_ in rows] == ["one sentence", "reward model"]
    for _, before, after, rise in rows:
        assert float(after) - float(before) == pytest.approx(float(rise), abs=0.011)


def test_an_export_that_is_not_the_policy_is_refused(whole, arguments, tmp_path, monkeypatch):
    """As if the export held another adapter than the policy's."""
    shutil.copytree(whole[0], tmp_path / "out")
    left = demo._left
    monkeypatch.setattr(demo, "_left", lambda options, stage: left(options, "sft" if stage == "ppo" else stage))
    with pytest.raises(RuntimeError, match="is not the policy that was trained: logits differ by"):
        main(["demo", "ppo", *arguments, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([0, 0, 0, 1], [1, 1, 1, 1], r"\+0\.75 \(0\.25\): rose by 3\.0 standard errors"),
        ([1, 1, 1, 1], [0, 0, 0, 1], r"-0\.75 \(0\.25\): fell by 3\.0 standard errors"),
        ([0, 0, 0, 1], [0, 1, 0, 1], r"\+0\.25 \(0\.25\): no change that chance does not explain"),
        ([0.5, 0.5], [0.5, 0.5], r"\+0\.00 \(0\.00\): no change that chance does not explain"),
        ([0, 0], [1, 1], r"\+1\.00 \(0\.00\): rose for every prompt alike"),
    ],
)
def test_a_rise_is_told_by_its_standard_error(before, after, said):
    assert re.fullmatch(said, demo._rise(before, after))


def test_one_sentence():
    answers = [
        "A volcano is a mountain that erupts.",
        "Rain is water. It falls from clouds.",
        "A volcano is a mountain",
    ]
    assert demo.one_sentence([""] * 4, [*answers, "Lava."]) == [1, 0, 0, 0]


def test_report_has_all_stages(whole):
    output, printed = whole
    assert str(output / "report.html") in printed
    title, stages = read_report(output / "report.html")
    assert title == "RLHF of a small model"
    assert [stage.name for stage in stages] == ["SFT", "DPO", "Reward", "PPO"]
    _, dpo, reward, ppo = stages
    assert {"train/score", "train/kl"} <= ppo.curves.keys()
    assert len(ppo.curves["train/kl"].all()) == 2
    assert "val/accuracy" in reward.curves
    assert {"val/accuracy", "train/margin"} <= dpo.curves.keys()
    for stage in (dpo, ppo):
        assert [len(answers) for answers in stage.samples.values()] == [2] * len(demo.PROMPTS)
    assert all({"score", "kl"} <= answers[1].keys() for answers in ppo.samples.values())


def test_stages_hand_over_directories(whole):
    output, printed = whole
    [directory] = re.findall(r"AutoModelForCausalLM\.from_pretrained\('(.*)'\)", printed)
    assert Path(directory) == output / "ppo" / "hf" / "last"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question 1"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > ids.shape[1] and tokenizer.decode(answer[0])

    def head(stage):
        return load_file(output / stage / "hf" / "last" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]

    assert not torch.equal(head("sft"), head("ppo")) and not torch.equal(head("sft"), head("dpo"))
    adapter = json.loads((output / "reward" / "hf" / "last" / "adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]).resolve() == (output / "sft" / "hf" / "last").resolve()


def test_a_stage_alone_goes_on_from_those_before(whole, arguments, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "out")
    main(["demo", "ppo", *arguments, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "1. PPO" in printed and "Reward" not in printed
    _, stages = read_report(tmp_path / "out" / "report.html")
    assert [stage.name for stage in stages] == ["SFT", "DPO", "Reward", "PPO"]
    shown = [text.partition("Its greedy answers")[2].partition("Done in")[0] for text in (printed, whole[1])]
    assert shown[0] and shown[0] == shown[1], "it is not the run of before"


def test_what_can_not_be_done_is_told(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit, match="run `lightning-rlhf demo sft` first"):
        main(["demo", "reward", *arguments, "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["demo", "grpo"])
    assert "there is no stage grpo" in capsys.readouterr().err


def test_too_few_prompts_are_refused_before_training(whole, arguments, tmp_path):
    (tmp_path / "few.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(6)))
    shutil.copytree(whole[0], tmp_path / "out")
    (tmp_path / "out" / "ppo" / "samples.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"few\.jsonl has too few rows: [12] held out\. Give at least 50\."):
        main(["demo", "ppo", *arguments, "--prompts", str(tmp_path / "few.jsonl"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "ppo" / "samples.jsonl").exists()


def test_its_config_file_is_the_same_run(whole, arguments, tiny_model_dir, tmp_path):
    first, again = whole[0] / "sft", tmp_path / "again"
    rows = arguments[arguments.index("--train") + 1]
    main(
        [
            "fit", "--config", str(CONFIG), "--model.pretrained", str(tiny_model_dir), "--data.train", rows,
            "--trainer.max_steps", "2", "--trainer.default_root_dir", str(again),
            "--trainer.logger.init_args.save_dir", str(again),
        ]
    )  # fmt: skip
    want, got = (load_file(folder / "hf" / "last" / "model.safetensors") for folder in (first, again))
    assert want.keys() == got.keys()
    assert [name for name in want if not want[name].equal(got[name])] == []
    assert losses(again) == losses(first) and len(losses(first)) == 2
    assert (again / "samples.jsonl").read_text() == (first / "samples.jsonl").read_text()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    # what was put in above, and the demo's own default of it
    assert config["data"]["init_args"]["train"] == "bundled"
    assert config["trainer"]["max_steps"] == 16
    assert (
        config["trainer"]["default_root_dir"] == config["trainer"]["logger"]["init_args"]["save_dir"] == "runs/demo/sft"
    )


def losses(folder):
    with (folder / "log" / "version_0" / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
