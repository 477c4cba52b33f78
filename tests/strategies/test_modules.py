"""Foreign modules and callbacks under every plugin: right, as under ddp, or refused in words on all ranks."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from runs import load_script

SCRIPT = Path(__file__).parent / "modules.py"
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

#: What is refused, and in what words; otherwise the result must equal ddp's.
SPLITS = {
    "thawed": "net.0.weight is trained now, but was frozen at the start of fit",
    "group": "A parameter group was added during training",
    "backbone": "BackboneFinetuning unfreezes parameters that ColossalAI",
}
REFUSED = {
    "colossalai_ddp": {"unused": "parameters that were not used", "cooled": "parameters that were not used"},
    "zero1": {},
    "zero2": SPLITS,
    "zero2 half": SPLITS,
    "gemini": {
        **SPLITS,
        "group": "while Gemini shards them",
        "sgd": "Gemini supports only Adam and AdamW",
        "clipping by value": "Gemini supports only Adam and AdamW",
        "bounded": "while Gemini shards them",
        "reads": "while Gemini shards them",
        "swa": "StochasticWeightAveraging reads whole weights",
        "swa, norm": "StochasticWeightAveraging reads whole weights",
        "ema": "EMAWeightAveraging reads whole weights",
    },
}
#: How far weights and metrics may be from ddp's, on average: in bf16 Adam makes whole steps of gradients near 0.
BOUNDS = {"zero2 half": 1e-2, "gemini": 1e-2}
KINDS = {
    "colossalai_ddp": ("norm", "parts", "several", "own", "unused", "toggled", "cooled", "twice"),
    "zero1": ("plain", "accumulation", "norm", "toggled", "twice"),
    "zero2": None,  # all
    "zero2 half": (
        "parts",
        "several",
        "own",
        "shared",
        "frozen",
        "norm",
        "bounded",
        "twice",
        "thawed between",
        "swa",
        "ema",
    ),
    "gemini": None,
}


@pytest.fixture(scope="module")
def kinds():
    modules = load_script(SCRIPT)
    return list(modules.KINDS)


@pytest.fixture(scope="module")
def found(kinds, tmp_path_factory):
    """What each rank found, by case, in one start of two processes."""
    out = tmp_path_factory.mktemp("modules")
    chosen = {plugin: wanted or kinds for plugin, wanted in KINDS.items()}
    half = {kind for plugin in BOUNDS for kind in chosen[plugin] if kind not in REFUSED[plugin]}
    cases = {f"ddp {kind}": dict(kind=kind, plugin="ddp_find_unused_parameters_true") for kind in kinds}
    cases |= {f"ddp half {kind}": {**cases[f"ddp {kind}"], "precision": "bf16-mixed"} for kind in kinds if kind in half}
    for plugin, wanted in chosen.items():
        precision = "bf16-mixed" if plugin in BOUNDS else "32-true"
        options = dict(plugin=plugin.removesuffix(" half"), precision=precision)
        cases |= {f"{plugin} {kind}": dict(kind=kind, **options) for kind in wanted}
    run_ranks(SCRIPT, out, json.dumps(cases), logs=out)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("plugin", KINDS)
def test_foreign_modules_are_as_under_ddp_or_refused_on_all_ranks(found, kinds, plugin):
    wrong = []
    for kind in KINDS[plugin] or kinds:
        here, there = (rank[f"{plugin} {kind}"] for rank in found)
        like = found[0][f"ddp half {kind}" if plugin in BOUNDS and kind not in REFUSED[plugin] else f"ddp {kind}"]
        assert not isinstance(like, str), like
        if words := REFUSED[plugin].get(kind):
            if not (isinstance(here, str) and words in here and here == there):
                wrong.append((kind, "is not refused", here, there))
        elif isinstance(here, str) or isinstance(there, str):
            wrong.append((kind, here if isinstance(here, str) else there))
        elif here.keys() != like.keys():
            wrong.append((kind, here.keys() ^ like.keys()))
        else:
            for name, value in like.items():
                difference = (here[name].double() - value.double()).abs()
                difference = difference.mean() if plugin in BOUNDS else difference.max()
                if not difference <= BOUNDS.get(plugin, 1e-6):
                    wrong.append((kind, name, difference.item()))
                if not name.startswith("saved") and not torch.equal(here[name], there[name]):
                    wrong.append((kind, name, "differs by rank"))
                if not name.startswith(("saved", "logged")) and here[name].dtype != value.dtype:
                    wrong.append((kind, name, here[name].dtype, value.dtype))
    assert not wrong, "\n".join(map(str, wrong))
