"""The page says of several runs what their logs say, of all of them together, and is safe to open."""

import csv
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_rlhf.cli import main
from lightning_rlhf.report import Curve, StageReport, write_report
from lightning_rlhf.report.charts import number
from lightning_rlhf.report.compare import differing, page

NASTY = "</script><script>alert('x')</script> & \"你好\" <!-- ]]> http://a.b/c.js"


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """Two short PPO runs and one of SFT, with reports, logs and answers; a third of PPO with a log alone."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"instruction": f"question {i}", "output": "fox dog"[: 3 + i % 4]} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, stage, extra in (
        ("a", "PPO", ["--model.kl.coef", "0.1"]),
        ("b", "PPO", ["--model.kl.coef", "0.2", "--model.lora.r", "4"]),
        ("bare", "PPO", []),
        ("sft", "SFT", []),
    ):
        data = "PromptDataModule" if stage == "PPO" else "InstructionDataModule"
        online = ["--model.reward", "lightning_rlhf.rewards.verifiers.length",
                  "--model.rollout.sampling.max_new_tokens", "6"] if stage == "PPO" else []  # fmt: skip
        callbacks = ["SampleCompletions", "--trainer.callbacks.max_new_tokens", "5", "--trainer.callbacks+", "Report"]
        main([
            "fit", "--model", f"{stage}Module", "--model.pretrained", str(tiny_model_dir), *online, *extra,
            "--data", data, "--data.train", str(folder / "rows.jsonl"), "--data.batch_size", "4",
            "--data.val_fraction", "0.25", "--data.cache_dir", str(folder / "cache"),
            "--trainer.accelerator", "cpu", "--trainer.max_steps", "3", "--trainer.val_check_interval", "1",
            "--trainer.log_every_n_steps", "1", "--trainer.default_root_dir", str(folder / name),
            "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder / name),
            "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false",
            *(["--trainer.callbacks+", *callbacks] if name != "bare" else []),
        ])  # fmt: skip
    return folder


@pytest.fixture
def compared(runs, parse, tmp_path, capsys):
    """``compared(name, ..., *options)``: the page of some of them."""

    def compare(*names, options=()):
        main(["report", *(str(runs / name) for name in names), "--out", str(tmp_path / "out" / "c.html"), *options])
        assert str(tmp_path / "out" / "c.html") in capsys.readouterr().out
        return parse(tmp_path / "out" / "c.html")

    return compare


def logged(folder):
    """The last value of each metric, by the logger's own file."""
    (path,) = folder.rglob("metrics.csv")
    last = {}
    for row in csv.DictReader(path.open()):
        last |= {name: float(text) for name, text in row.items() if text and name not in ("epoch", "step")}
    return last


def tables(html):
    """Rows of texts, of each table."""
    found, rows = [], []
    for element in html.elements:
        if element["tag"] == "table":
            rows = []
            found.append(rows)
        elif element["tag"] == "tr":
            rows.append([])
        elif element["tag"] in ("th", "td"):
            rows[-1].append(element["text"])
    return found


def table(html, corner):
    """The one with this text in its corner, by the first cells of its rows."""
    [rows] = [rows for rows in tables(html) if rows[0][0] == corner]
    return {first: rest for first, *rest in rows}


def test_values_are_the_loggers(compared, runs):
    html = compared("a", "b", "bare")
    values = table(html, "metric")
    assert values.pop("metric") == ["a", "b", "bare"]
    wanted = [logged(runs / name) for name in ("a", "b", "bare")]
    assert len(values) > 30 and values.keys() == wanted[0].keys()
    for name, row in values.items():
        for text, last in zip(row, wanted, strict=True):
            assert float(text.replace(",", "")) == pytest.approx(last[name], rel=2e-3), name
    figures = {e["text"].split()[0] for e in html.all("figcaption")}
    assert figures == {*values, "train/score"}  # and over KL
    legends = [e["text"] for e in html.all("ul", class_="legend")]
    kl = [number(each["train/kl"]) for each in wanted]
    assert "".join(f"{name} {value}" for name, value in zip(("a", "b", "bare"), kl, strict=True)) in legends
    curves = [e for e in html.all("figure") if e["text"].startswith("train/kl a")]
    assert len(curves) == 1 and html.texts("h2") == ["PPO"] and not html.all("nav")


def test_settings_that_differ_are_shown_and_all_are_folded_away(compared):
    html = compared("a", "b")
    few, whole = ({first: rest for first, *rest in rows} for rows in tables(html) if rows[0] == ["setting", "a", "b"])
    assert few.pop("setting") == ["a", "b"]
    assert few.pop("Model.kl.coef") == ["0.1", "0.2"] and few.pop("Model.lora.r") == ["None", "4"]
    assert few.keys() == {name for name in whole if name.startswith("Model.lora.") and name != "Model.lora.r"}
    first, second = whole["Model.updates.epochs"]
    assert first == second and whole["Trainer.max_steps"] == ["3", "3"]
    html = compared("a", "bare")  # of one the report tells, of the other the config
    few = next({first: rest for first, *rest in rows} for rows in tables(html) if rows[0][0] == "setting")
    assert few["Model.kl.coef"] == ["0.1", "0.05"]
    assert {name for name in few if name.startswith("Model")} == {"Model.kl.coef"}


def test_headlines_are_first_last_and_best(parse):
    values = [1.0, 4.0, 2.0, 3.0]
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    runs = {"a": StageReport("X", status="finished", curves={"val/score": curve, "val/loss": curve, "train/kl": curve})}
    head = table(parse(page("t", {"X": runs})), "run")
    assert head["run"] == ["val/score", "train/kl", "val/loss", "how it went", "from", "to"]
    assert head["a"][:4] == ["1 → 3best 4 at 2", "1 → 3", "1 → 3best 1 at 1", "finished"]


def test_answers_stand_side_by_side(compared, runs):
    html = compared("a", "b", "bare")
    latest = {}
    for name in ("a", "b"):
        for line in (runs / name / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            latest.setdefault(row["prompt"], {})[name] = row
    assert html.texts("p", class_="prompt") == list(latest)
    notes = [e["text"] for e in html.all("p", class_="note") if "details" not in e["inside"]]
    for rows in latest.values():
        a, b = (f"{n} · step 3 · score {number(r['score'])} · kl {number(r['kl'])}" for n, r in rows.items())
        at = notes.index(a)
        assert notes[at : at + 3] == [a, b, "bare · –"]
    shown = [e["text"] for e in html.all("p", class_="text") if "details" not in e["inside"]]
    ends = {True: "", False: " …"}
    assert shown == [r["completion"].strip() + ends[r["ended"]] for rows in latest.values() for r in rows.values()]
    firsts = [e for e in html.all("p", class_="note") if "details" in e["inside"] and "step 0" in e["text"]]
    assert len(firsts) == 2 * len(latest)


def test_reward_stands_over_kl_for_online_stages_alone(compared, runs):
    html = compared("a", "b", "sft")
    assert html.texts("h2") == ["PPO", "SFT"] and html.texts("h3").count("Reward against KL") == 1
    assert [e["text"] for e in html.all("a")] == ["PPO", "SFT"]
    assert {e["@href"][1:] for e in html.all("a")} == {e["@id"] for e in html.all("section")}
    [dots_a, dots_b] = html.all("path", class_="dots")
    assert dots_a["@d"].count("M") == dots_b["@d"].count("M") == 3
    assert {e["@class"] for e in html.all("i")} == {"c0 solid", "c1 solid", "c2 solid"}  # a run's in all stages


def test_the_page_needs_nothing_else_and_no_text_becomes_markup(parse, tmp_path):
    (tmp_path / "a<b> & 'c'").mkdir()
    (tmp_path / "plain").mkdir()
    for folder, value in ((tmp_path / "a<b> & 'c'", NASTY), (tmp_path / "plain", "x")):
        text = json.dumps("train/" + NASTY.replace('"', "'")) + ",step\n1.0,0\n2.0,1\n"
        (folder / "metrics.csv").write_text(text)
        config = {"model": {"class_path": "M", "init_args": {NASTY: value, "s": value}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
        answer = dict(step=1, prompt=NASTY, completion=NASTY, ended=False, score=0.5)
        (folder / "samples.jsonl").write_text(json.dumps(answer) + "\n")
    out = tmp_path / "out.html"
    main(["report", str(tmp_path / "a<b> & 'c'"), str(tmp_path / "plain"), "--out", str(out), "--title", NASTY])
    html = parse(out)
    assert html.texts("h1") == html.texts("title") == [NASTY]
    assert not html.all("script") and html.texts("p", class_="prompt") == [NASTY]
    assert html.texts("p", class_="text") == [NASTY + " …"] * 4
    assert table(html, "metric")["metric"] == ["a<b> & 'c'", "plain"]
    [few, _] = [rows for rows in tables(html) if rows[0][0] == "setting"]
    assert few[1:] == [[f"Model.{NASTY}", NASTY, "x"], ["Model.s", NASTY, "x"]]
    assert {e["tag"] for e in html.elements}.isdisjoint({"script", "link", "img", "iframe", "base", "object", "embed"})
    assert not [k for e in html.elements for k in e if k.startswith(("@on", "@src", "@style"))]
    assert {e["@href"][0] for e in html.all("a")} <= {"#"}
    (style,) = html.texts("style")
    assert "prefers-color-scheme: dark" in style and not re.search(r"url\(|@import|//", style)
    assert html.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["@content"].startswith("default-src 'none'")


def run(seed, values, **settings):
    rows = [(name, str(value), False) for name, value in {"seed": seed, **settings}.items()]
    curve = Curve()
    for step, value in values:
        curve.add(step, value)
    return StageReport("X", settings={"Model": rows}, curves={"train/kl": curve})


def test_seeds_are_drawn_as_their_mean_and_range(parse):
    runs = {
        "a": run(0, [(1, 1.0), (2, 2.0), (3, 9.0)], lr=1),
        "b": run(1, [(1, 3.0), (2, 6.0)], lr=1),
        "c": run(1, [(1, 5.0), (2, 5.0)], lr=2),
        "d": StageReport("X", curves={"train/kl": Curve([[1, 0.0]], 1, 1, [1, 0.0])}),
        "e": StageReport("X", curves={"train/kl": Curve([[1, 0.0]], 1, 1, [1, 0.0])}),
    }
    html = parse(page("t", {"X": runs}, seeds=True))
    assert html.texts("li") == ["a (2 seeds) 4", "c 5", "d 0", "e 0"]
    [band] = html.all("polygon", class_="band")
    heights = [float(pair.split(",")[1]) for pair in band["@points"].split()]
    curve = html.all("polyline", class_="curve")[0]["@points"].split()
    means = [float(pair.split(",")[1]) for pair in curve]
    low, high = heights[:2], heights[:1:-1]
    assert means == pytest.approx([(a + b) / 2 for a, b in zip(low, high, strict=True)], abs=0.1)
    assert high[0] < means[0] < low[0] and low[0] - high[0] == pytest.approx((low[1] - high[1]) / 2, abs=0.1)
    assert len(parse(page("t", {"X": runs})).texts("li")) == 5


def test_a_setting_differs_where_two_runs_are_known_to_have_it_otherwise():
    settings = ({"lora": None, "x": 1}, {"lora.r": 8, "x": 1}, {"y": 3})
    runs = {}
    for i, each in enumerate(settings):
        rows = [(name, str(value), False) for name, value in each.items()]
        runs[str(i)] = StageReport("X", settings={"Model": rows})
    assert differing(runs) == {"Model.lora.r": ["None", "8", None]}


def test_more_runs_than_lines_that_can_be_told_apart_are_refused():
    runs = {str(i): run(0, [(1, 1.0)]) for i in range(25)}
    with pytest.raises(ValueError, match=r"25 runs are too many for one page\. Compare at most 24"):
        page("t", {"X": runs})


def test_it_writes_over_comparisons_alone(runs, tmp_path, capsys):
    arguments = ["report", str(runs / "a"), str(runs / "b"), "--out"]
    out = tmp_path / "c.html"
    for _ in range(2):
        main([*arguments, str(out)])
    (tmp_path / "mine.html").write_text("<h1>Mine</h1>")
    write_report(tmp_path / "r.html", "a run's", [])
    for name in ("mine.html", "r.html"):
        before = (tmp_path / name).read_text()
        with pytest.raises(SystemExit) as stop:
            main([*arguments, str(tmp_path / name)])
        assert stop.value.code == 1 and f"{name} exists and is not a comparison" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == before


def test_errors_are_told_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path), "--out", str(tmp_path / "c.html")])
    assert stop.value.code == 1 and not (tmp_path / "c.html").exists()
    error = capsys.readouterr().err
    assert error.startswith("lightning-rlhf report: ") and "neither report.html" in error and error.count("\n") == 1


def test_it_needs_no_framework():
    code = "import sys, lightning_rlhf.report.compare; print(*(m for m in ('torch', 'lightning') if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("iterations, drawn", [(4, False), (19, False), (20, True), (40, True)])
def test_the_trend_of_reward_over_kl_is_no_scribble(iterations, drawn, parse, tmp_path):
    """It goes from the first to the last, where the dots go to and fro; through few dots there is none."""
    steps = range(iterations)
    kl = [0.2 * i + (0.9 if i % 2 else 0.0) + (0.5 if i % 3 else 0.0) for i in steps]
    rows = "".join(f"{i},{i / 10 + (i % 2)},{kl[i]}\n" for i in steps)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,train/score,train/kl\n" + rows)
    main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out.html")])
    html = (tmp_path / "out.html").read_text()
    figure = parse(html[html.index('<div class="one">') : html.index("</figure>") + len("</figure></div>")])
    assert figure.all("path", class_="dots")[0]["@d"].count("M") == iterations
    assert "at" in figure.all("svg")[0]["@aria-label"]
    lines = figure.all("polyline")
    assert bool(lines) == drawn
    if drawn:
        across = [float(place.split(",")[0]) for place in lines[0]["@points"].split()]
        back = sum(max(0.0, a - b) for a, b in itertools.pairwise(across))
        assert len(across) == iterations and back < 0.05 * (across[-1] - across[0])
