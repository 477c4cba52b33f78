"""Draws the pictures of the documentation that are no measurements.

pip install -e '.[test]'
python docs/pictures.py                 # to docs/images/
"""

from __future__ import annotations

import argparse
import io
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from lightning_rlhf import (
    InstructionDataModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)
from lightning_rlhf.data import Branch, PackedBatch, Tree, pack, pad

IMAGES = Path(__file__).parent / "images"
#: Of each tree: its prompt and its completions.
PROMPT, COMPLETION = ("#7ba7d6", "#e3a765"), ("#cfe0f3", "#f8e3c8")
STAGE, NOTHING = "#dcebdc", "#eaeef2"
INK, FAINT, PAPER = "#24292f", "#8b949e", "#ffffff"
#: Each color's twin where the reader's page is dark.
DARK = {
    PAPER: "#0d1117",
    INK: "#e6edf3",
    FAINT: "#7d8590",
    PROMPT[0]: "#2f5f95",
    PROMPT[1]: "#1d3a5c",
    COMPLETION[0]: "#8a5a1c",
    COMPLETION[1]: "#54391a",
    STAGE: "#22402a",
    NOTHING: "#21262d",
}

WORDS = ["", "Name", "a", "city", ".", "Paris", "Oslo", "It", "is", "Rome", "Say", "hi", "Hi", "!", "Hello", "■"]
TREES = [  # ■ ends an answer
    (["Name", "a", "city", "."], [["Paris", ".", "■"], ["Oslo", "■"], ["It", "is", "Rome", "■"]]),
    (["Say", "hi", "."], [["Hi", "!", "■"], ["Hello", "■"]]),
]


def example() -> PackedBatch:
    """The batch of the picture: two prompts, the first with three completions, the second with two."""
    return pack([Tree(ids(prompt), [Branch(ids(answer)) for answer in answers]) for prompt, answers in TREES])


def ids(words: list[str]) -> list[int]:
    """Token ids, with the words as the vocabulary."""
    return [WORDS.index(word) for word in words]


def save(figure: Any, image: Path) -> None:
    """As SVG with an opaque ground, light or dark as the reader's page is; the same file at every run."""
    image.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": image.stem}):
        figure.savefig(text, format="svg", metadata={"Date": None}, facecolor=PAPER)
    pyplot.close(figure)
    rules = "".join(
        f'[style*="{what}: {light}"] {{{what}: {dark} !important}}\n'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"@media (prefers-color-scheme: dark) {{\n{rules}}}\n</style>"
    image.write_text(text.getvalue().replace("</style>", style, 1), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the packed batch


def packed(image: Path) -> None:
    """The packed row, the padded rectangle of the same trees, and what each token sees."""
    batch, padded = example(), pad(example())
    colors = [PAPER] * batch.num_tokens
    for number, (prompt, branches) in enumerate(batch.forest.trees):
        for shades, spans in ((PROMPT, [prompt]), (COMPLETION, branches)):
            for span in spans:
                colors[span.start : span.start + span.length] = [shades[number]] * span.length

    figure = pyplot.figure(figsize=(10.5, 7.4))
    draw_row(axes(figure, (0.06, 0.7, 0.91, 0.25), batch.num_tokens, (-1.25, 2.2)), batch, colors)
    height, width = padded.input_ids.shape
    draw_rectangle(axes(figure, (0.03, 0.15, 0.4, 0.44), width, (0, height)), batch, colors)
    draw_mask(axes(figure, (0.55, 0.09, 0.42, 0.5), batch.num_tokens, (0, batch.num_tokens)), batch, colors)
    save(figure, image)


def draw_row(panel: Any, batch: PackedBatch, colors: list[str]) -> None:
    """The tokens with their positions, and from which place each scored one is predicted."""
    title(panel, f"one packed row: {batch.num_tokens} tokens, each computed once")
    for place, (token, position) in enumerate(zip(batch.input_ids, batch.position_ids, strict=True)):
        cell(panel, place, 0, colors[place], WORDS[token])
        note(panel, place + 0.5, 1.35, str(position.item()), FAINT, ha="center")
    note(panel, -0.2, 1.35, "position", FAINT, ha="right")
    for predictor, place in zip(batch.predictor.tolist(), scored_places(batch), strict=True):
        bend = -1.1 / (place - predictor) ** 0.6
        arrow(panel, (predictor + 0.5, 0), (place + 0.5, 0), connectionstyle=f"arc3,rad={bend}", linewidth=0.9, head=7)
    text = (
        f"arrows: which token predicts which. The loss reads the {batch.num_scored} tokens that an arrow points at; "
        "a prompt's last token predicts the first of each answer"
    )
    note(panel, 0, 2.1, text)


def draw_rectangle(panel: Any, batch: PackedBatch, colors: list[str]) -> None:
    """The trees padded, with prompts that are there again, and padding."""
    padded = pad(batch)
    again = 0
    pieces = [(p, b, i > 0) for p, branches in batch.forest.trees for i, b in enumerate(branches)]
    for y, ((prompt, branch, repeated), mask) in enumerate(zip(pieces, padded.attention_mask.tolist(), strict=True)):
        places = [
            *range(prompt.start, prompt.start + prompt.length),
            *range(branch.start, branch.start + branch.length),
        ]
        assert len(places) == sum(mask)
        for x, real in enumerate(mask):
            hatched = bool(real) and repeated and x < prompt.length
            again += hatched
            color, word = (colors[places[x]], WORDS[padded.input_ids[y, x]]) if real else (NOTHING, "")
            cell(panel, x, y, color, word, hatched)
    padding = int((padded.attention_mask == 0).sum())
    title(panel, f"the same, padded: {padded.input_ids.numel()} places")
    note(panel, 0, len(pieces) + 0.35, f"hatched: {again} prompt tokens that are computed again")
    note(panel, 0, len(pieces) + 0.75, f"gray: {padding} places of padding")


def draw_mask(panel: Any, batch: PackedBatch, colors: list[str]) -> None:
    """Queries below each other, keys side by side, by the attention calls of the forest."""
    title(panel, "what each token sees")
    for call in batch.forest.calls:
        starts = accumulate(call.lengths, initial=call.own.start)
        for start, length in zip(starts, call.lengths, strict=False):
            for query in range(start, start + length):
                runs = [(call.prefix.start, call.prefix.length)] if call.prefix else []
                for key, width in [*runs, (start, query - start + 1)]:
                    run = Rectangle((key, query), width, 1, facecolor=colors[key], edgecolor="none", clip_on=False)
                    panel.add_patch(run)
    size = batch.num_tokens
    for place, token in enumerate(batch.input_ids):
        panel.plot([0, size], [place, place], color=PAPER, linewidth=0.8, clip_on=False)
        panel.plot([place, place], [0, size], color=PAPER, linewidth=0.8, clip_on=False)
        note(panel, -0.3, place + 0.5, WORDS[token], ha="right", fontsize=7.5)
        note(panel, place + 0.5, size + 0.3, WORDS[token], ha="center", va="top", rotation=90, fontsize=7.5)
    panel.add_patch(Rectangle((0, 0), size, size, fill=False, edgecolor=FAINT, linewidth=0.8, zorder=3, clip_on=False))


def scored_places(batch: PackedBatch) -> list[int]:
    """Where in the row each scored token stands; here all tokens of an answer are scored."""
    starts = [branch.start for _, branches in batch.forest.trees for branch in branches]
    seen = [0] * len(starts)
    places = []
    for sequence in batch.sequence.tolist():
        places.append(starts[sequence] + seen[sequence])
        seen[sequence] += 1
    assert batch.input_ids[places].equal(batch.target)
    return places


# ------------------------------------------------------------------------------------------------- the stages


def stages(image: Path) -> None:
    """From a base model to a policy: what each stage reads and writes."""
    figure = pyplot.figure(figsize=(10.5, 4.6))
    panel = axes(figure, (0.01, 0.02, 0.98, 0.96), 105, (0, 46))
    data, stage, model = COMPLETION[1], COMPLETION[0], STAGE
    box(panel, 1, 17, 17, 10, model, "a base model", "Hugging Face directory", "or hub id")
    columns = (
        (23, InstructionDataModule, "conversations", SFTModule, "fine-tunes on the answers", "a chat model"),
        (50, PreferenceDataModule, "pairs, rankings", RewardModule, "learns which answer is better", "a reward model"),
        (77, PromptDataModule, "prompts", PPOModule, "samples, scores, learns", "a policy"),
    )
    for x, reader, rows, module, does, left in columns:
        loads = "AutoModelForSequenceClassification" if module is RewardModule else "AutoModelForCausalLM"
        box(panel, x, 1, 21.5, 8, data, rows, reader.__name__)
        box(panel, x, 17.5, 21.5, 9, stage, module.__name__, does)
        box(panel, x, 33.5, 21.5, 7.5, model, left, loads)
        arrow(panel, (x + 10.75, 9.3), (x + 10.75, 17.2))
        arrow(panel, (x + 10.75, 26.8), (x + 10.75, 33.2))
    arrow(panel, (18.3, 22), (22.7, 22))
    for x, name in ((44.8, "pretrained"), (71.8, "reward, critic")):
        panel.plot([x, x + 2, x + 2], [37, 37, 22], color=INK, linewidth=1.3, solid_joinstyle="round")
        arrow(panel, (x + 2, 22), (x + 4.9, 22))
        note(panel, x + 2.5, 30, name, ha="left")
    panel.plot([33.75, 33.75, 103, 103], [41.3, 44, 44, 22], color=INK, linewidth=1.3, solid_joinstyle="round")
    arrow(panel, (103, 22), (98.8, 22))
    note(panel, 35, 45.4, "pretrained: where the policy starts, and what the reference is")
    save(figure, image)


# ------------------------------------------------------------------------------------------------- parts


def axes(figure: Any, box: tuple[float, float, float, float], width: int, heights: tuple[float, float]) -> Any:
    """Of cells of size 1, rows counted from above."""
    made = figure.add_axes(box)
    made.set_xlim(0, width)
    made.set_ylim(heights[1], heights[0])
    made.axis("off")
    return made


def title(panel: Any, text: str) -> None:
    """Above a panel, at its left."""
    panel.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=INK)


def note(panel: Any, x: float, y: float, text: str, color: str = INK, **settings: Any) -> None:
    """A small text."""
    panel.text(x, y, text, color=color, **{"fontsize": 9, "va": "center", **settings})


def cell(panel: Any, x: int, y: int, color: str, word: str, hatched: bool = False) -> None:
    """One token."""
    panel.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor=PAPER, linewidth=1.2, clip_on=False))
    if hatched:
        for reach in (0.25, 0.45):
            panel.plot([x, x + reach], [y + reach, y], color=PAPER, linewidth=1.5, clip_on=False)
            panel.plot([x + 1 - reach, x + 1], [y + 1, y + 1 - reach], color=PAPER, linewidth=1.5, clip_on=False)
    panel.text(x + 0.5, y + 0.5, word, ha="center", va="center", fontsize=8, color=INK)


def box(panel: Any, x: float, y: float, width: float, height: float, color: str, *lines: str) -> None:
    """A rounded box, its first line in bold."""
    style = "round,pad=0,rounding_size=1.2"
    panel.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=FAINT))
    for i, line in enumerate(lines):
        middle = y + height / 2 + 2.9 * (i - (len(lines) - 1) / 2)
        weight, size = ("bold", 9.5) if i == 0 else ("normal", 7.6)
        note(panel, x + width / 2, middle, line, ha="center", fontsize=size, fontweight=weight)


def arrow(
    panel: Any,
    start: tuple[float, float],
    end: tuple[float, float],
    head: float = 11,
    linewidth: float = 1.3,
    **bend: str,
) -> None:
    """From here to there."""
    shape = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=head, linewidth=linewidth, color=INK, shrinkA=0, shrinkB=0, **bend
    )
    shape.set(clip_on=False)
    panel.add_patch(shape)


PICTURES = {"packed.svg": packed, "stages.svg": stages}


def main(arguments: list[str] | None = None) -> None:
    """Draws all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    for name, draw in PICTURES.items():
        draw(options.images / name)


if __name__ == "__main__":
    main()
