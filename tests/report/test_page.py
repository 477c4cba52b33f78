"""A run's page: what comes first, and that no text in it does harm."""

import math
import os

import pytest

from lightning_rlhf.report import Curve, StageReport, read_report, write_report
from lightning_rlhf.report.page import page

NASTY = "</script><script>alert('x')</script> & \"你好\" <!-- ]]> \ud800"


def test_of_ppo_reward_and_kl_come_first(parse):
    names = ["train/seconds", "val/loss", "train/loss", "train/kl", "train/ratio_max", "train/score", "other",
             *(f"train/more{i}" for i in range(9))]  # fmt: skip
    stage = StageReport("PPO", curves={name: Curve([[1, 1.0], [2, 2.5]], 1, 2, [2, 2.5]) for name in names})
    html = parse(page("t", [stage]))
    order = [text.split()[0] for text in html.texts("figcaption")]
    assert order[:5] == ["train/score", "train/kl", "train/loss", "train/seconds", "train/ratio_max"]
    assert sorted(order) == sorted(names)
    shown = [e["text"].split()[0] for e in html.all("figcaption") if "details" not in e["inside"]]
    assert len(shown) == 6 + 1 + 1 and shown[6:] == ["val/loss", "other"]
    assert html.texts("dt") == ["train/score", "train/kl", "val/loss"]
    assert html.texts("dd")[0] == "1 → 2.5"


def test_no_text_becomes_markup(parse, tmp_path):
    answers = [dict(step=s, prompt=NASTY, completion=NASTY, ended=True, score=0.25) for s in (0, 5)]
    stage = StageReport(
        NASTY,
        status=NASTY,
        settings={NASTY: [(NASTY, NASTY, True)]},
        curves={NASTY: Curve([[1, 1.0]], 1, 1, [1, 1.0])},
        samples={NASTY: answers},
    )
    write_report(tmp_path / "r.html", NASTY, [stage, StageReport("second")])
    html = parse(tmp_path / "r.html")
    assert [script["@type"] for script in html.all("script")] == ["application/json"]
    shown = NASTY.replace("\ud800", "?")
    assert html.texts("h1") == [shown] and html.texts("p", class_="prompt") == [shown]
    assert html.texts("p", class_="text") == [shown.strip()] * 2
    assert html.texts("p", class_="note").count("step 5 · score 0.25") == 1
    assert not [k for e in html.elements for k in e if k.startswith("@on")]
    title, (first, _) = read_report(tmp_path / "r.html")
    assert title == NASTY and first == stage  # to the last character


def test_a_write_that_fails_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    write_report(path, "old", [])

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, "new", [])
    assert read_report(path) == ("old", []) and list(tmp_path.iterdir()) == [path]


def test_what_is_no_number_is_said(parse):
    stage = StageReport("odd", curves={"x": Curve(points=[[1, math.nan]], seen=1, last=[1, math.nan])})
    assert "nan" in parse(page("t", [stage])).texts("td")


def test_what_is_no_report_is_refused(tmp_path):
    (tmp_path / "a.html").write_text("<h1>Mine</h1>")
    with pytest.raises(ValueError, match=r"a\.html is not a report"):
        read_report(tmp_path / "a.html")
