"""ColossalAI's strategy, quickly: it runs, names are known, and what can't be is refused in words."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from forked import python
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import nn

from lightning_rlhf.strategies import ColossalAIPrecision, ColossalAIStrategy
from lightning_rlhf.strategies.backward import find_parameters
from lightning_rlhf.strategies.colossalai import NAMES
from lightning_rlhf.strategies.cpu import TorchAdam, enable
from lightning_rlhf.strategies.optimizer import refuse_optimizer
from lightning_rlhf.strategies.trained import find_trained

HERE = Path(__file__).parent


@pytest.mark.distributed
def test_sft_and_ppo_run_on_two_ranks(tiny_model_dir, tmp_path):
    gemini = {"plugin": "gemini", "min_chunk_elements": 2048}
    cases = {
        "sft": dict(stage="sft", max_steps=2, devices=2, strategy="colossalai_zero2"),
        "ppo": dict(stage="ppo", max_steps=2, devices=2, strategy=gemini, precision="bf16-mixed", lora=True),
    }
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "MASTER_ADDR": "127.0.0.1"}
    command = [python(), str(HERE / "run.py"), str(tiny_model_dir), str(tmp_path), json.dumps(cases)]
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
    command = [python(), str(HERE / "run_overflow.py"), str(tiny_model_dir), str(tmp_path)]
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
        (dict(plugin="hybrid"), "Tensor parallelism is tp, an argument of the first three"),
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


def test_each_optimizer_gets_its_children_layers_and_parameters():
    nets = Nets()
    found = find_trained(nets, [sgd(nets.more["b"], nets.own), sgd(nets.one)])
    assert [list(parts) for parts in found] == [["own", "more.b"], ["one"]]
    assert found[0]["more.b"] is nets.more["b"]
    assert found[0]["own"] is nets.own
    nets.one = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    found = find_trained(nets, [sgd(nets.one[0], nets.one[1][0]), torch.optim.SGD([nets.one[1][1].weight])])
    assert [list(parts) for parts in found] == [["one.0", "one.1.0"], ["one.1.1"]]
    nets.two.weight = nets.own_too = nn.Parameter(torch.zeros(2, 2))
    assert list(find_trained(nets, [sgd(nets.own_too)])[0]) == ["own_too", "two"]


def test_what_optimizers_cannot_share_is_refused():
    nets = Nets()
    with pytest.raises(ValueError, match=r"Two optimizers of Nets train one\.weight"):
        find_trained(nets, [sgd(nets.one), torch.optim.SGD([nets.one.weight])])
    with pytest.raises(ValueError, match=r"parameter of shape \(3,\) that Nets does not hold"):
        find_trained(nets, [sgd(nn.Parameter(torch.zeros(3)))])
    nets.two.requires_grad_(False)
    with pytest.raises(ValueError, match="Optimizer 1 of Nets trains nothing"):
        find_trained(nets, [sgd(nets.one), sgd(nets.two)])


@pytest.mark.parametrize(
    "name", ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop"]
)
def test_optimizers_that_step_each_element_by_itself_are_taken(name):
    refuse_optimizer(getattr(torch.optim, name)(Nets().parameters()))


def test_an_optimizer_is_tried_with_its_own_settings_and_left_as_it_was():
    nets = Nets()
    optimizer = torch.optim.SGD([{"params": nets.one.parameters(), "momentum": 0.9}, {"params": [nets.own]}], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it replaces optimizer.step
    before = [p.detach().clone() for p in nets.parameters()]
    refuse_optimizer(optimizer)
    assert not optimizer.state
    assert all(map(torch.equal, before, nets.parameters()))


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "SparseAdam"])
def test_optimizers_that_need_whole_parameters_are_refused(name):
    optimizer = getattr(torch.optim, name)(list(Nets().parameters()))
    with pytest.raises(ValueError, match=f"{name} (updates the elements of a parameter together|cannot step slices)"):
        refuse_optimizer(optimizer)


def test_parameters_of_a_loss_are_found_through_checkpoints():
    nets, x = Nets(), torch.ones(1, 2, requires_grad=True)
    found = lambda loss: find_parameters(loss.sum())  # noqa: E731
    assert found(nets.one(x) * nets.own) == ({id(x), id(nets.own), *map(id, nets.one.parameters())}, False)
    assert found(torch.utils.checkpoint.checkpoint(nets.one, x, use_reentrant=False))[0] >= {id(nets.one.weight)}
    assert found(torch.utils.checkpoint.checkpoint(nets.one, x, use_reentrant=True)) == ({id(x)}, True)
    assert find_parameters(nets.own) == ({id(nets.own)}, False)


#: What strategies/sharded.py, gemini.py and cpu.py use beyond ColossalAI's documented interface.
PRIVATE = {
    "colossalai.zero.low_level.LowLevelZeroOptimizer": "_add_to_bucket _reduce_grad _sanity_checks "
    "get_working_to_master_map no_sync",
    "colossalai.zero.gemini.gemini_ddp.GeminiDDP": "_pre_backward _post_backward _post_forward remove_hooks",
    "colossalai.zero.gemini.gemini_mgr.GeminiManager": "pre_iter need_warmup is_warmup reset_attributes",
    "colossalai.zero.gemini.gemini_hook.GeminiZeROHook": "switch_to_backward pre_forward post_forward",
    "colossalai.zero.gemini.chunk.ChunkManager": "get_chunk get_chunks access_chunk move_chunk",
    "colossalai.zero.gemini.chunk.Chunk": "payload paired_chunk is_gathered shard_move device_type",
    "colossalai.tensor.param_op_hook.ColoParamOpHookManager": "use_hooks has_hook pre_op post_op",
}


@pytest.mark.parametrize("path", PRIVATE)
def test_colossalai_still_has_what_the_strategy_uses(path):
    module, name = path.rsplit(".", 1)
    kind = getattr(importlib.import_module(module), name)
    source = inspect.getsource(kind)
    missing = [n for n in PRIVATE[path].split() if not hasattr(kind, n) and f"self.{n}" not in source]
    assert not missing, (
        f"{path} has no {', '.join(missing)}: strategies/ must be changed for this version of ColossalAI"
    )


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
