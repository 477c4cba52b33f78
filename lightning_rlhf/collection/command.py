"""``lightning-rlhf collect``: grows instructions with answers from seeds, or ranks answers to prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_rlhf.cleaning import Filter, make_filters
from lightning_rlhf.cleaning.filters import Novelty
from lightning_rlhf.cli import root_cause
from lightning_rlhf.collection.card import growth_card, preference_card
from lightning_rlhf.collection.generators import Generator
from lightning_rlhf.collection.grow import Growth, GrowthError, Plan, split
from lightning_rlhf.collection.pilot import estimate, show_pilot, too_low
from lightning_rlhf.collection.preferences import Preferences, make_ranker, read_prompts
from lightning_rlhf.collection.prompts import VERSION
from lightning_rlhf.collection.seeds import read_seeds
from lightning_rlhf.collection.settings import Settings
from lightning_rlhf.collection.trace import Trace, write_atomically, write_rows
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.sources import BadRows
from lightning_rlhf.endpoint import BudgetExceeded, EndpointError, Ledger
from lightning_rlhf.evaluation.chat_judge import ChatJudge
from lightning_rlhf.keys import KeyParser
from lightning_rlhf.rewards.judges import Judge, JudgeError
from lightning_rlhf.utils.progress import ProgressLine

_ABOUT = """\
Grows instructions with their answers from seeds, by self-instruct, with any model: behind an OpenAI-compatible
endpoint, or run here. With --preferences it has prompts answered several times and ranks the answers. Every request
and reply stands in a ledger: the same command goes on where it was stopped, and pays for nothing twice."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``collect``.
    """
    arguments = list(sys.argv[2:] if args is None else args)
    parser = _parser()
    config = parser.parse_args(arguments)
    again = f"lightning-rlhf collect {shlex.join(arguments)}"
    try:
        _check_out(config.out, [config.seeds] if isinstance(config.seeds, str) else config.seeds, config.preferences)
        # jsonargparse 4.53 renamed it
        made = (getattr(parser, "instantiate", None) or parser.instantiate_classes)(config)
        plan = Plan(**{one.name: made[one.name] for one in dataclasses.fields(Plan)})
        settings = Settings(**{one.name: made[one.name] for one in dataclasses.fields(Settings)})
        config.out.mkdir(parents=True, exist_ok=True)
        print(f"Everything goes to {config.out}.", flush=True)
        with Ledger(config.out / "ledger.sqlite") as ledger:
            work = _prefer if config.preferences is not None else _grow
            work(config, parser.dump(config), plan, settings, ledger)
    except KeyboardInterrupt:
        print(f"\nSIGINT: stopped. What arrived is kept in {config.out}. To go on: {again}", file=sys.stderr)
        sys.exit(130)
    except _ERRORS as error:
        sys.exit(f"lightning-rlhf collect: {' '.join(str(root_cause(error)).split())}")


_ERRORS = (
    BudgetExceeded,
    EndpointError,
    GrowthError,
    JudgeError,
    DataError,
    OSError,
    ImportError,
    TypeError,
    ValueError,
)


def _parser() -> KeyParser:
    parser = KeyParser(prog="lightning-rlhf collect", description=_ABOUT)
    parser.bases = Generator, Judge
    parser.add_argument("--config", action="config", help="file with any of these settings; later ones replace it")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; a second run goes on in it")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="stop after the pilot and its estimate")
    parser.add_argument(
        "--preferences", type=str | None, help="file, glob or hub id of prompts: answer and rank these, grow nothing"
    )
    parser.add_class_arguments(Plan, None)
    parser.add_class_arguments(Settings, None)
    return parser


def _check_out(out: Path, seeds: Sequence[str], prompts: str | None) -> None:
    """Refuses a folder with other files, and input that lies in it."""
    for path in (*seeds, *filter(None, [prompts])):
        if out.resolve() in Path(path).resolve().parents:
            raise ValueError(f"{path} lies in --out {out}, whose files are written anew. Name another folder.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file. Name a folder.")
    others = [path for path in out.iterdir() if not path.match(".ledger.sqlite.*")] if out.is_dir() else []
    if others and not (out / "ledger.sqlite").exists():  # a kill may have left a ledger that was being made
        raise ValueError(f"--out {out} holds other files, and no ledger of this command. Name another folder.")


def _grow(config: Any, written: str, plan: Plan, settings: Settings, ledger: Ledger) -> None:
    """Grows instructions."""
    if isinstance(settings.generator, list):
        raise ValueError("generator is a list, which is for --preferences. Name one.")
    if ranks := [name for name in ("reward", "judge") if getattr(settings, name) is not None]:
        raise ValueError(f"{ranks[0]} ranks answers, which is for --preferences. To filter by a reward: RewardAbove.")
    out, generator = config.out, settings.generator
    bad = BadRows(settings.on_bad_row)
    seeds = read_seeds(settings.seeds, plan.languages, bad)
    tasks = [task for task, _ in seeds]
    bad.report(len(seeds) + bad.total, str(settings.seeds))
    counts = ", ".join(f"{sum(task.lang == lang for task in tasks):,} {lang}" for lang in plan.languages)
    print(f"Seeds: {counts}.", flush=True)
    answerer = settings.answerer or generator
    growth = Growth(
        plan,
        tasks,
        generator,
        answerer,
        filters(settings),
        settings.task_sampling,
        settings.answer_sampling,
        Trace(out / "trace", {**_decisive(plan, settings, [generator, answerer]), "seeds": _digest(tasks)}),
        ledger,
        settings.budget,
    )
    write_atomically(out / "config.yaml", [written])  # other settings were refused by now
    write_rows(out / "seeds.jsonl", [row for _, row in seeds])
    stopped = None
    try:
        growth.step(ProgressLine)
        print(show_pilot(growth))
        print(f"\n{estimate(growth, ledger, settings.budget)}", flush=True)
        low = too_low(growth, settings.min_yield)
        go_on = not config.dry_run and not low
        while growth.missing and (go_on or growth.paused):
            growth.step(ProgressLine)
            print(_line(growth, ledger, settings), flush=True)
    except BudgetExceeded as error:
        stopped = error
    parts = _write(out, growth.rows, settings, plan.seed, lambda row: row["messages"][0]["content"])
    prices = settings.budget is not None and settings.budget.prices is not None
    growth_card(growth, parts, ledger.totals(), prices).write(out)
    print(f"\n{_where(out, parts)}")
    if stopped is not None:
        raise stopped
    if config.dry_run:
        print("The same command without --dry-run goes on from here.")
    elif low and growth.missing:
        raise GrowthError(
            f"stopped after the pilot: the yield is below min_yield ({settings.min_yield:.1%}): {', '.join(low)} of "
            f"the tasks asked for. {out / 'card.html'} shows why. Use another model, style or filters, or "
            "lower min_yield."
        )
    elif dry := growth.dried_up:
        print(f"No new rows came in several rounds: {', '.join(dry)}. More seeds, or a larger novelty, bring more.")


def _prefer(config: Any, written: str, plan: Plan, settings: Settings, ledger: Ledger) -> None:
    """Ranks answers to prompts."""
    out = config.out
    generators = settings.generator if isinstance(settings.generator, list) else [settings.generator]
    if isinstance(settings.judge, ChatJudge) and settings.judge.ledger is None:
        settings.judge.ledger, settings.judge.budget = ledger, settings.budget
    ranker = make_ranker(settings.reward, settings.judge)
    bad = BadRows(settings.on_bad_row)
    prompts = read_prompts(config.preferences, bad)
    bad.report(len(prompts) + bad.total, config.preferences)
    print(f"Prompts: {len(prompts):,}; {settings.samples * len(generators)} answers each, ranked by {ranker.name}.")
    decisive = {**_decisive(plan, settings, generators), "prompts": _digest(prompts), "ranked by": ranker.name}
    work = Preferences(
        prompts,
        generators,
        settings.samples,
        ranker,
        settings.answer_sampling,
        Trace(out / "trace", decisive),
        ledger,
        settings.budget,
        plan.seed,
    )
    write_atomically(out / "config.yaml", [written])
    write_rows(out / "prompts.jsonl", [{"id": one.id, "prompt": one.messages, "lang": one.lang} for one in prompts])
    stopped = None
    try:
        while work.done < len(prompts):
            work.step(ProgressLine)
            print(
                f"{work.done:,} of {len(prompts):,} prompts: {work.count.rows:,} rankings, {work.count.pairs:,} pairs"
            )
            if config.dry_run and not work.paused:
                break
    except BudgetExceeded as error:
        stopped = error
    parts = _write(out, work.rows, settings, plan.seed, lambda row: row["prompt"][-1]["content"])
    prices = settings.budget is not None and settings.budget.prices is not None
    preference_card(work, parts, ledger.totals(), prices).write(out)
    print(f"\n{work.count.on_length}\n{_where(out, parts)}")
    if stopped is not None:
        raise stopped


def filters(settings: Settings) -> list[Filter]:
    """The filters of growth: those that look at one row, those that compare it with others, and last novelty.

    So what is compared, and remembered when a run goes on, is a text as the other filters left it.
    """
    made = sorted(make_filters(settings.filters), key=lambda filter: filter.remembers)
    return [*made, Novelty(settings.novelty)]


def _decisive(plan: Plan, settings: Settings, generators: Sequence[Generator]) -> dict[str, Any]:
    """The settings that decide what comes out; others, such as the budget or concurrency, may change between runs."""
    return {
        **{one.name: getattr(plan, one.name) for one in dataclasses.fields(Plan)},
        "filters": [spec if isinstance(spec, (str, Mapping)) else repr(spec) for spec in settings.filters],
        **{name: getattr(settings, name) for name in ("novelty", "samples")},
        "task_sampling": dataclasses.asdict(settings.task_sampling),
        "answer_sampling": dataclasses.asdict(settings.answer_sampling),
        "generators": [[generator.name, generator.continues] for generator in generators],
        "prompts": VERSION,
    }


def _digest(items: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([repr(item) for item in items]).encode()).hexdigest()


def _write(
    out: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Settings,
    seed: int,
    text: Callable[[Mapping[str, Any]], str],
) -> dict[str, int]:
    """Writes the parts of the data set. An empty part has no file."""
    counts = {}
    for name, part in split(rows, settings.val, settings.test, text, seed):
        path = out / f"{name}.jsonl"
        if part:
            write_rows(path, part)
            counts[name] = len(part)
        else:
            path.unlink(missing_ok=True)
    return counts


def _line(growth: Growth, ledger: Ledger, settings: Settings) -> str:
    rows = ", ".join(f"{lang} {count.rows:,}/{growth.plan.languages[lang]:,}" for lang, count in growth.counts.items())
    taken = ledger.taken
    money = f", {taken.money:,.4f} of money" if settings.budget is not None and settings.budget.prices else ""
    return f"round {growth.round}: {rows} rows{money}"


def _where(out: Path, parts: Mapping[str, int]) -> str:
    lines = [f"{out / (name + '.jsonl')}: {count:,} rows" for name, count in parts.items()] or ["There is no row yet."]
    return "\n".join([*lines, f"What is in it, what was left out, and what it cost: {out / 'card.html'}"])
