"""Draws what the studies of ``learning.py`` found.

pip install -e '.[bench]'
python benchmarks/plots.py              # benchmarks/results/over_optimisation.jsonl to docs/images/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from learning import RESULTS, ROOT, smooth, turning_point

CURVES = RESULTS.with_name("over_optimisation.jsonl")
IMAGE = ROOT / "docs" / "images" / "over_optimisation.svg"
PARTS = {"gold": "#b8860b", "proxy": "#3465a4", "variety": "#5c7a29"}


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, of each study and seed the last."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(row["study"], row["seed"]): row for row in rows}.values())


def draw(runs: Sequence[dict[str, Any]], image: Path) -> None:
    """Gold score, proxy score and variety of words against KL, a line a run, and where the gold score is highest."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "over_optimisation"  # the same file at every run
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(PARTS), 1, sharex=True, figsize=(7, 8), layout="constrained")
    for (name, colour), panel in zip(PARTS.items(), panels, strict=True):
        for run in runs:
            curve = run["over_optimisation"]
            kl, scores = [point["kl"] for point in curve], [point[name] for point in curve]
            panel.plot(kl, scores, ".", color=colour, alpha=0.25, markersize=3)
            panel.plot(smooth(kl), smooth(scores), color=colour, label=f"seed {run['seed']}")
        panel.set_ylabel("distinct words" if name == "variety" else f"{name} score")
        panel.grid(alpha=0.3)
    for run in runs:
        kl, gold = turning_point(run["over_optimisation"])
        panels[0].plot(kl, gold, "o", color="black")
        panels[0].annotate(
            f"seed {run['seed']}: {gold:.2f} at {kl:.0f} nats", (kl, gold), xytext=(6, 6), textcoords="offset points"
        )
        for panel in panels[1:]:
            panel.axvline(kl, color="black", linewidth=0.8, linestyle=":")
    panels[0].set_title("PPO against a learned reward (proxy), and what it stands for (gold)")
    panels[-1].set_xlabel("KL from the start, nats a completion")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Draws, and says where the gold turned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--image", type=Path, default=IMAGE)
    options = parser.parse_args(arguments)
    runs = read_runs(options.curves)
    draw(runs, options.image)
    for run in runs:
        curve = run["over_optimisation"]
        kl, gold = turning_point(curve)
        last = smooth([point["gold"] for point in curve])[-1]
        print(f"seed {run['seed']}: gold {curve[0]['gold']:.2f}, {gold:.2f} at {kl:.1f} nats, {last:.2f} at the end")


if __name__ == "__main__":
    main()
