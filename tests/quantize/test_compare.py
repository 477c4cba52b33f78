"""Comparisons: what is compared, in which order it is kept, who wins; and that GPTQ beats rounding where it should."""

import copy
import itertools
import json
import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_rlhf.data.errors import DataError
from lightning_rlhf.models.loading import load_exported
from lightning_rlhf.quantize import compare as module
from lightning_rlhf.quantize.calibration import Rows
from lightning_rlhf.quantize.command import main
from lightning_rlhf.quantize.compare import FILE, Comparison, Result, check_folder, compare_methods, settings
from lightning_rlhf.quantize.grid import Grid
from lightning_rlhf.quantize.measure import quality, remember
from lightning_rlhf.quantize.methods import quantize

needs_gptqmodel = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel isn't installed")
NARROW, WIDE = Grid(4, 32, True), Grid(4, 64, False)


def result(method, grid, kl):
    return Result(method, grid, 10.0, kl, 1_250_000, 5.0, 2_000_000, 3.0, "there")


def comparison(*results):
    counts = {"rows": 2, "tokens": 9, "perplexity": 9.5}, {"rows": 1, "tokens": 5}
    return Comparison("model", "cpu", "float32", *counts, results=list(results))


def test_methods_come_on_every_grid_and_formats_of_their_own_once():
    assert settings(["nf4", "rtn", "gptq"], [NARROW, WIDE]) == [
        ("rtn", NARROW),
        ("gptq", NARROW),
        ("rtn", WIDE),
        ("gptq", WIDE),
        ("nf4", None),
    ]


def test_the_lowest_kl_wins_its_grid():
    found = comparison(
        result("none", None, 0.0),
        result("rtn", NARROW, 0.3),
        result("gptq", NARROW, 0.2),
        result("rtn", WIDE, 0.1),
        result("gptq", WIDE, 0.4),
        result("rtn", Grid(8, 64, True), 0.01),
        result("nf4", None, 0.05),
    )
    assert {grid: best.method for grid, best in found.winners().items()} == {NARROW: "gptq", WIDE: "rtn"}
    *table, narrow, wide = found.table().splitlines()
    assert narrow == f"{NARROW}: gptq is best, KL 0.20000 (rtn 0.30000)"
    assert wide == f"{WIDE}: rtn is best, KL 0.10000 (gptq 0.40000)"
    assert " ".join(table[0].split()) == "method bits group sym perplexity KL MB tokens/s peak MB seconds"
    assert table[2].split() == ["rtn", "4", "32", "yes", "10.0000", "0.30000", "1.25", "5.0", "2.0", "3.0"]
    assert table[4].split()[3] == "no" and len({len(line) for line in table}) == 1, "columns are aligned"


def test_an_unknown_peak_is_left_out_of_the_table():
    found = comparison(replace(result("rtn", NARROW, 0.3), peak_bytes=None))
    assert found.table().splitlines()[1].split()[-2:] == ["5.0", "3.0"]


def test_the_file_holds_all(tmp_path):
    found = comparison(result("none", None, 0.0), result("rtn", NARROW, 0.3), result("gptq", NARROW, 0.2))
    found.write(tmp_path / FILE)
    read = json.loads((tmp_path / FILE).read_text())
    assert read["results"][0]["grid"] is None and read["results"][2]["kl"] == 0.2
    assert read["results"][1]["grid"] == {"bits": 4, "group_size": 32, "sym": True}
    assert read["winners"] == [{"bits": 4, "group_size": 32, "sym": True, "method": "gptq", "kl": 0.2}]
    assert read["calibration"]["perplexity"] == 9.5
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_folder_with_something_else_is_refused(tmp_path):
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=rf"{tmp_path.name} exists and holds no compare\.json"):
        check_folder(tmp_path)
    with pytest.raises(FileExistsError):
        check_folder(tmp_path / "thesis.txt")
    (tmp_path / FILE).write_text("{}")
    check_folder(tmp_path)


@needs_gptqmodel
def test_a_comparison_measures_what_it_says(wide_stories, calibration, held_out, tmp_path):
    """Rounding, beside both models in memory."""
    said: list[str] = []
    rows = Rows(calibration[:2], list(held_out[:4]))
    found = compare_methods(wide_stories, tmp_path / "out", ["rtn"], [NARROW, WIDE], rows, report=said.append)
    own, *others = found.results
    original = AutoModelForCausalLM.from_pretrained(wide_stories).eval()

    def logprobs(grid=None):
        model = copy.deepcopy(original)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if grid and "proj" in name:
                    weight.copy_(grid.round(weight).values())
            return model(held_out[:4]).logits[:, :-1].log_softmax(-1)

    p, targets = logprobs(), held_out[:4, 1:, None]
    assert own.perplexity == pytest.approx(p.gather(-1, targets).mean().neg().exp().item(), rel=1e-4)
    assert own.kl == 0.0 and own.method == "none" and own.grid is None
    for grid, result in zip((NARROW, WIDE), others, strict=True):
        q = logprobs(grid)
        assert result.grid == grid
        assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=2e-3)
        assert result.perplexity == pytest.approx(q.gather(-1, targets).mean().neg().exp().item(), rel=1e-3)
        assert result.tokens_per_second > 0 and result.seconds > 0 and result.bytes < own.bytes / 2
    assert len(said) == 3 and said[1].startswith(f"rtn, {NARROW}: perplexity ")
    written = json.loads((tmp_path / "out" / FILE).read_text())
    assert [r["kl"] for r in written["results"]] == [r.kl for r in found.results]
    directories = {path.name for path in (tmp_path / "out").iterdir() if (path / "config.json").is_file()}
    assert directories == {"rtn-4bit-g32-sym", "rtn-4bit-g64-asym"}


@needs_gptqmodel
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_done_is_kept_when_a_method_ends_early(wide_stories, held_out, tmp_path, monkeypatch, error):
    quantize, calls, rows = module.quantize, [], Rows(list(held_out[:1]), list(held_out[1:2]))

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return quantize(*args, **kwargs)

    monkeypatch.setattr(module, "quantize", second_fails)
    said: list[str] = []
    with pytest.raises(error):
        compare_methods(wide_stories, tmp_path, ["rtn"], [NARROW, WIDE], rows, report=said.append)
    assert said[-1] == f"1 of 2 are done: {tmp_path / FILE}"
    written = json.loads((tmp_path / FILE).read_text())
    assert [r["method"] for r in written["results"]] == ["none", "rtn"] and written["results"][1]["kl"] > 0


def test_foreign_calibration_text_is_a_warning(wide_stories, held_out, tmp_path):
    """Random tokens against stories."""
    noise = [torch.randint(3, 512, (64,), generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    with pytest.warns(UserWarning, match=r"perplexity is .* on the calibration text and .* on the held-out rows"):
        compare_methods(wide_stories, tmp_path, [], [], Rows(noise, list(held_out[:4])), report=lambda line: None)


# --------------------------------------------------------------------------------------------------------- quality

GRIDS = [Grid(4, size, sym) for sym in (True, False) for size in (32, 64)]


@needs_gptqmodel
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (3, 4))])
def test_gptq_beats_rounding_on_every_grid(wide_stories, tell, held_out, tmp_path, seed):
    """In 4 bits, on stories that the model never told while it was calibrated."""
    rows = Rows(list(tell(32, 128, seed)), list(held_out))
    found = compare_methods(wide_stories, tmp_path, ["rtn", "gptq"], GRIDS, rows, report=lambda line: None)
    rounding, gptq = ([r for r in found.results if r.method == method] for method in ("rtn", "gptq"))
    assert [r.grid for r in rounding] == [r.grid for r in gptq] == GRIDS
    assert {grid: best.method for grid, best in found.winners().items()} == dict.fromkeys(GRIDS, "gptq")
    assert all(b.kl < 0.8 * a.kl and b.perplexity < a.perplexity for a, b in zip(rounding, gptq, strict=True))


@needs_gptqmodel
def test_gptq_loses_when_starved_and_the_check_says_so(wide_stories, calibration, held_out, tmp_path, monkeypatch):
    """64 tokens for a layer with 192 inputs, which needs 768."""
    grid, model = Grid(4, 64, False), AutoModelForCausalLM.from_pretrained(wide_stories).eval()
    few, enough, rows = [calibration[0][:64]], calibration[:6], list(held_out)
    message = "64 calibration tokens are too few for model.layers.0.mlp.down_proj with 192 inputs, which needs 4 per "
    for starved in (
        lambda: compare_methods(wide_stories, tmp_path / "out", ["rtn", "gptq"], [grid], Rows(few, rows)),
        lambda: quantize(wide_stories, tmp_path / "out", "gptq", grid, few),
    ):
        with pytest.raises(DataError, match=re.escape(f"{message}input: 704 more are needed.")):
            starved()
        assert not (tmp_path / "out").exists()
    reference, _ = remember(model, rows)
    monkeypatch.setattr("lightning_rlhf.quantize.methods.check_tokens", lambda rows, model: None)

    def kl(method, texts):
        made = quantize(wide_stories, tmp_path / f"{method}-{len(texts)}", method, grid, texts)
        return quality(load_exported(made, "float32"), rows, reference).kl

    assert kl("gptq", enough) < kl("rtn", []) < kl("gptq", few)


# --------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def texts(tmp_path):
    """Forty stories of the same beginnings, as plain texts."""
    path = tmp_path / "stories.txt"
    names, kinds = ("Lily", "Tom", "Ben", "Sue", "Max", "Mia", "Sam", "Amy"), ("big", "sad", "red", "fat", "old")
    pairs = itertools.product(names, kinds)
    path.write_text("".join(f"Once upon a time there was a {kind} dog. {name} liked it.\n" for name, kind in pairs))
    return str(path)


@needs_gptqmodel
def test_the_command_compares_and_names_the_winner(wide_stories, texts, tmp_path, capsys):
    out = tmp_path / "out"
    grids = ["--group_size", "32", "64", "--sym", "true", "false"]
    main([str(wide_stories), "--compare", "rtn", *grids, "--data", texts, "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"All figures: {out / FILE}"
    table = [line.split() for line in lines if line.startswith("rtn  ")]
    assert [row[:4] for row in table] == [["rtn", "4", g, s] for s in ("yes", "no") for g in ("32", "64")]
    written = json.loads((out / FILE).read_text())
    assert written["held_out"]["rows"] + written["calibration"]["rows"] == 40
    assert [f"{r['kl']:.5f}" for r in written["results"][1:]] == [row[5] for row in table]
    assert written["winners"] == [], "nobody wins alone"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--compare", "rtn", "gtpq"], "there is no method gtpq; did you mean gptq? All: "),
        (["--compare", "rtn", "--group_size", "64", "128", "--data", "{texts}"], "q_proj has 64 inputs, which "),
        (["--group_size", "32", "64"], "several values of --group_size or --sym are for --compare. Give one."),
        (["--compare", "rtn", "--group_size", "32", "--data", "{texts}", "--max-held-out", "0"], "--max-held-out must"),
        (["--compare", "gptq", "--group_size", "32", "--data", "{texts}", "--max-rows", "2"], "calibration tokens are"),
        (
            ["--compare", "rtn", "--group_size", "32"],
            "657 tokens are over the model's context of 512. Set --on-bad-row skip to leave such rows out",
        ),
        (["--group_size", "128"], "q_proj has 64 inputs, which "),  # before any row of the default data is read
        (["--method", "rtn", "--group_size", "32", "--data", "{texts}"], "--data is for gptq, autoround: rtn would ig"),
        (["--method", "nf4", "--held-out", "{texts}"], "--held-out is for gptq, autoround: nf4 would ignore it."),
        (
            ["--method", "int8", "--bits", "8"],
            "--bits is for gptq, autoround, rtn: int8 would ignore it.",
        ),
        (["--compare", "rtn", "nf4", "--steps", "9", "--group_size", "32"], "--steps is for autoround: rtn, nf4 would"),
    ],
)
def test_a_mistake_of_the_command_is_one_line_before_any_work(wide_stories, texts, tmp_path, arguments, message):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main([str(wide_stories), *(a.format(texts=texts) for a in arguments), "--out", str(out)])
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not out.exists()


def test_a_folder_of_something_else_is_refused_before_any_work(wide_stories, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="exists and holds no"):
        main([str(wide_stories), "--compare", "rtn", "--group_size", "32", "--out", str(tmp_path / "out")])


def test_the_command_takes_a_run(stories_model_dir, wide_stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for run, model in (("good", wide_stories), ("narrow", stories_model_dir)):
        (tmp_path / run / "hf").mkdir(parents=True)
        (tmp_path / run / "hf" / "last").symlink_to(model)
    main(["good", "--method", "rtn", "--group_size", "32", "--out", "out"])
    assert capsys.readouterr().out.startswith("good/hf/last: rtn, 4 bits, groups of 32, symmetric\nout: ")
    for arguments, message in (
        (
            ["narrow"],
            "gate_proj has 172 outputs, but 4-bit codes need a multiple of 8. Use nf4 or int8, which",
        ),
        ([f"{tmp_path}/god"], f"There is no directory {tmp_path}/god; did you mean {tmp_path}/good?"),
        (["out"], "out is already quantized (gptq)."),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", "other"])
        assert message in str(stop.value) and "\n" not in str(stop.value)
