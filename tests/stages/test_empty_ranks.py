"""Ranks without a row: nothing waits for them, and what is measured is what one process measures."""

import json
import os
from pathlib import Path

import pytest
from processes import run_ranks
from reward_models import save_reward_adapter
from runs import load_script

from lightning_rlhf.models import load_tokenizer

SCRIPT = Path(__file__).parent / "run_empty_ranks.py"
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def place(tiny_model_dir, tmp_path_factory):
    """A folder with a reward model, whole and as adapters."""
    out = tmp_path_factory.mktemp("empty")
    saved = save_reward_adapter(tiny_model_dir, load_tokenizer(tiny_model_dir), out)
    for only, name in ((False, "reward model"), (True, "reward model adapter")):
        Path(saved[only]).rename(out / name)
    return out


@pytest.fixture(scope="module")
def one(place, tiny_model_dir):
    """``one(rows, ...)``: what one process finds, by stage and number of rows."""
    script = load_script(SCRIPT)

    def find(*counts):
        with open(os.devnull, "w") as script.log:
            return script.run_all(tiny_model_dir, place, [("one", n) for n in counts])

    return find


def start(place, model_dir, ranks, runs):
    """What each rank found."""
    run_ranks(SCRIPT, model_dir, place, json.dumps(runs), ranks=ranks, logs=place)
    return [json.loads((place / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def shared(metrics):
    """What all ranks know alike: of the last step, not of this rank's part of it."""
    return {name: value for name, value in metrics.items() if name.startswith(("val/", "test/"))}


def compare(found, wanted, place):
    """All that one process found, to 1e-4; under Gemini, in bf16, that it is there."""
    exact = "gemini" not in place
    for part in ("fit", "validate", "test"):
        have, want = shared(found[part]), shared(wanted[part])
        assert have.keys() == want.keys() and have, (place, part)
        for name, value in want.items() if exact else ():
            assert have[name] == pytest.approx(value, abs=1e-4), (place, part, name)
    assert len(found["predict"]) == len(wanted["predict"]), place
    for mine, other in zip(found["predict"], wanted["predict"], strict=True) if exact else ():
        assert mine == pytest.approx(other, abs=1e-4), place
    assert not exact or found["best"] == pytest.approx(wanted["best"], abs=1e-4)


def check(ranks, one):
    for name, found in ranks[0].items():
        if name == "interrupt":
            continue
        for other in ranks[1:]:
            for part in ("fit", "validate", "test"):
                assert shared(found[part]) == shared(other[name][part]), (name, part)
        stage, _, n = name.rsplit(", ", 2)
        compare(found, one[f"{stage}, one, {n}"], name)


@pytest.fixture(scope="module")
def two(place, tiny_model_dir):
    runs = [("ddp", 1), ("ddp", 3), ("colossalai_ddp", 1), ("colossalai_zero2", 3), ("colossalai_gemini", 1)]
    return start(place, tiny_model_dir, 2, runs)


@pytest.fixture(scope="module")
def three(place, tiny_model_dir):
    return start(place, tiny_model_dir, 3, [("ddp", 4)])


def test_two_ranks_find_what_one_process_finds(one, two):
    check(two, one(1, 3))


def test_a_signal_on_an_empty_rank_has_all_save(two):
    assert all(found["interrupt"] == {"step": 2, "saved": True} for found in two)


@pytest.mark.exhaustive
def test_three_ranks_find_what_one_process_finds_and_save_by_a_signal(one, three):
    check(three, one(4))
    assert all(found["interrupt"] == {"step": 2, "saved": True} for found in three)
