"""ColossalAI's strategy, quickly: it runs, names are known, and what can't be is refused in words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import nn

from lightning_rlhf.strategies import ColossalAIPrecision, ColossalAIStrategy
from lightning_rlhf.strategies.colossalai import NAMES, trained_children
from lightning_rlhf.strategies.cpu import TorchAdam, enable

HERE = Path(__file__).parent


@pytest.mark.distributed
def test_sft_and_ppo_run_on_two_ranks(tiny_model_dir, tmp_path):
    gemini = {"plugin": "gemini", "min_chunk_elements": 2048}
    cases = {
        "sft": dict(stage="sft", max_steps=2, devices=2, strategy="colossalai_zero2"),
        "ppo": dict(stage="ppo", max_steps=2, devices=2, strategy=gemini, precision="bf16-mixed", lora=True),
    }
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(HERE / "run.py"), str(tiny_model_dir), str(tmp_path), json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in cases:
        assert not list((tmp_path / name).glob("error-*")), (tmp_path / name / "error-0.txt").read_text()
        assert len(json.loads((tmp_path / name / "curve.json").read_text())) == 2


@pytest.mark.distributed
def test_an_overflow_of_the_critic_drops_the_policys_step_too(tiny_model_dir, tmp_path):
    """Each child has a scale of its own; ColossalAI lowers one at the second overflow in a row."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "MASTER_ADDR": "127.0.0.1"}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
    command = [sys.executable, str(HERE / "run_overflow.py"), str(tiny_model_dir), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    seen, steps, dropped = json.loads((tmp_path / "seen.json").read_text())
    assert seen == [
        [True, True, True, 256, 256],
        [False, False, False, 256, 256],
        [False, False, False, 256, 128],
        [True, True, True, 256, 128],
    ]
    assert (steps, dropped) == (1, 0)


@pytest.mark.parametrize(
    "imports",
    [
        "import lightning.pytorch, lightning_rlhf",
        # who looks whether Lightning is there does not import it
        "import lightning_rlhf, importlib.util; importlib.util.find_spec('lightning.pytorch'); import lightning",
    ],
    ids=["lightning first", "lightning last"],
)
def test_names_are_registered_in_either_order_without_importing_colossalai(imports):
    code = f"""{imports}
import sys, lightning.pytorch as L
strategy = L.Trainer(accelerator='cpu', strategy='colossalai_zero1', logger=False, enable_checkpointing=False).strategy
print(type(strategy).__name__, strategy.plugin_name, 'colossalai' in sys.modules)
print(*sorted(L.strategies.StrategyRegistry.available_strategies()))"""
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, names = done.stdout.splitlines()[-2:]
    assert first == "ColossalAIStrategy zero1 False"
    assert set(NAMES) <= set(names.split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(plugin="hybrid"), "Tensor and pipeline parallelism are not supported yet"),
        (dict(plugin="zero3"), "one of ddp, zero1, zero2, gemini"),
        (dict(checkpoint="both"), "must be full or sharded"),
        (dict(plugin="ddp", checkpoint="sharded"), "shards nothing"),
        (dict(plugin="gemini", shard_param_frac=1.5), "between 0 and 1"),
        (dict(plugin="gemini", offload_param_frac=0.5), "needs shard_param_frac=1 and offload_optim_frac=1"),
        (dict(plugin="gemini", cpu_offload=True), "Gemini has offload_optim_frac"),
        (dict(plugin="zero1", offload_optim_frac=1.0), "need plugin='gemini'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        ColossalAIStrategy(**arguments)


@pytest.mark.parametrize("plugin, precision", [("gemini", "32-true"), ("zero2", "16-true"), ("zero1", "64-true")])
def test_precisions_that_a_plugin_lacks_are_refused(plugin, precision):
    with pytest.raises(ValueError, match=f"ColossalAI's {plugin} does not support .*{precision}"):
        ColossalAIPrecision(precision, plugin)


def test_lightnings_precision_is_translated_except_under_ddp():
    sharded, ddp = ColossalAIStrategy("zero2"), ColossalAIStrategy("ddp")
    for strategy in (sharded, ddp):
        strategy.precision_plugin = HalfPrecision("bf16-true")
    assert (sharded.precision_plugin.name, sharded.precision_plugin.master_weights) == ("bf16", False)
    assert type(ddp.precision_plugin) is HalfPrecision
    sharded.precision_plugin = Precision()
    assert sharded.precision_plugin.dtype is None


class Nets(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.more = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        self.own = nn.Parameter(torch.zeros(1))


def sgd(*parts):
    return torch.optim.SGD(
        [p for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])]
    )


def test_each_optimizer_owns_a_child():
    nets = Nets()
    found = trained_children(nets, [sgd(nets.more["b"]), sgd(nets.one)])
    assert [name for name, _ in found] == ["more.b", "one"]
    assert found[0][1] is nets.more["b"]
    with pytest.raises(ValueError, match="trains one, two, but under ColossalAI it must train exactly one child"):
        trained_children(nets, [sgd(nets.one, nets.two)])
    with pytest.raises(ValueError, match="parameters of the module itself"):
        trained_children(nets, [sgd(nets.own)])
    with pytest.raises(ValueError, match="Two optimizers of Nets train the same child"):
        trained_children(nets, [torch.optim.SGD([nets.one.weight]), torch.optim.SGD([nets.one.bias])])


def test_without_colossalai_one_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps colossalai"):
        ColossalAIStrategy().setup_environment()


def test_the_cpu_mode_refuses_to_start_where_cuda_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"trainer\.accelerator=gpu"):
        enable()


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_of_the_cpu_mode_is_torchs(decoupled):
    torch.manual_seed(0)
    settings = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    want = nn.Parameter(torch.randn(20))
    p, m, v = want.detach().clone(), torch.zeros(20), torch.zeros(20)
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)([want], **settings)
    adam = TorchAdam(0.01, 0.9, 0.95, 1e-6, 0.1, decoupled)
    for step in range(1, 6):
        want.grad = torch.randn(20)
        optimizer.step()
        adam.step(step, 0.01, 0.9, 0.95, 1e-6, 0.1, True, p, want.grad * 8, m, v, div_scale=8.0)
    torch.testing.assert_close(p, want.detach(), atol=1e-6, rtol=1e-5)
