"""Draws what the studies of ``learning.py`` found, and what ``grpo.py --plot`` measured.

pip install -e '.[bench]'
python benchmarks/plots.py              # benchmarks/results/ to docs/images/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent))

from learning import RESULTS, ROOT, smooth, turning_point

IMAGES = ROOT / "docs" / "images"
PARTS = {"gold": "#b8860b", "proxy": "#3465a4", "variety": "#5c7a29"}
#: What ``grpo.py --plot`` varies.
SIZES = {
    "completions": "completions of the prompt",
    "prompt": "tokens of the prompt",
    "vocabulary": "vocabulary",
    "width": "width of the model",
}
#: Studies with a learning curve: what they are called, and their color.
CURVES = {
    "ppo_stories260k": ("kl_coef 0.03", "#3465a4"),
    "ppo_stories260k_head": ("its critic as a head", "#c17d11"),
    "ppo_stories260k_large_kl": ("kl_coef 10", "#8b949e"),
}


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, of each study and seed the last."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(row["study"], row["seed"]): row for row in rows}.values())


def save(figure: Any, image: Path) -> None:
    """As SVG, the same file at every run."""
    image.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": image.stem}):
        figure.savefig(image, metadata={"Date": None})
    pyplot.close(figure)


def over_optimization(runs: Sequence[dict[str, Any]], image: Path) -> None:
    """Gold score, proxy score and variety of words against KL, a line a run, and where the gold score is highest."""
    figure, panels = pyplot.subplots(len(PARTS), 1, sharex=True, figsize=(7, 8), layout="constrained")
    for (name, color), panel in zip(PARTS.items(), panels, strict=True):
        for run in runs:
            curve = run["over_optimization"]
            kl, scores = [point["kl"] for point in curve], [point[name] for point in curve]
            panel.plot(kl, scores, color=color, alpha=0.3, linewidth=0.7)
            panel.plot(smooth(kl), smooth(scores), color=color, label=f"seed {run['seed']}")
        panel.set_ylabel("distinct words" if name == "variety" else f"{name} score")
        panel.grid(alpha=0.3)
    for i, run in enumerate(runs):
        kl, gold = turning_point(run["over_optimization"])
        panels[0].plot(kl, gold, "o", color="black", markersize=4)
        text = f"seed {run['seed']}: highest, {gold:.2f}, at {kl:.0f} nats"
        panels[0].text(0.98, 0.06 + 0.09 * (len(runs) - 1 - i), text, transform=panels[0].transAxes, ha="right")
        for panel in panels[1:]:
            panel.axvline(kl, color="black", linewidth=0.8, linestyle=":")
    panels[0].set_title("PPO against a learned reward (proxy), and what it stands for (gold)")
    panels[-1].set_xlabel("KL from the start, nats a completion")
    save(figure, image)


def learning_curve(runs: Sequence[dict[str, Any]], image: Path) -> None:
    """Score and KL by iterations, a line a run of the studies shown; the first of each study has the label."""
    runs = [run for run in runs if run["study"] in CURVES]
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    labeled: set[str] = set()
    for run in runs:
        label, color = CURVES[run["study"]]
        new = None if run["study"] in labeled else label
        labeled.add(run["study"])
        iterations = range(1, len(run["learning_curve"]) + 1)
        for panel, name in zip(panels, ("score", "kl"), strict=True):
            values = [point[name] for point in run["learning_curve"]]
            panel.plot(iterations, values, color=color, linewidth=1.2, label=new)
    seeds = len({run["seed"] for run in runs})
    panels[0].set_title(f"happier stories by PPO, {seeds} seed{'s' * (seeds > 1)}", fontsize=11)
    panels[0].set_ylabel("mean score, by VADER")
    panels[1].set_title("and what it costs", fontsize=11)
    panels[1].set_ylabel("KL, nats a completion")
    panels[1].legend(frameon=False)
    for panel in panels:
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
    save(figure, image)


def costs(runs: Sequence[dict[str, Any]], image: Path) -> None:
    """Cost of a completion's update as a tree, padded, and by TRL where it was measured; a panel for each size."""
    points = runs[-1]["costs"]
    figure, panels = pyplot.subplots(2, 2, figsize=(8, 6), layout="constrained")
    for (varied, label), panel in zip(SIZES.items(), panels.flat, strict=True):
        own = [point for point in points if point["varied"] == varied]
        for name, color in (("trl", "#c17d11"), ("padded", "#8b949e"), ("tree", "#3465a4")):
            there = [point for point in own if name in point]
            values = [1000 * point[name] for point in there]
            said = "TRL" if name == "trl" else name
            panel.plot([point["size"] for point in there], values, "o-", color=color, markersize=4, label=said)
        panel.set_xscale("log")
        panel.set_xticks([point["size"] for point in own], [f"{point['size']:,}" for point in own], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_ylim(bottom=0)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    for left in panels[:, 0]:
        left.set_ylabel("CPU ms of an update / completions")
    panels[0][1].legend(frameon=False)
    save(figure, image)


PICTURES = {"over_optimization": over_optimization, "learning_curve": learning_curve, "costs": costs}


def main(arguments: list[str] | None = None) -> None:
    """Draws what there are results of, and says where the gold turned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS.parent)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    for name, draw in PICTURES.items():
        if (options.results / f"{name}.jsonl").exists():
            runs = read_runs(options.results / f"{name}.jsonl")
            draw(runs, options.images / f"{name}.svg")
            if name == "over_optimization":
                say(runs)


def say(runs: Sequence[dict[str, Any]]) -> None:
    """Where the gold turned."""
    for run in runs:
        curve = run["over_optimization"]
        kl, gold = turning_point(curve)
        last = smooth([point["gold"] for point in curve])[-1]
        print(f"seed {run['seed']}: gold {curve[0]['gold']:.2f}, {gold:.2f} at {kl:.1f} nats, {last:.2f} at the end")


if __name__ == "__main__":
    main()
