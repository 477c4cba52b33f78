"""An inspection as one HTML file without dependencies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_rlhf.inspection.pieces import TokenPiece, visible
from lightning_rlhf.inspection.rows import Inspection, RowView, Section
from lightning_rlhf.inspection.statistics import Bar, Statistics
from lightning_rlhf.inspection.terminal import column_text
from lightning_rlhf.report.page import escape as _e
from lightning_rlhf.report.page import frame, write
from lightning_rlhf.report.style import BASE


def write_page(path: str | os.PathLike[str], found: Inspection) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: Path of the file.
        found: The inspection.
    """
    write(Path(path), page(found))


def page(found: Inspection) -> str:
    """The text of the whole file."""
    read = f'<span class="tokens"><span class="s">to</span><span class="s">ken</span></span> {_e(found.legend)} · '
    body = f"""<h1>{_e(found.title)}</h1>
<p class="note">{read if found.legend else ""}
<span class="tokens"><span class="x">&lt;special&gt;</span></span> special ·
<span class="tokens"><span>to</span><span>ken</span></span> others.
Point at a token, or touch it, to see its position and id.</p>
{"".join(map(_section, found.sections))}
"""
    return frame(found.title, body, BASE + _STYLE)


def _section(section: Section) -> str:
    heading = f"<h2>{_e(section.name)}</h2>" if section.name else ""
    return f"<section>{heading}{_statistics(section.statistics)}{''.join(map(_row, section.rows))}</section>\n"


def _statistics(found: Statistics) -> str:
    problems = "".join(f'<p class="problem">{_e(problem)}</p>' for problem in found.problems)
    facts = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(text)}</dd></div>" for name, text in found.facts)
    return f"{problems}<dl>{facts}</dl>{_histogram(found.histogram)}"


def _histogram(bars: Sequence[Bar]) -> str:
    most = max(bar.sequences for bar in bars)
    rows = []
    for bar in bars:
        span = f"{bar.low:,}" if bar.low == bar.high else f"{bar.low:,}–{bar.high:,}"
        drawn = f'<td class="bar"><div style="width:{100 * bar.sequences / most:.1f}%"></div></td>'
        rows.append(f'<tr><th scope="row">{span}</th>{drawn}<td>{bar.sequences:,}</td></tr>')
    return f'<table class="histogram"><caption>By length in tokens</caption>{"".join(rows)}</table>'


def _row(row: RowView) -> str:
    notes = "".join(f" · {_e(note)}" for note in row.notes)
    answers = "".join(
        f'<li><p class="note"><b>{_e(answer.name)}</b> · {_count(answer.pieces)}'
        f"{''.join(f' · {_e(note)}' for note in answer.notes)}</p>{_tokens(answer.pieces)}</li>"
        for answer in row.answers
    )
    if row.starts:
        answers = f'<li><p class="note">▶ {_e(row.starts)}</p></li>'
    columns = "".join(
        f'<tr><th scope="row">{_e(name)}</th><td>{_e(column_text(value))}</td></tr>'
        for name, value in row.columns.items()
    )
    return (
        f'<article><h3>Row {row.number} <span class="note">{_e(row.where)}{notes}</span></h3>'
        f'<p class="note"><b>prompt</b> · {_count(row.prompt)}</p>{_tokens(row.prompt)}'
        f'<ul class="tree">{answers}</ul>{f"<table>{columns}</table>" if columns else ""}</article>\n'
    )


def _count(shown: Sequence[TokenPiece]) -> str:
    return f"{sum(len(piece.ids) for piece in shown):,} tokens"


def _tokens(shown: Sequence[TokenPiece]) -> str:
    return f'<p class="tokens">{"".join(map(_piece, shown))}</p>'


def _piece(piece: TokenPiece) -> str:
    text = "".join(glyph for glyph, _ in visible(piece.text)) or "∅"
    if "\n" in piece.text:
        text = text.replace("⏎", "⏎\n")
    kind = " ".join(name for name, holds in (("s", piece.scored), ("x", piece.special)) if holds)
    ids = " ".join(map(str, piece.ids))
    place = f"{piece.position}" if len(piece.ids) == 1 else f"{piece.position}–{piece.position + len(piece.ids) - 1}"
    about = f"position {place} · id {ids}{' · read by the loss' if piece.scored else ''}"
    shown = f' class="{kind}"' if kind else ""
    return f'<span{shown} title="{about}">{_e(text)}</span>'


_STYLE = """
:root { --read: #a6e9b5; --read2: #7fd8a0; --token: #e7e9ee; --special: #8b3fc0 }
@media (prefers-color-scheme: dark) { :root { --read: #1c5a34; --read2: #27724a; --token: #2b3137;
  --special: #d8a6ff } }
h3 { font-size: 1.05rem; margin: .25rem 0 .5rem } h3 .note { font-weight: 400 }
.note b { color: var(--ink) }
.problem { color: var(--mark); font-weight: 600 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .5rem;
  margin: 1rem 0 }
dl div { background: var(--card); border-radius: .5rem; padding: .5rem .75rem }
dd { overflow-wrap: anywhere } article { padding: .75rem; margin: 1rem 0 }
.tokens { font: .9rem/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0 }
.tokens span { border-radius: .2rem; padding: .1rem 0 }
.tokens span:nth-child(even) { background: var(--token) }
.tokens span.x { color: var(--special) }
.tokens span.s { background: var(--read) } .tokens span.s:nth-child(even) { background: var(--read2) }
.tokens span:hover { outline: 1px solid var(--line) }
.tree { list-style: none; margin: 0 0 0 .25rem; padding: 0 }
.tree li { border-left: 2px solid var(--edge); padding: .1rem 0 .1rem 1rem; position: relative }
.tree li::before { content: ""; position: absolute; left: 0; top: 1rem; width: .7rem;
  border-top: 2px solid var(--edge) }
.tree li:last-child { border-left-color: transparent }
.tree li:last-child::after { content: ""; position: absolute; left: -2px; top: 0; height: 1rem;
  border-left: 2px solid var(--edge) }
caption { text-align: left; color: var(--soft) }
th, td { text-align: left; padding: .1rem .75rem .1rem 0; vertical-align: top; font-weight: 400;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums } th { color: var(--soft); white-space: nowrap }
.histogram { width: 100%; max-width: 40rem } .histogram td { white-space: nowrap }
.bar { width: 100% }
.bar div { background: var(--line); height: .8rem; margin-top: .25rem; border-radius: .1rem }
@media (hover: none) { .tokens span:hover::after { content: attr(title); position: fixed; left: .5rem; right: .5rem;
  bottom: .5rem; padding: .5rem .75rem; border-radius: .5rem; background: var(--ink); color: var(--back);
  font: .85rem/1.4 system-ui, sans-serif } }
"""
