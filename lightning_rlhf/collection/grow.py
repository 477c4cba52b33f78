"""Self-instruct: a pool of tasks grows in rounds, from seeds.

The requests of a round are a function of (seed, round, pool before the round), and its replies are read in the order of
the requests when all are in. So what comes out depends neither on how many requests run at a time nor on kills.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_rlhf.cleaning import Example, Filter, Tally, clean, make_example
from lightning_rlhf.collection.answers import Writing, answer_request, read_answer
from lightning_rlhf.collection.generators import Generator
from lightning_rlhf.collection.parse import parse_list, parse_one
from lightning_rlhf.collection.prompts import (
    LANGUAGES,
    NOT_GROWN,
    VERSION,
    WAYS,
    Prompt,
    Style,
    ask_for_list,
    ask_to_evolve,
    open_turn,
)
from lightning_rlhf.collection.seeds import Task, kinds_of
from lightning_rlhf.collection.trace import Trace
from lightning_rlhf.endpoint import Budget, ChatRequest, Ledger, Reply
from lightning_rlhf.utils.text import one_line

#: Rounds without a new row after which a language is given up.
PATIENCE = 3
#: Examples of each kind of problem that a round keeps, and characters of each.
_KEPT, _CHARACTERS = 3, 300


class GrowthError(RuntimeError):
    """Growth can't go on: most requests of a round got no reply."""


@dataclass(frozen=True)
class Plan:
    """Settings of the rounds: what they ask for.

    Args:
        languages: Number of rows to grow, by language.
        style: ``list``: new tasks after numbered examples. ``opening``: the model begins the user's turn. ``evolve``:
            deeper or broader versions of a task.
        examples: Number of examples that a list begins with.
        grown: How many of these are rows that were grown before, as soon as there are any.
        tasks: Number of tasks that a list is asked for. A larger value costs less per task, but later ones are less
            diverse.
        pilot: Requests per language in the first round.
        requests: Most requests per language in each later round. A larger value keeps more requests running at a time;
            a smaller one lets new rows serve as examples sooner.
        seed: Seed of what is shown, and of the sampling.

    Raises:
        ValueError: A setting is out of range; the message says which.
    """

    languages: dict[str, int] = field(default_factory=dict)
    style: Style = "list"
    examples: int = 8
    grown: int = 2
    tasks: int = 8
    pilot: int = 20
    requests: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for lang, rows in self.languages.items():
            if rows < 1:
                raise ValueError(f"languages: {lang} must be at least 1 row; got {rows}.")
        for name, value, least in (
            ("examples", self.examples, 1),
            ("grown", self.grown, 0),
            ("tasks", self.tasks, 1),
            ("pilot", self.pilot, 1),
            ("requests", self.requests, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        if self.grown >= self.examples:
            raise ValueError(f"grown must be below examples ({self.examples}); got {self.grown}.")


class Asked(NamedTuple):
    """A request for tasks.

    Attributes:
        lang: Language.
        kind: Kind of task that it asks for.
        shown: The tasks that it shows.
        way: The way of evolving a task; empty for other styles.
        prompt: The prompt.
        request: The request.
    """

    lang: str
    kind: str
    shown: tuple[Task, ...]
    way: str
    prompt: Prompt
    request: ChatRequest


@dataclass
class Count:
    """Counts of a language, in one round or in all.

    Attributes:
        requests: Requests for tasks.
        asked: Tasks that they asked for.
        unread: Replies and parts of replies that are no task, by kind of problem.
        tasks: Tasks that were read.
        instruction: The filters' counts for them.
        surplus: Tasks that were not needed any more.
        answers: Requests for answers.
        unanswered: Answers that can't be used, by kind of problem.
        row: What the filters did with tasks and answers.
        rows: Rows that were accepted.
        examples: A few texts for each kind of problem.
    """

    requests: int = 0
    asked: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    tasks: int = 0
    instruction: dict[str, Any] = field(default_factory=dict)
    surplus: int = 0
    answers: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    row: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Rows per request for tasks."""
        return self.rows / max(1, self.requests)

    @property
    def share(self) -> float:
        """The yield: rows per task that was asked for."""
        return self.rows / max(1, self.asked)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {**vars(self), "unread": dict(self.unread), "unanswered": dict(self.unanswered)}

    def add(self, step: Mapping[str, Any]) -> None:
        """Adds the counts of a round, as :meth:`to_json` wrote them."""
        for name in ("requests", "asked", "tasks", "surplus", "answers", "rows"):
            setattr(self, name, getattr(self, name) + step[name])
        self.unread.update(step["unread"])
        self.unanswered.update(step["unanswered"])
        for name in ("instruction", "row"):
            setattr(self, name, add_tallies(getattr(self, name), step[name]))
        for kind, texts in step["examples"].items():
            known = self.examples.setdefault(kind, [])
            known += texts[: _KEPT - len(known)]

    def note(self, counter: Counter[str], kind: str, text: str) -> None:
        """Counts a problem, and keeps its text as an example."""
        counter[kind] += 1
        known = self.examples.setdefault(kind, [])
        if len(known) < _KEPT:
            known.append(one_line(text, _CHARACTERS))


class Growth:
    """The rows that were grown, and the rounds that are still to do.

    Args:
        plan: What to ask for.
        seeds: The first tasks of the pool.
        generator: Writes tasks.
        answerer: Writes answers.
        filters: Decide which tasks and rows are accepted. Those that remember rows know the seeds afterwards.
        tasks: How tasks are sampled.
        answers: How answers are sampled.
        trace: Keeps each round.
        ledger: Keeps requests and replies.
        budget: Refuses requests that could pass it.

    Attributes:
        rows: The rows, in the order in which they were accepted.
        counts: What happened in each language.
        round: Number of rounds that are done.
        asked: What the first round asked for and what came of it, to be shown.
    """

    def __init__(
        self,
        plan: Plan,
        seeds: Sequence[Task],
        generator: Generator,
        answerer: Generator,
        filters: Sequence[Filter],
        tasks: Writing,
        answers: Writing,
        trace: Trace,
        ledger: Ledger,
        budget: Budget | None = None,
    ) -> None:
        if not plan.languages:
            raise ValueError("languages is empty. Write for example {en: 2000}.")
        if strange := [lang for lang in plan.languages if lang not in LANGUAGES]:
            raise ValueError(f"languages: there are prompts for {' and '.join(LANGUAGES)}, but not for {strange[0]}.")
        if plan.style == "opening" and not generator.continues:
            raise ValueError(
                "style: opening needs a model that can continue the user's turn. Use EngineGenerator, or an endpoint "
                "with continues: true."
            )
        self.plan, self.generator, self.answerer, self.filters = plan, generator, answerer, filters
        self.writing, self.answering, self.trace, self.ledger, self.budget = tasks, answers, trace, ledger, budget
        self.seeds = [seed for seed in seeds if seed.kind not in NOT_GROWN]
        self.pool: dict[str, list[Task]] = {lang: [] for lang in plan.languages}
        self.rows: list[dict[str, Any]] = []
        self.counts = {lang: Count() for lang in plan.languages}
        self.idle = dict.fromkeys(plan.languages, 0)
        self.round = 0
        self.asked: list[dict[str, Any]] = []
        self._remember([(seed.text, seed.lang) for seed in seeds])

    @property
    def missing(self) -> dict[str, int]:
        """Rows that are still to grow, by language; languages that bring nothing new are left out."""
        left = {lang: rows - self.counts[lang].rows for lang, rows in self.plan.languages.items()}
        return {lang: rows for lang, rows in left.items() if rows > 0 and self.idle[lang] < PATIENCE}

    @property
    def paused(self) -> bool:
        """Returns whether the next round was done before, so that it only has to be read."""
        return bool(self.missing) and self.trace.has(self.round + 1)

    @property
    def dried_up(self) -> list[str]:
        """Languages that brought nothing new in several rounds."""
        return [lang for lang, rounds in self.idle.items() if rounds >= PATIENCE]

    def step(self, progress: Callable[[str, int], Callable[[int], None]] | None = None) -> None:
        """Does the next round, or reads it if it was done before.

        Args:
            progress: Gets the name and number of requests that are about to run; what it returns is called with the
                number of those that have their reply.

        Raises:
            BudgetExceeded: A request could pass the budget. Rounds before this one stay.
            EndpointError: The endpoint can't be used.
            GrowthError: Most requests got no reply.
        """
        number = self.round + 1
        done = self.trace.read(number)
        if done is None:
            done = self.trace.write(number, self._run(number, progress))
        else:
            self._remember([(task["text"], task["lang"]) for task in done["remembered"]])
        self._take(done)
        self.round = number

    def _run(self, number: int, progress: Callable[[str, int], Callable[[int], None]] | None) -> dict[str, Any]:
        asked = self.requests(number)
        replies = self._generate(self.generator, [one.request for one in asked], f"round {number}, tasks", progress)
        counts = {lang: Count() for lang in self.missing}
        kept: list[Example] = []
        wanted: list[Example] = []
        for lang, count in counts.items():
            found = self._tasks(number, lang, count, asked, replies)
            needed = found[: self.missing[lang]]
            count.surplus = len(found) - len(needed)
            kept, wanted = kept + found, wanted + needed
        requests = [
            answer_request(self.answering, example.lang, example.instruction, self._seed(number, "answer", i))
            for i, example in enumerate(wanted)
        ]
        written = self._generate(self.answerer, requests, f"round {number}, answers", progress)
        rows = []
        for lang, count in counts.items():
            rows += self._rows(lang, count, wanted, written)
        return {
            "round": number,
            "counts": {lang: count.to_json() for lang, count in counts.items()},
            "remembered": [{"text": example.instruction, "lang": example.lang} for example in kept],
            "rows": rows,
            "asked": self._shown(asked, rows) if number == 1 else [],
        }

    def requests(self, number: int) -> list[Asked]:
        """The requests for tasks of the next round, which has this number."""
        asked = []
        for lang, missing in self.missing.items():
            count = self.counts[lang]
            if number == 1:
                size = self.plan.pilot
            else:
                size = min(self.plan.requests, math.ceil(missing / max(count.rate, 1 / self.plan.requests)))
            rng = random.Random(f"{self.plan.seed} {number} {lang}")
            seeds, grown = _Pool([seed for seed in self.seeds if seed.lang == lang]), _Pool(self.pool[lang])
            kinds = kinds_of(seeds.tasks, lang)
            for i in range(count.requests, count.requests + size):
                asked.append(self._ask(rng, lang, kinds[i % len(kinds)], seeds, grown, i))
        return asked

    def _ask(self, rng: random.Random, lang: str, kind: str, seeds: _Pool, grown: _Pool, sample: int) -> Asked:
        shown: list[Task] = []
        way, stop = "", tuple[str, ...]()
        if self.plan.style == "list":
            shown = grown.draw(rng, kind, self.plan.grown)
            shown = shown + seeds.draw(rng, kind, self.plan.examples - len(shown))
            rng.shuffle(shown)
            prompt = ask_for_list(lang, kind, [task.text for task in shown], self.plan.tasks, self.generator.continues)
            if prompt.first is not None:
                stop = (f"\n{prompt.first + self.plan.tasks}.", "\n\n")
        elif self.plan.style == "evolve":
            place = rng.randrange(len(seeds.tasks) + len(grown.tasks))
            shown = [seeds.tasks[place] if place < len(seeds.tasks) else grown.tasks[place - len(seeds.tasks)]]
            way = rng.choice(list(WAYS))
            kind = shown[0].kind if way != "other" else ""
            prompt = ask_to_evolve(lang, shown[0].text, way)
        else:
            prompt = open_turn(lang, kind)
        request = self.writing.request(prompt.messages, rng.getrandbits(31), sample, stop, prompt.extra)
        return Asked(lang, kind, tuple(shown), way, prompt, request)

    def _tasks(
        self, number: int, lang: str, count: Count, asked: Sequence[Asked], replies: Sequence[Reply]
    ) -> list[Example]:
        """The tasks of a language in the replies, as far as the filters keep them."""
        found: list[Example] = []
        for i, (one, reply) in enumerate(zip(asked, replies, strict=True)):
            if one.lang != lang:
                continue
            count.requests += 1
            count.asked += one.prompt.count
            if reply.text is None:
                count.note(count.unread, f"no reply: {reply.kind or 'unknown'}", reply.problem or "")
                continue
            cut, shown = reply.finish_reason == "length", [task.text for task in one.shown]
            if self.plan.style == "list":
                pieces = parse_list(reply.text, one.prompt.first, cut, shown)
            else:
                pieces = parse_one(reply.text, cut, shown)
            for j, piece in enumerate(pieces):
                if piece.problem:
                    count.note(count.unread, piece.problem, piece.source)
                else:
                    count.tasks += 1
                    found.append(self._example(f"{lang}-{number}-{i + 1}-{j + 1}", one, reply, piece.text))
        tally = Tally()
        kept = list(clean(found, self.filters, tally))
        count.instruction = tally.to_json(seconds=False)
        return kept

    def _example(self, id: str, asked: Asked, reply: Reply, text: str) -> Example:
        provenance = {
            "parents": [task.id for task in asked.shown],
            "style": self.plan.style,
            **({"way": asked.way} if asked.way else {}),
            "round": self.round + 1,
            "prompts": VERSION,
            "generator": self.generator.name,
            "request": reply.key,
        }
        row = {"id": id, "prompt": text, "lang": asked.lang, "category": asked.kind, "provenance": provenance}
        return make_example(row, id, "prompt")

    def _rows(
        self, lang: str, count: Count, wanted: Sequence[Example], replies: Sequence[Reply]
    ) -> list[dict[str, Any]]:
        """The rows of a language, of tasks and their answers, that the filters keep."""
        found, notes = [], {}
        for example, reply in zip(wanted, replies, strict=True):
            if example.lang != lang:
                continue
            count.answers += 1
            text, problem = read_answer(reply)
            if problem:
                count.note(count.unanswered, problem, text or reply.problem or "")
                continue
            row = dict(example.row)
            messages = [
                {"role": "user", "content": example.instruction},
                {"role": "assistant", "content": text},
            ]
            provenance = {**row["provenance"], "answerer": self.answerer.name, "answer": reply.key}
            made = {"id": row["id"], "messages": messages, "lang": lang, "category": row["category"]}
            notes[example.where] = example.notes
            found.append(make_example({**made, "provenance": provenance}, example.where, "instruction"))
        tally = Tally()
        kept = list(clean(found, [filter for filter in self.filters if not filter.remembers], tally))
        count.row, count.rows = tally.to_json(seconds=False), len(kept)
        rows = []
        for example in kept:
            row = dict(example.row)
            row["provenance"] = {**row["provenance"], "filters": {**notes[example.where], **example.notes}}
            rows.append(row)
        return rows

    def _generate(
        self,
        generator: Generator,
        requests: Sequence[ChatRequest],
        name: str,
        progress: Callable[[str, int], Callable[[int], None]] | None,
    ) -> list[Reply]:
        if not requests:
            return []
        show, done = progress(name, len(requests)) if progress else None, 0

        def count(number: int, reply: Reply) -> None:
            nonlocal done
            done += 1
            if show is not None:
                show(done)

        replies = generator.generate(requests, self.ledger, self.budget, count)
        silent = Counter(reply.kind or "unknown" for reply in replies if reply.text is None)
        if 2 * silent.total() > len(replies):
            kinds = ", ".join(f"{number} x {kind}" for kind, number in silent.most_common())
            first = next(reply.problem for reply in replies if reply.text is None)
            self.ledger.reopen()
            raise GrowthError(
                f"{silent.total()} of {len(replies)} requests to {generator.name} got no reply ({kinds}; first: "
                f"{one_line(first or '', 200)}). Mend that and run the same command: it asks for these again, "
                "and keeps the replies that arrived."
            )
        return replies

    def _take(self, step: Mapping[str, Any]) -> None:
        for lang, found in step["counts"].items():
            self.counts[lang].add(found)
            self.idle[lang] = 0 if found["rows"] else self.idle[lang] + 1
        for row in step["rows"]:
            self.rows.append(row)
            self.pool[row["lang"]].append(Task(row["id"], row["messages"][0]["content"], row["lang"], row["category"]))
        self.asked = self.asked or step["asked"]

    def _remember(self, tasks: Sequence[tuple[str, str]]) -> None:
        """Lets filters know tasks that were accepted before."""
        examples = [make_example({"prompt": text, "lang": lang}, kind="prompt") for text, lang in tasks]
        for filter in self.filters:
            if filter.remembers:
                filter.prepare(examples)
                for example in examples:
                    filter.add(example)

    def _shown(self, asked: Sequence[Asked], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Lists each request of the pilot, with what came back."""
        of: dict[str, list[str]] = {}
        for row in rows:
            of.setdefault(row["provenance"]["request"], []).append(row["messages"][0]["content"])
        return [
            {
                "lang": one.lang,
                "kind": one.kind,
                "prompt": "\n\n".join(message["content"] for message in one.prompt.messages),
                "asked": one.prompt.count,
                "rows": of.get(one.request.key(self.generator.name), []),
            }
            for one in asked
        ]

    def _seed(self, *parts: object) -> int:
        return random.Random(" ".join(map(str, (self.plan.seed, *parts)))).getrandbits(31)


class _Pool:
    """Tasks to draw from."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self._by_kind: dict[str, list[Task]] = {}
        for task in tasks:
            self._by_kind.setdefault(task.kind, []).append(task)

    def draw(self, rng: random.Random, kind: str, count: int) -> list[Task]:
        """Draws different tasks, at least half of them of a kind as far as there are so many."""
        alike = self._by_kind.get(kind, [])
        drawn = rng.sample(alike, min(len(alike), math.ceil(count / 2)))
        known = {task.id for task in drawn}
        others = [task for task in rng.sample(self.tasks, min(len(self.tasks), count)) if task.id not in known]
        return drawn + others[: count - len(drawn)]


def add_tallies(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Adds two tallies of filters, as :meth:`~lightning_rlhf.cleaning.Tally.to_json` writes them."""
    if not one or not other:
        return dict(one or other)
    filters = {}
    for name in {**one["filters"], **other["filters"]}:
        found = [tally["filters"][name] for tally in (one, other) if name in tally["filters"]]
        reasons = sum((Counter(tally["reasons"]) for tally in found), Counter[str]())
        sums = {key: sum(tally[key] for tally in found) for key in ("seen", "dropped", "changed")}
        examples = [example for tally in found for example in tally["examples"]][:_KEPT]
        filters[name] = {**sums, "reasons": dict(reasons), "examples": examples}
    return {"seen": one["seen"] + other["seen"], "kept": one["kept"] + other["kept"], "filters": filters}


def split(
    rows: Sequence[Mapping[str, Any]], val: float, test: float, text: Callable[[Mapping[str, Any]], str], seed: int
) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Splits rows into parts, in each language by the same shares.

    Args:
        rows: The rows.
        val: Share of the validation rows.
        test: Share of the test rows.
        text: The text of a row that decides where it goes; equal texts stay together.
        seed: Seed of the split.

    Yields:
        Name and rows of ``train``, ``val`` and ``test``.
    """
    part: dict[tuple[str, str], str] = {}
    for lang in dict.fromkeys(row["lang"] for row in rows):
        texts = list(dict.fromkeys(text(row) for row in rows if row["lang"] == lang))
        order = sorted(texts, key=lambda one: random.Random(f"{seed} {one}").random())
        held, tested = round(val * len(order)), round(test * len(order))
        for i, one in enumerate(order):
            part[lang, one] = "val" if i < held else "test" if i < held + tested else "train"
    for name in ("train", "val", "test"):
        yield name, [row for row in rows if part[row["lang"], text(row)] == name]
