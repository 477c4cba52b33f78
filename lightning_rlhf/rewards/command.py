"""``lightning-rlhf verify``: scores completions of a file, to see what a reward makes of them without a model."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rlhf.arguments import Parser

if TYPE_CHECKING:
    from lightning_rlhf.data.sources import Row

_ABOUT = """\
Scores the completions of a file by reward functions, such as lightning_rlhf.rewards.verifiers.number, and shows each
score, and what a verifier read. A row has a prompt (text or messages), a completion, and the columns that the rewards
read."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``verify``.
    """
    parser = Parser("verify", _ABOUT)
    parser.add_argument("file", metavar="FILE", help="rows with prompt, completion and further columns")
    parser.add_argument(
        "--reward",
        required=True,
        action="append",
        help="module.function, or as in a config '{source: module.function, weight: 1.0, options: {timeout: 5}}', or a "
        "list of both; several are summed",
    )
    parser.add_argument("--completion", default="completion", help="column of the completions; default: completion")
    parser.add_argument("--out", type=Path, help="file for all rows with their scores, as JSON Lines")
    parser.add_argument("--limit", type=int, default=20, help="number of rows to show; default: 20")
    options = parser.parse_args(args)
    try:
        _run(options.file, options.reward, options.completion, options.out, options.limit)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        sys.exit(f"lightning-rlhf verify: {' '.join(str(error).split())}")


def _run(file: str, rewards: Sequence[str], column: str, out: Path | None, limit: int) -> None:
    from lightning_rlhf.data.packed import Branch, Tree, pack
    from lightning_rlhf.data.sources import BadRows, read_rows
    from lightning_rlhf.rewards.base import FAULTS, Samples
    from lightning_rlhf.rewards.function import FunctionReward
    from lightning_rlhf.rewards.weighted import WeightedSum, make_reward
    from lightning_rlhf.utils.text import one_line

    if limit < 0:
        raise ValueError(f"--limit is {limit}: give 0 or more.")
    if out is not None and (out.exists() or not out.parent.is_dir()):
        why = "is there already" if out.exists() else f"can't be written: there is no folder {out.parent}"
        raise ValueError(f"{out} {why}. Give --out another path.")
    rows = list(read_rows(file, BadRows(skip=None)))
    for row in rows:
        if not isinstance(row.value.get(column), str):
            has = ", ".join(row.value)
            raise ValueError(f"{row.where}: the column {column!r} is no text; the row has {has}. Set --completion.")
    if not rows:
        raise ValueError(f"{file} has no rows.")
    given = [part for text in rewards for part in _parts(text)]
    reward = make_reward(given, None)  # type: ignore[arg-type]  # functions use no tokenizer
    assert isinstance(reward, WeightedSum)
    if out is not None:
        _check_columns(rows, reward.names)
    for part in reward.parts:
        if isinstance(part, FunctionReward) and "completion_ids" in part.accepts:
            if part.requires_ids:
                raise ValueError(
                    f"{part.name} reads completion_ids, the policy's tokens, which are known in a run only."
                )
            part.accepts.remove("completion_ids")
    known = sorted({name for row in rows for name in _columns(row.value)} - {"prompt", column})

    def samples(chosen: Sequence[Any]) -> Samples:
        given = [_columns(row.value) for row in chosen]
        return Samples(
            batch=pack([Tree([0], [Branch([0])]) for _ in chosen]),
            prompts=[row.value.get("prompt", "") for row in chosen],
            completions=[row.value[column] for row in chosen],
            truncated=[False] * len(chosen),
            columns={name: [row.get(name) for row in given] for name in known},
        )

    try:
        scores = reward(samples(rows))
    except ValueError:
        for row in rows:  # which one it is
            try:
                reward(samples([row]))
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
        raise
    parts = {name: part.tolist() for name, part in scores.parts.items()}
    extras = {name: extra.tolist() for name, extra in scores.extras.items()}
    columns = {f"score/{name}": part for name, part in parts.items()} | {f"reward/{n}": e for n, e in extras.items()}
    lines = [
        {**row.value, "score": _plain(total), **{name: _plain(column[i]) for name, column in columns.items()}}
        for i, (row, total) in enumerate(zip(rows, scores.total.tolist(), strict=True))
    ]
    for row, line in list(zip(rows, lines, strict=True))[:limit]:
        found = "  ".join(f"{name} {_show(line[f'score/{name}'])}" for name in parts)
        print(f"{row.where}: {found}  {one_line(row.value[column], 60)}")
        for name, part in zip(parts, reward.parts, strict=True):
            if (read := _explained(part, _columns(row.value), row.value[column])) is not None:
                print(f"    {name}: {one_line(read, 200)}")
    for name, values in {**parts, **extras}.items():
        if name.rpartition("/")[2] in FAULTS and name in extras:
            continue
        there = [value for value in values if value == value]
        mean = f"{sum(there) / len(there):.4g}" if there else "none"
        rest = len(lines) - len(there)
        left = f"; does not apply to {rest}" if rest and name not in extras else ""
        print(f"{name}: mean {mean} of {len(there)} row{'s' * (len(there) != 1)}{left}")
    for kind in FAULTS:
        if count := scores.faults(kind):
            print(f"{count} completion{'s' * (count > 1)} could not be judged: {kind}")
    if out is not None:
        texts = (json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)  # Parquet has dates
        out.write_text("".join(texts), encoding="utf-8", errors="replace")
        print(f"All rows with their scores are in {out}.")


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns that rewards read. A completions table calls the data's columns ``data/NAME``."""
    return {name.removeprefix("data/"): value for name, value in row.items()} | dict(row)


def _parts(given: str) -> list[Any]:
    """Rewards as in a config."""
    if not given.lstrip().startswith(("{", "[")):
        return [given]
    import yaml

    try:
        found = yaml.safe_load(given)
    except yaml.YAMLError as error:
        raise ValueError(f"--reward {given}: no YAML ({error}).") from None
    return found if isinstance(found, list) else [found]


def _check_columns(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Refuses rows with a column that stands in the output for something else."""
    ours = {"score", *(f"score/{name}" for name in names)}
    further = tuple(f"reward/{name}/" for name in names)
    for row in rows:
        for column in row.value:
            if column in ours or column.startswith(further):
                raise ValueError(
                    f"{row.where}: the row has a column {column!r}, which --out would replace. Rename it, or leave "
                    "out --out."
                )


def _explained(part: Any, row: dict[str, Any], completion: str) -> str | None:
    """What a function's ``explain`` says it read; None where it has none or the row lacks its column."""
    explain = getattr(getattr(part, "function", None), "explain", None)
    if explain is None:
        return None
    given = {**row, **part.options, "completion": completion}
    wanted = inspect.signature(explain).parameters.values()
    if any(p.default is p.empty and given.get(p.name) is None for p in wanted):
        return None
    found: str = explain(**{p.name: given[p.name] for p in wanted if p.name in given})
    return found


def _plain(score: float) -> float | None:
    return score if score == score else None


def _show(score: float | None) -> str:
    return "-" if score is None else f"{score:.3g}"
