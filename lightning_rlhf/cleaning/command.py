"""``lightning-rlhf data stats|clean|convert PATH``: looks at data, cleans it, writes it in another format."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning_rlhf.arguments import Parser, did_you_mean

if TYPE_CHECKING:
    from lightning_rlhf.cleaning.example import Example
    from lightning_rlhf.cleaning.filters.base import Filter
    from lightning_rlhf.cleaning.pipeline import Tally
    from lightning_rlhf.data.sources import BadRows

_ABOUT = """\
Looks at instruction, preference and prompt data, cleans it, or writes it in another format. It reads what the data
modules read: JSON Lines, JSON, CSV, Parquet and text files, globs, directories, hub ids.

  stats    count rows by language, type and length; find duplicates; show where a row comes from
  clean    drop rows by filters, and mask personal data
  convert  write rows in another format, if it can hold them"""
_KINDS = ("auto", "instruction", "preference", "prompt")
#: Rows between two signs of life.
_TICK = 20_000


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``data``.
    """
    arguments = list(sys.argv[2:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: lightning-rlhf data {{stats,clean,convert}} PATH ...\n\n{_ABOUT}")
        sys.exit(0)
    if arguments[0] not in _COMMANDS:
        near = did_you_mean(arguments[0], _COMMANDS)
        print(f"lightning-rlhf data: there is no {arguments[0]}{near} All: {', '.join(_COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        _COMMANDS[arguments[0]](arguments[1:])
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"lightning-rlhf data {arguments[0]}: {' '.join(str(error).split())}")


def stats(args: Sequence[str]) -> None:
    """Counts rows by language, type and length, and finds duplicates.

    Args:
        args: Arguments after ``data stats``.
    """
    parser = _parser("stats", stats.__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--row", metavar="ID", help="show instead where the row with this id comes from")
    options = parser.parse_args(args)
    from lightning_rlhf.cleaning.provenance import origins, tree
    from lightning_rlhf.cleaning.statistics import measure
    from lightning_rlhf.data.sources import BadRows
    from lightning_rlhf.utils.filesystem import atomic_file

    bad = BadRows(options.on_bad_row or "skip")
    examples = _ticking(_read(options, bad), "read")
    if options.row is not None:
        found = origins(examples)
        if options.row not in found:
            raise ValueError(f"no row has the id {options.row}{did_you_mean(options.row, found)}")
        print("\n".join(tree(found, options.row)))
        return
    made = measure(examples)
    print("\n".join(made.lines()))
    print(f"bad rows    {f'{bad.total:,}: {bad.reasons}' if bad.total else 'none'}")
    if options.json:
        _check_outputs(options.path, [options.json])
        with atomic_file(options.json) as file:
            json.dump({**made.to_json(), "bad_rows": bad.summary()}, file, ensure_ascii=False, indent=1)
        print(f"Written: {options.json}")


def clean(args: Sequence[str]) -> None:
    """Drops rows by filters, and masks personal data.

    The kept rows are as they were read. Beside them are written NAME.dropped.jsonl, which has every other row with its
    place, filter and reason, and NAME.report.json with what each filter did.

    Args:
        args: Arguments after ``data clean``.
    """
    from lightning_rlhf.cleaning.filters.make import DEFAULT, NAMES

    parser = _parser("clean", clean.__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=_OUT)
    parser.add_argument(
        "--filters",
        nargs="+",
        metavar="NAME",
        help=f"filters in order, of: {', '.join(NAMES)}. Default: {', '.join(DEFAULT)}",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with 'filters', for settings of filters")
    parser.add_argument("--against", nargs="+", metavar="TEST", help="files of test sets, whose rows are taken out")
    options = parser.parse_args(args)
    if options.filters and options.config:
        parser.error("--filters and --config both name filters. Give one of them.")
    from lightning_rlhf.cleaning.pipeline import Tally
    from lightning_rlhf.cleaning.pipeline import clean as run

    filters, tally = _filters(options), Tally()
    with _Outputs(options) as out:
        for example in run(_ticking(_read(options, out.bad), "read"), filters, tally, out.drop):
            out.keep(example.row)
        out.report({"filters": tally.to_json(), "bad_rows": out.bad.summary()})
    print("\n".join(_table(tally, out.bad)))
    print("\n".join(out.said))


def convert(args: Sequence[str]) -> None:
    """Writes rows in another format, if it can hold them.

    What a format can't hold (several turns in alpaca, ties in pairs) is refused with the row's line, or left out and
    counted with --on-bad-row skip, and then stands in NAME.dropped.jsonl. Columns that no format reads are kept.

    Args:
        args: Arguments after ``data convert``.
    """
    parser = _parser("convert", convert.__doc__)
    parser.add_argument("--to", required=True, metavar="FORMAT", help="name of a format, as docs/data.md lists them")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=_OUT)
    options = parser.parse_args(args)
    from lightning_rlhf.cleaning.convert import check_target
    from lightning_rlhf.cleaning.convert import convert as write
    from lightning_rlhf.data.formats import FormatError

    check_target(options.to)
    options.on_bad_row = options.on_bad_row or "raise"
    kept = 0
    with _Outputs(options) as out:
        for example in _ticking(_read(options, out.bad), "read"):
            try:
                row = write(example, options.to)
            except FormatError as error:
                out.bad.add(example.where, error.kind, str(error))
            else:
                out.keep(row)
                kept += 1
        out.report({"converted": kept, "bad_rows": out.bad.summary()})
    print(f"{kept:,} rows as {options.to}; {out.bad.total:,} left out{f': {out.bad.reasons}' if out.bad.total else ''}")
    print("\n".join(out.said))


_COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = {"stats": stats, "clean": clean, "convert": convert}
_OUT = "file for the rows, .jsonl or .jsonl.gz; it is written beside and moved when it is whole"


def _parser(name: str, about: str | None) -> Parser:
    parser = Parser(f"data {name}", about)
    parser.add_argument("path", nargs="+", metavar="PATH", help="files, globs, directories or hub ids of data sets")
    parser.add_argument("--kind", choices=_KINDS, default="auto", help="what the rows are; auto: each by its columns")
    parser.add_argument("--format", default="auto", help="the rows' format; auto: each by its columns")
    default = "raise" if name == "convert" else "skip"
    parser.add_argument(
        "--on-bad-row",
        choices=("raise", "skip"),
        help=f"stop at a row that can't be used, or leave it out and count it. Default: {default}",
    )
    return parser


def _read(options: argparse.Namespace, bad: BadRows) -> Iterator[Example]:
    from lightning_rlhf.cleaning.example import read_examples

    return read_examples(options.path, bad, options.kind, options.format)


def _filters(options: argparse.Namespace) -> list[Filter]:
    """The filters that the options name."""
    from lightning_rlhf.cleaning.filters.contamination import Contamination
    from lightning_rlhf.cleaning.filters.make import DEFAULT, make_filters

    specs: Any = options.filters or DEFAULT
    if options.config:
        import yaml

        try:
            read = yaml.safe_load(options.config.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{options.config} is no YAML: {error}") from error
        if not isinstance(read, Mapping) or not isinstance(read.get("filters"), list):
            raise ValueError(f"{options.config} has no list 'filters'. Write: filters: [Length, NearDuplicate]")
        specs = read["filters"]
    against = [Contamination(options.against)] if options.against else []
    return [*against, *make_filters(specs)]


def _ticking(examples: Iterable[Example], what: str) -> Iterator[Example]:
    """Passes examples on, and says now and then how many they were."""
    for count, example in enumerate(examples, 1):
        yield example
        if count % _TICK == 0:
            print(f"{what}  {count:,}", file=sys.stderr, flush=True)


def _check_outputs(sources: Sequence[str], outputs: Sequence[Path]) -> None:
    """Refuses to write over what is read.

    Raises:
        ValueError: An output is one of the inputs.
    """
    from lightning_rlhf.data.sources import source_state

    read = {os.path.realpath(file) for _, file, *_ in source_state(list(sources)) or []}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise ValueError(f"{path} is an input, and would be overwritten. Choose another --out.")


class _Outputs:
    """The files that a command writes: all of them get their names at the end, or none does."""

    def __init__(self, options: argparse.Namespace) -> None:
        from lightning_rlhf.data.sources import BadRows

        out: Path = options.out
        name = out.name.removesuffix(".gz")
        if not name.endswith(".jsonl"):
            raise ValueError(f"--out {out} has another suffix. Rows are written as .jsonl or .jsonl.gz.")
        stem = name.removesuffix(".jsonl")
        self._paths = [out, out.with_name(f"{stem}.dropped.jsonl"), out.with_name(f"{stem}.report.json")]
        _check_outputs([*options.path, *(getattr(options, "against", None) or [])], self._paths)
        outputs = self

        class Noted(BadRows):
            """Bad rows that are also written to the file of dropped rows."""

            def add(self, where: str, kind: str, reason: str) -> None:
                super().add(where, kind, reason)
                outputs.write_dropped({"where": where, "filter": "bad row", "reason": f"{kind}: {reason}"})

        self.bad: BadRows = Noted(options.on_bad_row or "skip")
        self.said: list[str] = []
        self._counts = [0, 0]

    def __enter__(self) -> _Outputs:
        from lightning_rlhf.utils.filesystem import atomic_file

        self._stack = ExitStack()
        self._files: list[IO[str]] = [self._stack.enter_context(atomic_file(path)) for path in self._paths]
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def keep(self, row: Mapping[str, Any]) -> None:
        """Writes a row."""
        self._files[0].write(_json(row))
        self._counts[0] += 1

    def drop(self, example: Example, name: str, reason: str) -> None:
        """Writes a row that a filter dropped."""
        found = {"where": example.where, "filter": name, "reason": reason}
        measured = {"measured": example.notes} if example.notes else {}
        self.write_dropped({**found, **measured, "row": example.row})

    def write_dropped(self, entry: Mapping[str, Any]) -> None:
        """Writes what the output lacks."""
        self._files[1].write(_json(entry))
        self._counts[1] += 1

    def report(self, found: Mapping[str, Any]) -> None:
        """Writes the report, and says what was written."""
        self._files[2].write(json.dumps(found, ensure_ascii=False, indent=1, default=str) + "\n")
        rows, dropped, report = self._paths
        self.said = [
            f"Rows: {rows} ({self._counts[0]:,})",
            f"Left out, with reasons: {dropped} ({self._counts[1]:,})",
            f"Report: {report}",
        ]


def _json(value: Mapping[str, Any]) -> str:
    # dates and decimals, as Parquet has them, become texts
    return json.dumps(value, ensure_ascii=False, default=str) + "\n"


def _table(tally: Tally, bad: BadRows) -> Iterator[str]:
    """What each filter did, as lines."""
    yield f"{'filter':24s}{'seen':>12s}{'dropped':>12s}{'share':>8s}{'CPU s':>9s}  reasons"
    for name, one in tally.filters.items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in one.reasons.most_common(4))
        more = f", and {len(one.reasons) - 4} other reasons" if len(one.reasons) > 4 else ""
        changed = f"{'; ' if reasons else ''}texts changed in {one.changed:,} rows" if one.changed else ""
        share = one.dropped / one.seen if one.seen else 0.0
        figures = f"{name:24s}{one.seen:12,}{one.dropped:12,}{share:8.1%}{one.seconds:9.1f}"
        yield f"{figures}  {reasons}{more}{changed}".rstrip()
    if bad.total:
        yield f"{bad.total:,} bad rows: {bad.reasons}"
    yield f"{tally.kept:,} of {tally.seen + bad.total:,} rows kept"
