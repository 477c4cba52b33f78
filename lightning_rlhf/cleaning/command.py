"""``lightning-rlhf data stats|clean|convert PATH``: looks at data, cleans it, writes it in another format."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rlhf.arguments import Parser, did_you_mean

if TYPE_CHECKING:
    from lightning_rlhf.cleaning.example import Example
    from lightning_rlhf.cleaning.filters.base import Filter
    from lightning_rlhf.data.sources import BadRows

_ABOUT = """\
Looks at instruction, preference and prompt data, and at single answers with labels (KTO), cleans it, or writes it in
another format. It reads what the data modules read: JSON Lines, JSON, CSV, Parquet and text files, globs, directories,
hub ids.

  stats    count rows by language, type and length; find duplicates; show where a row comes from
  clean    drop rows by filters, and mask personal data
  convert  write rows in another format, if it can hold them"""
_KINDS = ("auto", "instruction", "preference", "unpaired", "prompt")
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
    from lightning_rlhf.cleaning.outputs import check_outputs
    from lightning_rlhf.cleaning.provenance import origins, tree
    from lightning_rlhf.cleaning.statistics import measure
    from lightning_rlhf.data.sources import BadRows
    from lightning_rlhf.utils.filesystem import atomic_file

    if options.json:
        check_outputs(options.path, [options.json])
    bad = BadRows(options.on_bad_row or "skip", skip="set --on-bad-row skip")
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
    scale = parser.add_argument_group("more than one machine holds (pip install 'lightning_rlhf[scale]')")
    scale.add_argument("--executor", choices=("local", "ray", "slurm"), help="run by datatrove, a task for each file")
    scale.add_argument("--workers", type=int, help="tasks at a time; default: 1")
    scale.add_argument("--slurm-partition", help="partition for the jobs")
    scale.add_argument("--slurm-time", help="time limit of a job; default: 04:00:00")
    options = parser.parse_args(args)
    if options.executor and options.on_bad_row == "raise":
        parser.error("--executor leaves bad rows out and counts them. Leave out --on-bad-row raise.")
    if options.filters and options.config:
        parser.error("--filters and --config both name filters. Give one of them.")
    slurm = options.executor == "slurm"
    needs = {"workers": options.executor, "slurm_partition": slurm, "slurm_time": slurm}
    for name in needs:
        if getattr(options, name) is not None and not needs[name]:
            executor = "--executor" if name == "workers" else "--executor slurm"
            parser.error(f"--{name.replace('_', '-')} is for {executor}. Add it, or leave this out.")
    if options.executor:
        _clean_at_scale(options)
        return
    from lightning_rlhf.cleaning.outputs import NotedBadRows, Outputs, dropped_entry, json_line, writable
    from lightning_rlhf.cleaning.pipeline import Tally
    from lightning_rlhf.cleaning.pipeline import clean as run

    tally, outputs = Tally(), Outputs(options.out, [*options.path, *(options.against or [])])
    filters = _filters(options)
    with outputs as out:
        bad = NotedBadRows(options.on_bad_row or "skip", out.note)
        examples = writable(_ticking(_read(options, bad), "read"), bad)
        for example in run(examples, filters, tally, lambda *dropped: out.note(dropped_entry(*dropped))):
            out.keep(json_line(example.row))
        out.report({"filters": tally.to_json(), "bad_rows": bad.summary()})
    print("\n".join([*tally.lines(), *_bad(bad), *out.lines()]))


def convert(args: Sequence[str]) -> None:
    """Writes rows in another format, if it can hold them.

    What a format can't hold (several turns in alpaca, ties in pairs) is refused with the row's line, or left out and
    counted with --on-bad-row skip, and then stands in NAME.dropped.jsonl. Columns that no format reads are kept.
    --to unpaired takes preferences apart: better answers are good, worse ones bad. Answers in the middle of a ranking,
    of which nothing says whether they are good, are left out and counted.

    Args:
        args: Arguments after ``data convert``.
    """
    parser = _parser("convert", convert.__doc__)
    parser.add_argument("--to", required=True, metavar="FORMAT", help="name of a format, as docs/data.md lists them")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=_OUT)
    parser.add_argument("--threshold", type=float, help="lowest rating of a good answer, for single answers")
    options = parser.parse_args(args)
    from lightning_rlhf.cleaning.convert import check_target, holds_labels, single_answers
    from lightning_rlhf.cleaning.convert import convert as write
    from lightning_rlhf.cleaning.outputs import NotedBadRows, Outputs, json_line, writable
    from lightning_rlhf.data.formats import FormatError

    check_target(options.to)
    if options.threshold is not None and not holds_labels(options.to):
        parser.error(
            f"--threshold makes labels of ratings, and {options.to} has none. Add --to unpaired, or leave it out."
        )
    outputs, unlabeled = Outputs(options.out, options.path), 0
    with outputs as out:
        bad = NotedBadRows(options.on_bad_row or "raise", out.note)
        for example in writable(_ticking(_read(options, bad), "read"), bad):
            apart = options.to == "unpaired" or example.kind == "unpaired"
            try:
                parts = single_answers(example, options.threshold) if apart else [example]
                rows = [write(part, options.to) for part in parts]
            except FormatError as error:
                bad.add(example.where, error.kind, str(error))
                continue
            for row in rows:
                out.keep(json_line(row))
            if left := len(example.answers) - len(rows) if apart else 0:
                unlabeled += left
                out.note({"where": example.where, "filter": "no label", "reason": f"{left:,} in the middle"})
        out.report({"converted": out.kept, "without_label": unlabeled, "bad_rows": bad.summary()})
    print(f"{out.kept:,} rows as {options.to}; {bad.total:,} left out{f': {bad.reasons}' if bad.total else ''}")
    if unlabeled:
        print(f"{unlabeled:,} answers in the middle of rankings are left out")
    print("\n".join(out.lines()))


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
    from lightning_rlhf.cleaning.filters.make import make_filters

    return make_filters(_specs(options))


def _specs(options: argparse.Namespace) -> list[Any]:
    """The filters that the options name, as a configuration writes them."""
    from lightning_rlhf.cleaning.filters.make import DEFAULT

    against = [{"Contamination": {"against": options.against}}] if options.against else []
    if not options.config:
        return [*against, *(options.filters or DEFAULT)]
    import yaml

    from lightning_rlhf.data.sources import not_utf8

    try:
        read = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.config}: {not_utf8(error.object, error.start, str(options.config))}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{options.config} is no YAML: {error}") from error
    if not isinstance(read, Mapping) or not isinstance(read.get("filters"), list):
        raise ValueError(f"{options.config} has no list 'filters'. Write: filters: [Length, NearDuplicate]")
    return [*against, *read["filters"]]


def _clean_at_scale(options: argparse.Namespace) -> None:
    """Hands the same work to datatrove."""
    from lightning_rlhf.cleaning.scale import Cluster, clean_files

    given = {"workers": options.workers, "partition": options.slurm_partition, "time": options.slurm_time}
    cluster = Cluster(options.executor, **{name: value for name, value in given.items() if value is not None})
    print("\n".join(clean_files(options.path, options.out, _specs(options), cluster, options.kind, options.format)))


def _ticking(examples: Iterable[Example], what: str) -> Iterator[Example]:
    """Passes examples on, and says now and then how many they were."""
    for count, example in enumerate(examples, 1):
        yield example
        if count % _TICK == 0:
            print(f"{what}  {count:,}", file=sys.stderr, flush=True)


def _bad(bad: BadRows) -> list[str]:
    return [f"{bad.total:,} bad rows: {bad.reasons}"] if bad.total else []
