"""Ordinary modules under ZeRO-2 and Gemini: as under ddp, or refused in words on all ranks."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks

SCRIPT = Path(__file__).parent / "ordinary.py"
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

#: What is refused, and in what words; otherwise the result must equal ddp's.
ALL = {
    "direct backward": "outside of a backward pass of the strategy",
    "shared parameter": "Two optimizers of SharedParameter train net.2.weight",
    "outside": "Optimizer 0 of Outside has a parameter of shape (3,) that Outside does not hold",
    "skips": "Skipping the `training_step` by returning None",
    "skips on a rank": "On some ranks training_step returned None",
    "trust ratio": "Trust updates the elements of a parameter together",
    "adafactor": "Adafactor updates the elements of a parameter together",
    "lbfgs": "LBFGS cannot step slices of parameters without a closure",
    "sparse": "words.weight has a sparse gradient",
}
ADAM = dict.fromkeys(("sgd", "rmsprop", "own optimizer", "trust ratio", "adafactor", "lbfgs", "sparse"))
REFUSED = {
    "zero2": ALL,
    "gemini": {
        **ALL,
        **{kind: "Gemini supports only Adam and AdamW" for kind in ADAM},
        "direct backward": "Gemini cannot return gradients of weights",
        "gradient penalty": "Gemini's weights are gone in a second backward pass",
        "heads by rank": "different parameters",
        "target": "while Gemini shards them",
    },
}
#: Compared with another case of ddp, which cannot run it.
LIKE = {"reentrant": "checkpointed"}
#: How far weights and metrics may be from ddp's, on average: in bf16 Adam makes whole steps of gradients near 0.
BOUNDS = {"zero2": 1e-6, "gemini": 1e-2}
PRECISIONS = {"zero2": "32-true", "gemini": "bf16-mixed"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found, by case, in one start of two processes."""
    out = tmp_path_factory.mktemp("ordinary")
    strategies = {"ddp": dict(plugin="ddp_find_unused_parameters_true", without=[*ALL, *LIKE])}
    strategies |= {plugin: dict(plugin=plugin, precision=precision) for plugin, precision in PRECISIONS.items()}
    run_ranks(SCRIPT, out, json.dumps(strategies), logs=out)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("plugin", REFUSED)
def test_ordinary_modules_are_as_under_ddp_or_refused_on_all_ranks(found, plugin):
    wrong = []
    kinds = [name.removeprefix(f"{plugin} ") for name in found[0] if name.startswith(plugin)]
    assert len(kinds) >= 38
    for kind in kinds:
        here, there = (rank[f"{plugin} {kind}"] for rank in found)
        if words := REFUSED[plugin].get(kind):
            if not (isinstance(here, str) and words in here and here == there):
                wrong.append((kind, "is not refused", here, there))
            continue
        like = found[0][f"ddp {LIKE.get(kind, kind)}"]
        if isinstance(here, str) or isinstance(there, str) or here.keys() != like.keys():
            wrong.append((kind, here if isinstance(here, str) else here.keys() ^ like.keys(), like))
            continue
        for name, value in like.items():
            difference = (here[name].double() - value.double()).abs()
            if name.endswith("in_proj_bias"):  # the softmax ignores a key's bias: its gradient is rounding alone
                of_query, _, of_value = difference.chunk(3)
                difference = torch.cat([of_query, of_value])
            difference = difference.mean() if plugin == "gemini" else difference.max()
            if not difference <= BOUNDS[plugin]:
                wrong.append((kind, name, difference.item()))
            if not torch.equal(here[name], there[name]):
                wrong.append((kind, name, "differs by rank"))
    assert not wrong, "\n".join(map(str, wrong))


def test_rates_are_logged_by_the_optimizers_own_name(found):
    for plugin in ("ddp", *REFUSED):
        names = {key for key in found[0][f"{plugin} by two"] if key.startswith("rates")}
        assert names == {"rates lr-AdamW", "rates lr-Adam"}
