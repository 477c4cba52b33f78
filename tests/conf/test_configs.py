"""Every shipped config is parsed, and run for a step with a tiny model and the CPU put in."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from ballots import ballot
from forked import python
from vllm_server import StandIn

from lightning_rlhf.cli import cli, main
from lightning_rlhf.functional import ALGORITHMS
from lightning_rlhf.serving.votes import Votes
from lightning_rlhf.strategies import ColossalAIStrategy

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
PARALLEL = [path for path in FILES if path.parent.name == "parallel"]
#: Those of fit; tests/collection/test_command.py prints and runs the configs of collect.
OF_FIT = [path for path in FILES if path.parent.name != "collect"]
STAGES = [path for path in OF_FIT if path not in PARALLEL]


#: GRPO's, which differ from smollm2_lora in the algorithm alone, and tests/stages/test_grpo.py runs these.
RUN_ELSEWHERE = ("dapo", "dr_grpo", "gmpo", "gspo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo")


def name(path):
    return str(path.relative_to(CONFIGS))


def chosen(paths):
    """Arguments of tests: CI leaves out what runs elsewhere."""
    elsewhere = [CONFIGS / "grpo" / f"smollm2_{algorithm}.yaml" for algorithm in RUN_ELSEWHERE]
    return [
        pytest.param(path, id=name(path), marks=pytest.mark.exhaustive if path in elsewhere else ()) for path in paths
    ]


def options(model_dir, out, stage, trainer=("--trainer.strategy", "auto", "--trainer.precision", "32-true")):
    """What makes a stage's config small enough to run here."""
    few = [
        "--model.rollout.sampling.max_new_tokens",
        "8",
        "--model.reward",
        "lightning_rlhf.rewards.verifiers.length",
    ]
    part = json.dumps([{"source": few[-1]}])  # gdpo wants a list
    return [
        "--model.pretrained", str(model_dir), "--model.load.dtype", "float32",
        "--model.chat_template", "chatml", "--data.max_length", "256", "--data.on_bad_row", "skip",
        "--data.batch_size", "4", "--data.val_fraction", "0.05", "--trainer.accelerator", "cpu",
        "--trainer.devices", "1", "--trainer.num_nodes", "1", *trainer,
        "--trainer.max_steps", "1", "--trainer.default_root_dir", str(out), "--trainer.logger", "false",
        "--trainer.limit_val_batches", "2", "--trainer.enable_progress_bar", "false",
        *(few if stage in ("ppo", "online_dpo") else [*few[:2], "--model.reward", part] if stage == "grpo" else []),
    ]  # fmt: skip


@pytest.mark.parametrize("stage", ["dpo", "online_dpo"])
@pytest.mark.parametrize("loss, scale", [("sigmoid", 0.1), ("simpo", 2.0), ("orpo", 1.0)])
def test_a_loss_is_changed_by_its_name_alone(tiny_model_dir, tmp_path, stage, loss, scale):
    """The config's beta is the loss's own, or none."""
    config = ["--config", str(CONFIGS / stage / "smollm2_lora.yaml"), "--model.loss", loss]
    made = cli([*config, *options(tiny_model_dir, tmp_path, stage)], run=False)
    assert (made.model.loss if stage == "dpo" else made.model.pair_loss).scale == scale


def votes(path, folder):
    """The option for the data of a config that trains on votes: some votes."""
    if path.stem != "from_chat":
        return []
    written = Votes(folder / "votes")
    for i in range(20):
        written.add(ballot(prompt=[{"role": "user", "content": f"Who was {i}?"}]))
    return ["--data.train", str(written.folder / "preferences.jsonl")]


@contextmanager
def server_of(path, model_dir, folder):
    """Options for a config that asks a server, with a stand-in that runs meanwhile."""
    if not path.stem.endswith("_vllm"):
        yield []
        return
    with StandIn(model_dir, name="sft") as server:
        engine = "--model.engine.init_args"
        yield [f"{engine}.base_url", server.url, f"{engine}.directory", str(folder)]
        assert server.bodies(), "it was not asked"


def test_configs_of_algorithms_differ_in_the_algorithm_alone():
    found = {}
    for path in sorted((CONFIGS / "grpo").glob("smollm2_*.yaml")):
        config = yaml.safe_load(path.read_text())
        algorithm = config["model"]["init_args"].pop("algorithm")
        suffix = "" if path.stem == "smollm2_lora" else f"_{path.stem.removeprefix('smollm2_')}"
        if suffix and suffix.replace("_", "") != algorithm.replace("+", "plus").replace("_", ""):
            continue  # of another task or engine
        assert config["trainer"].pop("default_root_dir") == f"runs/grpo_smollm2{suffix}"
        reward = config["model"]["init_args"].pop("reward")
        source = reward[0]["source"] if algorithm == "gdpo" else reward  # gdpo normalizes each of a list
        assert source == "lightning_rlhf.rewards.verifiers.length"
        found[algorithm] = config
    assert found.keys() == ALGORITHMS.keys()
    assert all(config == found["grpo"] for config in found.values())


@pytest.mark.parametrize("path", chosen(STAGES))
def test_config_runs_a_step(path, tiny_model_dir, tmp_path):
    if yaml.safe_load(path.read_text())["model"]["init_args"].get("quantization"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    arguments = [*options(tiny_model_dir, tmp_path, path.parent.name), *votes(path, tmp_path)]
    with server_of(path, tiny_model_dir, tmp_path / "server") as more:
        cli(["fit", "--config", str(path), *arguments, *more])
    found = {file.name for file in tmp_path.rglob("*config.json")}
    assert found & {"config.json", "adapter_config.json"}, "no Hugging Face directory was exported"


@pytest.mark.parametrize("path", PARALLEL, ids=name)
def test_parallel_config_wins_over_a_stage(path, tiny_model_dir, tmp_path):
    text = yaml.safe_load(path.read_text())
    assert list(text) == ["trainer"], "it describes parallelism alone"
    wanted = text["trainer"]
    some = [f"{stage}/smollm2_lora" for stage in ("sft", "reward", "dpo", "kto", "online_dpo", "ppo")]
    # the last one has a strategy, devices and a precision of its own
    for stage in (some[PARALLEL.index(path) % len(some)], "sft/llama2_13b_full"):
        own = CONFIGS / f"{stage}.yaml"
        both = ["--config", str(own), "--config", str(path)]
        made = cli([*both, *options(tiny_model_dir, tmp_path, own.parent.name, trainer=())], run=False)
        trainer, strategy = made.trainer, wanted["strategy"]
        assert trainer.precision == wanted["precision"]
        assert isinstance(trainer.strategy, ColossalAIStrategy) == isinstance(strategy, dict)
        for key, value in strategy["init_args"].items() if isinstance(strategy, dict) else ():
            assert getattr(trainer.strategy, "plugin_name" if key == "plugin" else key) == value
        stages_own = yaml.safe_load(own.read_text())
        assert made.config.model.class_path.endswith(stages_own["model"]["class_path"])
        assert len(made.config.trainer.callbacks) == len(stages_own["trainer"]["callbacks"])


def test_parallel_configs_run_a_step(tiny_model_dir, tmp_path):
    # ColossalAI's CPU mode replaces parts of it, and a process group stays: all in one process that isn't this one
    alone = [path for path in PARALLEL if not path.name.startswith(("tp", "pp", "sp"))]
    pairs = [("sft", path) for path in alone] + [("ppo", CONFIGS / "parallel" / "gemini_offload.yaml")]
    # generation in bf16 is slow on a CPU
    callbacks = [{"class_path": "HFExport"}]
    callbacks += [{"class_path": "SampleCompletions", "init_args": {"num_prompts": 1, "max_new_tokens": 4}}]
    outs = [tmp_path / f"{stage}_{path.stem}" for stage, path in pairs]
    runs = []
    for (stage, path), out in zip(pairs, outs, strict=True):
        both = ["--config", str(CONFIGS / stage / "smollm2_lora.yaml"), "--config", str(path)]
        small = options(tiny_model_dir, out, stage, trainer=("--trainer.callbacks", json.dumps(callbacks)))
        runs.append(["fit", *both, *small])
    script = "import json, sys; from lightning_rlhf.cli import main; [main(args) for args in json.loads(sys.argv[1])]"
    done = subprocess.run([sys.executable, "-c", script, json.dumps(runs)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert [out.name for out in outs if not list(out.rglob("config.json"))] == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "mesh, stage, ranks", [("tp2", "ppo", 2), ("sp2", "ppo", 2), ("pp2", "ppo", 2), ("tp2_pp2_zero1", "sft", 4)]
)
def test_a_mesh_file_runs_a_step_on_several_ranks(mesh, stage, ranks, tiny_model_dir, tmp_path):
    files = (CONFIGS / stage / "smollm2_lora.yaml", CONFIGS / "parallel" / f"{mesh}.yaml")
    both = [part for file in files for part in ("--config", str(file))]
    trainer = ("--trainer.precision", "32-true", "--trainer.callbacks", json.dumps([{"class_path": "HFExport"}]))
    small = options(tiny_model_dir, tmp_path, stage, trainer=trainer)
    command = [python(), "-m", "lightning_rlhf", "fit", *both, *small, "--trainer.devices", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert list(tmp_path.rglob("config.json"))


# ------------------------------------------------------------------------------------------------- printing

FUNCTION = "lightning_rlhf.rewards.verifiers.length"
WEIGHTED = [{"source": FUNCTION, "weight": 1.0}, {"source": "runs/reward/hf/best", "weight": -0.5, "name": "model"}]
JUDGE = {
    "class_path": "lightning_rlhf.evaluation.ChatJudge",
    "init_args": {"base_url": "http://127.0.0.1:8000/v1", "model": "a/b", "api_key_env": "JUDGE_KEY"},
}
#: Stage, and what is put over its config in a second file, by section: one for each way to write an argument.
SPELLINGS = [
    *[
        ("ppo", {"model": {"reward": reward}})
        for reward in (
            FUNCTION,
            FUNCTION.replace("functions.", "functions:"),
            "runs/reward/hf/best",
            "org/name",
            WEIGHTED,
            [{"source": FUNCTION}],
            {"class_path": "lightning_rlhf.rewards.FunctionReward", "init_args": {"function": FUNCTION}},
        )
    ],
    ("ppo", {"model": {"critic": {"pretrained": "runs/reward/hf/best"}, "load": {"layout": "padded"}}}),
    ("ppo", {"model": {"kl": {"target": 6.0}}}),
    ("ppo", {"model": {"rollout": {"sampling": {"max_new_tokens": 5, "stop_strings": ["a", "\n"]}}}}),
    ("ppo", {"model": {"engine": {"class_path": "lightning_rlhf.rollout.HFGenerateEngine"}}}),
    *[
        ("grpo", {"model": model})
        for model in (
            {"algorithm": "gspo"},
            {"algorithm": {"baseline": "leave_one_out", "scale": "none", "clip_high": 0.28, "mean": "prompt"}},
            {"groups": {"flat_groups": "refill", "spare": 2, "rounds": 3}, "kl": {"coef": 0.1, "where": "reward"}},
            {"loss": {"correction": "token_truncate", "off_policy_threshold": 0.1}},
        )
    ],
    ("ppo", {"data": {"train": [{"prompt": "a", "lang": "en"}]}}),
    ("ppo", {"data": {"ptx": {"source": [{"source": "a.jsonl", "weight": 2.0}], "max_length": 5}}}),
    *[
        ("dpo", {"model": model})
        for model in (
            {"loss": "ipo", "beta": None},
            {"loss": "my_losses.hinge"},
            {"loss": [{"name": "sigmoid", "weight": 0.8, "settings": {"label_smoothing": 0.1}}, {"name": "sft"}]},
            {"loss": [{"name": "ipo", "settings": {"average": False}}]},
            {"reference": "copy"},
            {"reference_update": {"every": 100, "alpha": 0.5}},
            {"reference": "org/name", "shaping": {"f_divergence": "js_divergence", "ld_alpha": 0.5}},
        )
    ],
    ("kto", {"model": {"loss": "apo_zero_unpaired", "undesirable_weight": 0.5, "reference": "precomputed"}}),
    ("kto", {"data": {"train": [{"source": "a.jsonl", "format": "sharegpt"}], "threshold": 3.5, "take_apart": False}}),
    *[
        ("online_dpo", {"model": model})
        for model in (
            {"reward": None, "judge": JUDGE},
            {"reward": WEIGHTED, "pairs": "all", "margin": 0.5, "loss": "ipo"},
            {"loss": [{"name": "sigmoid", "weight": 0.8}, {"name": "sft"}], "mixture": 0.2},
        )
    ],
    ("online_dpo", {"data": {"pairs": {"source": "a.jsonl", "batch_size": 8}}}),
    ("sft", {"model": {"lora": None}}),
    ("sft", {"model": {"lora": {"r": 4, "targets": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}}}),
    ("sft", {"model": {"lora": {"targets": "all-linear", "init": "gaussian"}, "load": {"quantization": "nf4"}}}),
    ("sft", {"model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}}),
    ("sft", {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95]}}}}),
    ("sft", {"model": {"lr_scheduler": {"class_path": "lightning_rlhf.stages.optim.CosineWarmup",
                                        "init_args": {"warmup": 10, "final": 0.0}}}}),
    ("sft", {"model": {"lr_scheduler": {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
                                        "init_args": {"monitor": "val/loss"}}}}),
    ("sft", {"data": {"train": ["a.jsonl", "b.jsonl"], "val": "c.jsonl"}}),
    ("sft", {"data": {"train": [{"instruction": "a", "output": "b"}]}}),
    ("sft", {"data": {"train": [{"source": "a.jsonl", "weight": 2.0}, {"source": ["b.parquet", "c.csv"], "weight": 0.5},
                                {"source": "org/set", "format": "sharegpt"}]}}),
    *[
        ("sft", {"trainer": {"callbacks": [{"class_path": "MeasureWinRate", "init_args": {"judge": judge}}]}})
        for judge in (FUNCTION, "runs/reward/hf/best", WEIGHTED, JUDGE)
    ],
    ("sft", {"trainer": {"callbacks": [{"class_path": "SampleCompletions", "init_args": {"prompts": ["a", [
        {"role": "user", "content": "b"}]]}}, {"class_path": "EMA", "init_args": {"decay": 0.99}}]}}),
    ("sft", {"trainer": {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs"}}}}),
    ("sft", {"trainer": {"strategy": {"class_path": "ColossalAIStrategy", "init_args": {"plugin": "gemini"}}}}),
]  # fmt: skip


@pytest.fixture
def printed(tmp_path, capsys):
    """What ``fit --print_config`` prints for arguments; again for what it printed, which must be the same."""

    def of(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments, "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    def twice(*arguments):
        first = of(*arguments)
        (tmp_path / "printed.yaml").write_text(first)
        assert of("--config", str(tmp_path / "printed.yaml")) == first
        return yaml.safe_load(first)

    return twice


def assert_holds(found, given, at=""):
    """Each value that was given is there; a class by its full name, a number perhaps as a float."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert_holds(found[key], value, f"{at}.{key}")
    elif isinstance(given, list) and isinstance(found, list):
        assert len(found) == len(given), at
        for i, (one, other) in enumerate(zip(found, given, strict=True)):
            assert_holds(one, other, f"{at}[{i}]")
    else:
        assert found == given or (at.endswith("class_path") and found.endswith(f".{given}")), at


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", chosen(OF_FIT))
def test_config_is_printed_as_it_was_read(path, printed):
    assert_holds(printed("--config", str(path)), yaml.safe_load(path.read_text()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stage, given", SPELLINGS, ids=lambda value: None if isinstance(value, str) else str(value))
def test_spelling_is_printed_as_it_was_read(stage, given, printed, tmp_path):
    [(section, values)] = given.items()
    given = {section: values if section == "trainer" else {"init_args": values}}
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(given))
    own = CONFIGS / stage / "smollm2_lora.yaml"
    assert_holds(printed("--config", str(own), "--config", str(tmp_path / "over.yaml")), given)


@pytest.mark.filterwarnings("error")
def test_arguments_of_a_command_line_are_printed_as_they_were_read(printed):
    found = printed(
        "--config", str(CONFIGS / "ppo" / "smollm2_lora.yaml"), "--model.reward", json.dumps(WEIGHTED),
        "--model.lora.targets", "[q_proj]", "--model.rollout.sampling.stop_strings", '["a"]', "--model.optimizer",
        "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--data.train", "[a.jsonl, b.jsonl]",
        "--trainer.callbacks+=EMA", "--trainer.callbacks.decay", "0.9",
    )  # fmt: skip
    model, data = found["model"]["init_args"], found["data"]["init_args"]
    assert_holds(model["reward"], WEIGHTED)
    assert model["lora"]["targets"] == ["q_proj"] and model["rollout"]["sampling"]["stop_strings"] == ["a"]
    assert_holds(model["optimizer"], {"class_path": "SGD", "init_args": {"lr": 0.1}})
    assert data["train"] == ["a.jsonl", "b.jsonl"]
    assert_holds(found["trainer"]["callbacks"][-1], {"class_path": "EMA", "init_args": {"decay": 0.9}})


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_key_is_explained(path):
    unexplained = []
    for line in path.read_text().splitlines():
        value = line.split(":", 1)[1].strip() if ":" in line and not line.lstrip().startswith("#") else ""
        if value and "#" not in value and "class_path" not in line:
            unexplained.append(line.strip())
    # what the name says in full
    plain = "accelerator devices lr betas default_root_dir strategy max_epochs log_every_n_steps monitor"
    plain += " max_new_tokens val_fraction precision chat_template"
    allowed = tuple(f"{key}:" for key in plain.split())
    assert [x for x in unexplained if not x.startswith(allowed)] == []
