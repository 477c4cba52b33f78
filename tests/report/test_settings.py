"""Settings in words: of objects, and of files, under the same names."""

import dataclasses
import functools
import os

import pytest
import torch
import yaml

from lightning_rlhf.report.settings import describe, flatten, read_settings, read_yaml, to_text


class Toy(torch.nn.Module):
    def __init__(self, late=True, fail_at=None, rate: float = 0.1):
        super().__init__()
        self.late, self.fail_at, self.rate = late, fail_at, rate


def test_settings_are_said_without_addresses_and_data():
    assert to_text(Toy()) == "Toy" and to_text(torch.zeros(3)) == "Tensor"
    assert to_text(functools.partial(torch.optim.AdamW, lr=0.1)) == "AdamW(lr=0.1)"
    assert to_text(describe) == "describe" and to_text(lambda x: x) == "<lambda>" and to_text(object()) == "object"
    assert to_text([{"prompt": "a"}] * 5) == "5 rows" and to_text("a" * 5) == "aaaaa" and to_text(["a"] * 500) == "list"
    assert describe(None) == []
    assert describe(Toy(rate=0.2)) == [
        ("class", "Toy", False),
        ("late", "True", False),
        ("fail_at", "None", False),
        ("rate", "0.2", True),
    ]


def test_settings_inside_settings_have_dotted_names():
    @dataclasses.dataclass
    class Sampling:
        top_p: float = 0.9
        stops: tuple = ("a", "b")

    class Module:
        def __init__(self, sampling=None, lora=None, optimizer=None, reward="r", rows=()):
            self.sampling, self.lora, self.optimizer, self.reward, self.rows = sampling, lora, optimizer, reward, rows

    adamw = functools.partial(torch.optim.AdamW, lr=0.1)
    reward = [{"source": "runs/rm", "weight": 1.0}, {"source": "a.b.polite", "weight": 0.5}]
    made = Module(Sampling(), {"r": 8, "targets": ["q", "v"]}, adamw, reward, [{"prompt": "a"}] * 3)
    assert describe(made)[1:] == [
        ("sampling.top_p", "0.9", True),
        ("sampling.stops", "['a', 'b']", True),
        ("lora.r", "8", True),
        ("lora.targets", "['q', 'v']", True),
        ("optimizer", "AdamW", True),
        ("optimizer.lr", "0.1", True),
        ("reward.0.source", "runs/rm", True),
        ("reward.0.weight", "1.0", True),
        ("reward.1.source", "a.b.polite", True),
        ("reward.1.weight", "0.5", True),
        ("rows", "3 rows", True),
    ]
    written = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    assert flatten(written, "optimizer") == flatten(adamw, "optimizer")
    assert flatten({"class_path": "a.PPOModule", "init_args": {"x": {}}}) == {"class": "PPOModule", "x": "{}"}


def test_long_texts_are_cut_and_their_length_is_said():
    assert to_text("a" * 400) == "a" * 400
    assert to_text("a" * 401) == "a" * 400 + "… (401 characters)"


def test_the_command_lines_config_comes_before_the_loggers_hparams(tmp_path):
    assert read_settings(tmp_path) == {}
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump({"_stage": "SFTModule", "_instantiator": "y", "lr": 1.0}))
    assert read_settings(tmp_path) == {"Model": [("class", "SFTModule", False), ("lr", "1.0", False)]}
    config = {
        "seed_everything": 3,
        "model": {"class_path": "lightning_rlhf.PPOModule", "init_args": {"kl_coef": 0.05, "lora": None}},
        "data": {"class_path": "lightning_rlhf.PromptDataModule"},
        "trainer": {"max_steps": 30, "max_epochs": None, "callbacks": ["x"], "default_root_dir": "a"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_settings(tmp_path) == {
        "Model": [("class", "PPOModule", False), ("kl_coef", "0.05", False), ("lora", "None", False)],
        "Data": [("class", "PromptDataModule", False)],
        "Trainer": [("max_steps", "30", False), ("seed", "3", False)],
    }


def test_yaml_makes_no_objects(tmp_path):
    path = tmp_path / "hparams.yaml"
    evil = "x: !!python/object/apply:os.mkdir [made]\ny: !!python/name:torch.optim.AdamW ''\n"
    path.write_text(evil + "z: !!python/object:a.LoRA {r: 8}\nt: !!python/tuple [1, 2]\n")
    assert read_yaml(path) == {"x": ["made"], "y": "torch.optim.AdamW", "z": {"r": 8}, "t": [1, 2]}
    assert not os.path.exists("made")
    path.write_text("a: [1")
    with pytest.raises(ValueError, match=r"hparams\.yaml is not valid YAML"):
        read_yaml(path)
    path.write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping, but is a list"):
        read_yaml(path)
