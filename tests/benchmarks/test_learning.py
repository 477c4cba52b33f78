"""The PPO studies at smoke size: what they report, where it goes, and the picture. Nothing learned is asserted."""

import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TALKS = [f"Tell me of fox {i}." for i in range(30)]


@pytest.fixture
def learning(load_benchmark, tmp_path, tiny_model_dir, monkeypatch):
    """The studies with a tiny model for both real ones, and results in a folder of the test's."""
    module = load_benchmark("learning")
    monkeypatch.setattr(module, "STORIES", tiny_model_dir)
    monkeypatch.setattr(module, "obtain", lambda name: tiny_model_dir)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results" / "learning.jsonl")
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    monkeypatch.setattr(module, "OPENINGS", module.OPENINGS[:3])
    monkeypatch.setattr(module, "happiness", lambda prompts, completions: [float(len(set(c))) for c in completions])
    pairs = [
        {"prompt": f"{i}. {module.OPENINGS[i % 3]}", "chosen": "Hello, how are you?", "rejected": "The fox jumps."}
        for i in range(10)
    ]
    monkeypatch.setattr(module, "_happier", lambda seed, pairs_wanted=0, **_: pairs)
    (tmp_path / "data").mkdir()
    rows = [{"prompt": [{"role": "user", "content": t}], "chosen": "Paris.", "rejected": "The dog"} for t in TALKS]
    (tmp_path / "data" / "preference.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in TALKS))
    return module


@pytest.fixture
def made(learning, monkeypatch):
    """The PPO modules of a study."""
    found = []

    class Kept(learning.PPOModule):
        def on_train_start(self):
            super().on_train_start()
            found.append(self)

    monkeypatch.setattr(learning, "PPOModule", Kept)
    return found


def test_stories(learning, made):
    found = learning.ppo_stories260k(0, max_steps=2)
    assert found["steps"] == 2
    assert found["train kl first"] == pytest.approx(0, abs=1e-4), "the first samples are not the starting policy's"
    assert found["train kl last 5"] != 0
    assert {"score before", "score after", "length before", "length after", "train length_mean last 5"} <= found.keys()
    (module,) = made
    assert (module.actors.critic is None, module.kl_coef, module.samples_per_prompt) == (False, 0.03, 2)


def test_validation_draws_by_the_same_keys(learning, monkeypatch):
    """With a rate of zero nothing changes, so that neither does what validation measures."""
    adamw = learning.torch.optim.AdamW

    def still(params, lr, **settings):
        return adamw([{**group, "lr": 0.0} for group in params], lr=0.0, **settings)

    monkeypatch.setattr(learning.torch.optim, "AdamW", still)
    found = learning.ppo_stories260k(0, max_steps=1)
    assert found["score before"] == found["score after"]


def test_controls(learning, made):
    learning.ppo_stories260k_large_kl(0, max_steps=1)
    found = learning.ppo_stories260k_constant(0, max_steps=1)
    large, constant = made
    assert large.kl_coef == 10
    assert constant.kl_coef == 0.03
    assert found["train score first"] == found["train score last 5"] == 1
    assert found["train gold first"] > 1, "the gold score is looked at"


def test_proxy_beside_gold(learning, made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["learning.py", "ppo_stories260k_proxy", "--seeds", "3"])
    cut = learning.ppo_stories260k_proxy
    monkeypatch.setitem(learning.STUDIES, "ppo_stories260k_proxy", lambda seed, _: cut(seed, 2))
    learning.main()
    rows = [json.loads(line) for line in learning.RESULTS.read_text().splitlines()]
    assert [(row["study"], row["seed"]) for row in rows] == [("ppo_stories260k_proxy", 3)]
    assert "over_optimization" not in rows[0]
    assert {"train gold first", "train proxy last 5", "gold peak", "KL at gold peak"} <= rows[0].keys()
    curves = learning.RESULTS.with_name("over_optimization.jsonl")
    (run,) = map(json.loads, curves.read_text().splitlines())
    assert len(run["over_optimization"]) == 2
    for point in run["over_optimization"]:
        assert point["proxy"] == pytest.approx(point["score"], abs=1e-5), "the gold score was learned from"
        assert point["gold"] > 1
        assert 0 < point["variety"] <= 1
    assert "over_optimization" not in capsys.readouterr().out.splitlines()[1]


@pytest.fixture
def plots(load_benchmark, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load_benchmark("plots")


def test_pictures(plots, tmp_path, capsys):
    curve = [{"kl": float(i), "gold": -abs(i - 20) / 20, "proxy": float(i), "variety": 1.0} for i in range(40)]
    late = [{**point, "gold": point["kl"]} for point in curve]
    runs = [(0, late), (1, curve), (0, curve)]  # the last of a seed counts
    lines = [json.dumps({"study": "proxy", "seed": seed, "over_optimization": c}) for seed, c in runs]
    (tmp_path / "over_optimization.jsonl").write_text("\n".join(lines))
    pictures = []
    for name in ("one", "two"):
        plots.main(["--results", str(tmp_path), "--images", str(tmp_path / name)])
        assert [path.name for path in (tmp_path / name).iterdir()] == ["over_optimization.svg"], "there is but one"
        pictures.append((tmp_path / name / "over_optimization.svg").read_text())
    assert pictures[0].startswith("<?xml")
    assert pictures[0] == pictures[1], "a run changes the file"
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"seed {i}: gold -1.00, -0.11 at 20.0 nats, -0.85 at the end" for i in (0, 1)]


def test_pictures_are_those_of_the_results(plots, tmp_path):
    plots.main(["--images", str(tmp_path)])
    by = re.compile("Matplotlib v[0-9.]+")
    assert {path.stem for path in tmp_path.iterdir()} == plots.PICTURES.keys()
    for drawn in tmp_path.iterdir():
        text, kept = drawn.read_text(), (plots.IMAGES / drawn.name).read_text()
        if by.search(text)[0] == by.search(kept)[0]:
            assert text == kept, f"python benchmarks/plots.py draws another {drawn.name}"


def test_curves_are_kept(learning):
    found = learning.ppo_stories260k(0, max_steps=2)
    assert found["learning_curve"][0]["score"] == found["train score first"]
    assert len(found["learning_curve"]) == 2


def test_smollm2_on_one_backbone(learning, made, tmp_path):
    found = learning.ppo_smollm2(0, max_steps=2)
    (module,) = made
    assert module.policy.adapters.keys() == {"policy", "critic", "reward"}
    assert [row["prompt"] for row in found["samples"]] == learning.QUESTIONS
    assert all(isinstance(row["before"], str) and isinstance(row["after"], str) for row in found["samples"])
    assert not (tmp_path / "runs" / "reward_smollm2_0").exists(), "a reward model that was cut short is kept"


def test_reward_model_is_trained_once(learning, made, tmp_path, monkeypatch):
    train, trained = learning._reward_smollm2, []

    def short(seed, max_steps):
        trained.append(seed)
        return train(seed, 1)

    monkeypatch.setattr(learning, "_reward_smollm2", short)
    monkeypatch.setattr(learning, "_ppo", lambda module, data, steps: ({"steps": steps}, []))
    first, again, other = (learning.ppo_smollm2(seed) for seed in (0, 0, 1))
    assert trained == [0]
    assert (tmp_path / "runs" / "reward_smollm2_0" / "adapter_config.json").exists()
    assert first["steps"] == other["steps"] == 12
    assert first["samples"] == again["samples"], "it matters whether the reward model was trained now"


def test_dpo_is_judged_by_a_model_of_other_rows(learning, monkeypatch):
    read, trained = learning.PreferenceDataModule, []

    def spy(rows, **settings):
        trained.append((rows, settings["val"]))
        return read(rows, **settings)

    monkeypatch.setattr(learning, "PreferenceDataModule", spy)
    found = learning.dpo_smollm2(0, max_steps=1)
    (judges, _), (own, held_out) = trained
    turns = [{learning._first_turn(row) for row in rows} for rows in (judges, own, held_out)]
    assert all(turns) and sum(map(len, turns)) == len(TALKS) == len(set.union(*turns))
    assert found["steps"] == found["judge steps"] == 1 and found["prompts"] == len(held_out)
    assert {"win rate, error", "accuracy after", "length_accuracy after", "matched_accuracy after"} <= found.keys()
    assert {row["prompt"] for row in found["samples"]} <= turns[2]
    assert not (learning.RUNS / "dpo_smollm2_judge").exists(), "a judge that was cut short is kept"


def test_turning_point(learning):
    gold = [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    curve = [{"kl": float(i), "gold": value} for i, value in enumerate(gold)]
    kl, best = learning.turning_point(curve)
    assert kl == 8
    assert best == pytest.approx(sum(gold[4:13]) / 9)
    assert learning.smooth([1.0, 2.0, 6.0], reach=1) == [1.5, 3.0, 4.0]


def test_lists_go_to_files_of_their_names(learning):
    learning.record("study", {"seed": 1, "score": 0.5, "samples": [{"a": 1}]})
    learning.record("study", {"seed": 2, "score": 0.25})
    numbers = [json.loads(line) for line in learning.RESULTS.read_text().splitlines()]
    assert numbers == [{"study": "study", "seed": 1, "score": 0.5}, {"study": "study", "seed": 2, "score": 0.25}]
    samples = learning.RESULTS.with_name("samples.jsonl").read_text()
    assert json.loads(samples) == {"study": "study", "seed": 1, "samples": [{"a": 1}]}


def test_variety_is_of_words(learning):
    assert learning.variety([], ["the dog and the cat", "happy happy Happy happy", ""]) == [0.8, 0.25, 0.0]


def test_vader_scores_sentiment(load_benchmark):
    learning = load_benchmark("learning")
    sad, happy = learning.happiness([], ["She was sad and cried.", "She was so happy, she loved it!"])
    assert sad < 0 < happy


@pytest.fixture
def few_pairs(learning, monkeypatch):
    """Studies of DPO and KTO on few pairs, whose openings suffice for a held-out part."""
    make = learning._own_pairs
    monkeypatch.setattr(learning, "OPENINGS", [f"The fox {i}" for i in range(12)])
    monkeypatch.setattr(learning, "_own_pairs", lambda module, seed, count: make(module, seed, 60))
    return learning


def test_dpo_learns_from_pairs_of_its_own_samples(few_pairs):
    found = few_pairs.dpo_stories260k(0, max_steps=2)
    assert found["steps"] == 2 and found["accuracy before"] == 0.5 and found["margin before"] == 0.0
    assert {"score before", "score after", "accuracy after"} <= found.keys()
    pairs = few_pairs._own_pairs(few_pairs.DPOModule(few_pairs.STORIES, chat_template="plain"), 0, 60)
    assert len(pairs) == 60
    for pair in pairs:
        better, worse = few_pairs.happiness([], [pair["chosen"], pair["rejected"]])
        assert better > worse


@pytest.mark.parametrize("study", ["dpo_stories260k_ipo", "dpo_stories260k_simpo", "dpo_stories260k_large_beta"])
def test_variants_of_dpo_are_other_settings(study, few_pairs):
    found = getattr(few_pairs, study)(0, max_steps=1)
    assert found["steps"] == 1 and ("kl after" in found) == ("simpo" not in study)


def test_kto_learns_from_the_same_pairs_taken_apart(few_pairs, monkeypatch):
    make = few_pairs._own_pairs  # other openings: several must be held out, to be mismatched
    numbered = lambda *given: [{**pair, "prompt": f"{i} {pair['prompt']}"} for i, pair in enumerate(make(*given))]  # noqa: E731
    monkeypatch.setattr(few_pairs, "_own_pairs", numbered)
    found = few_pairs.kto_stories260k(0, max_steps=2)
    assert found["steps"] == 2 and found["loss before"] == found["accuracy before"] == 0.5 and found["z0 before"] == 0.0
    assert {"score before", "score after", "accuracy after"} <= found.keys()


@pytest.fixture
def grpo(learning, monkeypatch):
    """The GRPO modules of a study."""
    found = []

    class Kept(learning.GRPOModule):
        def on_train_start(self):
            super().on_train_start()
            found.append(self)

    monkeypatch.setattr(learning, "GRPOModule", Kept)
    return found


def test_each_algorithm_has_a_study(learning, grpo):
    names = {"_".join(filter(None, ("grpo_stories260k", name))) for name in learning.ALGORITHMS if name != "grpo"}
    assert names | {"grpo_stories260k"} <= learning.STUDIES.keys()
    for name in ("maxrl", "gdpo"):
        found = learning.STUDIES[f"grpo_stories260k_{name}"](0, max_steps=1)
        assert found["train kl first"] == pytest.approx(0, abs=1e-4) and found["steps"] == 1
    maxrl, gdpo = grpo
    assert maxrl.algorithm == learning.ALGORITHMS["maxrl"] and list(gdpo.reward.names) == ["happiness", "variety"]


def test_controls_of_grpo(learning, grpo):
    learning.grpo_stories260k_large_kl(0, max_steps=1)
    constant = learning.grpo_stories260k_constant(0, max_steps=1)
    learning.grpo_stories260k_length(0, max_steps=1)
    large, _, length = grpo
    assert large.kl_coef == 10 and length.kl_coef == 0.001
    assert constant["train score first"] == 1 and constant["train gold first"] > 1
    assert learning.shortness([""] * 2, ["", ""], [[3, 4], [5]]) == [-0.02, -0.01]


def test_sentences_are_asked_of_held_out_words(learning, grpo):
    found = learning.grpo_smollm2_sentence(0, max_steps=2)
    refill = learning.grpo_smollm2_sentence_refill(0, max_steps=1)
    plain, dapo = grpo
    assert plain.algorithm == learning.ALGORITHMS["grpo"] and plain.groups.flat_groups == "keep"
    assert dapo.algorithm == learning.ALGORITHMS["dapo"] and dapo.groups.flat_groups == "refill"
    assert found["steps"] == 2 and refill["steps"] == 1
    assert 0 < found["updates"] <= 4, "two an iteration, unless its groups are flat"
    start, *_, last = found["grpo_held_out"]
    assert (start["updates"], start["CPU seconds"]) == (0, 0) and last["CPU seconds"] > 0
    assert (start["score"], last["score"]) == (found["score before"], found["score after"])
    assert [point["score"] for point in found["grpo_curve"]] == [found["train score first"], found["train score last"]]
    columns = plain.trainer.datamodule.sample_columns(9)
    assert [row["constraints"]["contains"] for row in columns] == [[word] for word in learning.WORDS.split()[:6]]


def test_sums_are_of_two_digits(learning, grpo, monkeypatch):
    seen = []
    monkeypatch.setattr(learning, "_grpo_smollm2", lambda *given: seen.append(given) or {})
    learning.grpo_smollm2_sums(0)
    (_, reward, rows, held_out, *_) = seen[0]
    assert len({row["prompt"] for row in rows}) == 100 and held_out == 12
    assert reward([row["prompt"] for row in rows], [f"It is {row['answer']}." for row in rows], answer=[
        sum(map(int, row["prompt"].rstrip("?").split()[2::2])) for row in rows
    ]) == [1.0] * 100  # fmt: skip
