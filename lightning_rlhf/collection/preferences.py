"""Preferences: several answers to each prompt, ranked by a reward or a judge."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from lightning_rlhf.cleaning.example import read_examples
from lightning_rlhf.collection.answers import Writing, read_answer
from lightning_rlhf.collection.generators import Generator
from lightning_rlhf.collection.grow import GrowthError
from lightning_rlhf.collection.trace import Trace
from lightning_rlhf.data.formats import Message
from lightning_rlhf.data.prompt_formats import Prompt
from lightning_rlhf.data.sources import BadRows, Source
from lightning_rlhf.endpoint import Budget, Ledger, Reply
from lightning_rlhf.evaluation.judges import RewardJudge
from lightning_rlhf.rewards import BadScores, Reward, score_texts
from lightning_rlhf.rewards.judges import Answer, AnswerPair, Judge, judge_pairs

#: Prompts that are answered, ranked and written down together.
CHUNK = 64


class Asked(NamedTuple):
    """A prompt to answer.

    Attributes:
        id: Its name in provenance.
        where: Its place.
        messages: Its turns.
        lang: Its language.
        columns: Other columns of its row, for rewards.
    """

    id: str
    where: str
    messages: tuple[Message, ...]
    lang: str
    columns: Mapping[str, Any]


def read_prompts(source: Source, bad: BadRows) -> list[Asked]:
    """Reads prompts, in any format that the data modules read. A repeated prompt counts once.

    Raises:
        ValueError: There is no prompt.
    """
    found: dict[str, Asked] = {}
    for example in read_examples(source, bad, kind="prompt"):
        assert isinstance(example.parsed, Prompt)  # asked for by kind
        messages = example.parsed.prompt
        if isinstance(messages, str):
            messages = ({"role": "user", "content": messages},)
        asked = Asked(f"prompt-{len(found) + 1}", example.where, messages, example.lang, example.parsed.columns)
        found.setdefault(repr(messages), asked)
    if not found:
        raise ValueError(f"There is no prompt in {source}.")
    return list(found.values())


class Ranker(Protocol):
    """Ranks the answers to prompts."""

    name: str

    def __call__(self, asked: Sequence[tuple[Asked, Sequence[str]]], tally: Counter[str]) -> list[list[float]]:
        """Scores answers.

        Args:
            asked: Prompts with their answers.
            tally: Counts what can't be ranked, by kind.

        Returns:
            A score for each answer of each prompt. A larger one is better, NaN is none.
        """
        ...


class ByReward:
    """Ranks by the scores of a reward.

    Args:
        judge: The reward, with the tokenizer that it needs.
        name: The reward's name.
    """

    def __init__(self, judge: RewardJudge, name: str) -> None:
        self.judge, self.name = judge, name

    def __call__(self, asked: Sequence[tuple[Asked, Sequence[str]]], tally: Counter[str]) -> list[list[float]]:
        """Scores answers; see :class:`Ranker`."""
        items = [(one, text) for one, answers in asked for text in answers]
        scores = iter(self._scores(items) if items else [])
        found = [[next(scores) for _ in answers] for _, answers in asked]
        tally["answers without a finite score"] += sum(not math.isfinite(score) for row in found for score in row)
        return found

    def _scores(self, items: Sequence[tuple[Asked, str]]) -> list[float]:
        reward, tokenizer, device = self.judge.reward, self.judge.tokenizer, self.judge.device
        prompts = [list(one.messages) for one, _ in items]
        columns = [one.columns for one, _ in items]
        try:
            return score_texts(reward, prompts, [text for _, text in items], tokenizer, columns=columns, device=device)
        except BadScores as error:  # it holds all scores, those that are not finite as NaN
            found: list[float] = error.scores.total.tolist()
            return found


class ByJudge:
    """Ranks by comparing each two answers in both orders. An answer's score is its wins, a tie being half of one.

    A judge whose verdict depends on the order sees a tie, and so says nothing.

    Args:
        judge: The judge.
        name: The judge's name.
    """

    def __init__(self, judge: Judge, name: str) -> None:
        self.judge, self.name = judge, name

    def __call__(self, asked: Sequence[tuple[Asked, Sequence[str]]], tally: Counter[str]) -> list[list[float]]:
        """Scores answers; see :class:`Ranker`."""
        pairs, places = [], []
        for number, (one, answers) in enumerate(asked):
            for i, j in itertools.combinations(range(len(answers)), 2):
                pairs.append(AnswerPair(list(one.messages), Answer(answers[i]), Answer(answers[j]), one.columns))
                places.append((number, i, j))
        scores = [[0.0] * len(answers) for _, answers in asked]
        for (number, i, j), judged in zip(places, judge_pairs(self.judge, pairs), strict=True):
            tally["pairs judged"] += 1
            if judged.outcome is None:
                tally["pairs without a verdict"] += 1
                scores[number][i] = scores[number][j] = math.nan
            else:
                won = {"a": 1.0, "b": 0.0, "tie": 0.5}[judged.outcome]
                a, b = judged.scores
                tally["pairs on which the orders disagree"] += a != b
                scores[number][i] += won
                scores[number][j] += 1 - won
        return scores


@dataclass
class PreferenceCount:
    """Counts of a run.

    Attributes:
        prompts: Prompts that were answered.
        answers: Answers that were asked for.
        problems: Answers, pairs and prompts that brought no pair, by kind.
        rows: Prompts with a ranking.
        pairs: Pairs in these rankings.
        longer: Pairs whose better answer is the longer one, in characters.
        equal: Pairs whose answers are equally long.
        wins: Pairs that each generator's answers won against another's, and pairs that they lost.
    """

    prompts: int = 0
    answers: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    pairs: int = 0
    longer: int = 0
    equal: int = 0
    wins: dict[str, list[int]] = field(default_factory=dict)

    @property
    def longer_share(self) -> float:
        """Share of the pairs of different lengths in which the longer answer won."""
        return self.longer / max(1, self.pairs - self.equal)

    @property
    def on_length(self) -> str:
        """A sentence that says how often the longer answer won."""
        unequal = self.pairs - self.equal
        if not unequal:
            return "No pair has answers of different lengths."
        share = f"{self.longer:,} of the {unequal:,} pairs of different lengths: {self.longer_share:.1%}"
        return f"The longer answer won {share}."

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {**vars(self), "problems": {kind: count for kind, count in self.problems.items() if count}}

    def add(self, step: Mapping[str, Any]) -> None:
        """Adds the counts of a step, as :meth:`to_json` wrote them."""
        for name in ("prompts", "answers", "rows", "pairs", "longer", "equal"):
            setattr(self, name, getattr(self, name) + step[name])
        self.problems.update(step["problems"])
        for name, (won, lost) in step["wins"].items():
            known = self.wins.setdefault(name, [0, 0])
            known[0], known[1] = known[0] + won, known[1] + lost


class Preferences:
    """Rankings of answers, and the prompts that are still to answer.

    Args:
        prompts: The prompts.
        generators: Each answers every prompt.
        samples: Answers per prompt and generator.
        ranker: Ranks them.
        writing: How answers are sampled.
        trace: Keeps each step.
        ledger: Keeps requests and replies.
        budget: Refuses requests that could pass it.
        seed: Seed of the sampling.

    Attributes:
        rows: The rankings, in the order of the prompts.
        count: What happened.
        done: Number of prompts that are done.
    """

    def __init__(
        self,
        prompts: Sequence[Asked],
        generators: Sequence[Generator],
        samples: int,
        ranker: Ranker,
        writing: Writing,
        trace: Trace,
        ledger: Ledger,
        budget: Budget | None = None,
        seed: int = 0,
    ) -> None:
        if samples * len(generators) < 2:
            raise ValueError(
                "samples: a prompt needs at least 2 answers to be ranked. Raise samples, or add generators."
            )
        self.prompts, self.generators, self.samples, self.ranker = prompts, generators, samples, ranker
        self.writing, self.trace, self.ledger, self.budget, self.seed = writing, trace, ledger, budget, seed
        self.rows: list[dict[str, Any]] = []
        self.count = PreferenceCount()
        self.done = 0

    @property
    def paused(self) -> bool:
        """Returns whether the next step was done before, so that it only has to be read."""
        return self.trace.has(self.done // CHUNK + 1)

    def step(self, progress: Callable[[str, int], Callable[[int], None]] | None = None) -> None:
        """Does the next prompts, or reads what was done before.

        Raises:
            BudgetExceeded: A request could pass the budget. Steps before this one stay.
            EndpointError: An endpoint can't be used.
            GrowthError: No request of a generator got a reply.
            JudgeError: The judge cannot judge.
        """
        number = self.done // CHUNK + 1
        part = self.prompts[self.done : self.done + CHUNK]
        found = self.trace.read(number)
        if found is None:
            found = self.trace.write(number, self._run(number, part, progress))
        self.rows += found["rows"]
        self.count.add(found["count"])
        self.done += len(part)

    def _run(
        self, number: int, part: Sequence[Asked], progress: Callable[[str, int], Callable[[int], None]] | None
    ) -> dict[str, Any]:
        count = PreferenceCount(prompts=len(part))
        answers: list[list[tuple[str, str, str]]] = [[] for _ in part]  # text, generator, key
        for which, generator in enumerate(self.generators):
            replies = self._answers(number, which, generator, part, progress)
            for i, reply in enumerate(replies):
                text, problem = read_answer(reply)
                count.answers += 1
                here = answers[i // self.samples]
                if problem:
                    count.problems[f"answers not used: {problem}"] += 1
                elif text in [known for known, _, _ in here]:
                    count.problems["answers that repeat another"] += 1
                else:
                    here.append((text, generator.name, reply.key))
        several = [(one, found) for one, found in zip(part, answers, strict=True) if len(found) > 1]
        count.problems["prompts with fewer than two answers"] += len(part) - len(several)
        scores = self.ranker([(one, [text for text, _, _ in found]) for one, found in several], count.problems)
        rows = []
        for (one, found), scored in zip(several, scores, strict=True):
            if row := self._row(one, found, scored, count):
                rows.append(row)
        return {"count": count.to_json(), "rows": rows}

    def _answers(
        self,
        number: int,
        which: int,
        generator: Generator,
        part: Sequence[Asked],
        progress: Callable[[str, int], Callable[[int], None]] | None,
    ) -> list[Reply]:
        requests = [
            self.writing.request(
                [*one.messages],
                random.Random(f"{self.seed} {one.id} {which} {sample}").getrandbits(31),
                which * self.samples + sample,
            )
            for one in part
            for sample in range(self.samples)
        ]
        show, done = progress(f"step {number}, {generator.name}", len(requests)) if progress else None, 0

        def arrived(_: int, reply: Reply) -> None:
            nonlocal done
            done += 1
            if show is not None:
                show(done)

        replies = generator.generate(requests, self.ledger, self.budget, arrived)
        if all(reply.text is None for reply in replies):
            self.ledger.reopen()
            raise GrowthError(
                f"No request to {generator.name} got a reply (first: {replies[0].problem}). Mend that and run the same "
                "command: it asks for these again."
            )
        return replies

    def _row(
        self, one: Asked, answers: Sequence[tuple[str, str, str]], scores: Sequence[float], count: PreferenceCount
    ) -> dict[str, Any] | None:
        """The ranking of a prompt's answers, best first; None if no answer is better than another."""
        finite = [(score, *answer) for score, answer in zip(scores, answers, strict=True) if math.isfinite(score)]
        ranked = sorted(finite, key=lambda found: -found[0])  # stable: ties keep the order of the answers
        pairs = [(a, b) for a, b in itertools.combinations(ranked, 2) if a[0] > b[0]]
        count.problems["ties"] += math.comb(len(ranked), 2) - len(pairs)
        if not pairs:
            count.problems["prompts without a better answer"] += 1
            return None
        count.rows += 1
        count.pairs += len(pairs)
        for better, worse in pairs:
            count.longer += len(better[1]) > len(worse[1])
            count.equal += len(better[1]) == len(worse[1])
            if better[2] != worse[2]:
                count.wins.setdefault(better[2], [0, 0])[0] += 1
                count.wins.setdefault(worse[2], [0, 0])[1] += 1
        row: dict[str, Any] = {
            "id": f"ranking-{one.id.rpartition('-')[2]}",
            "prompt": [dict(message) for message in one.messages],
            "ranked": [text for _, text, _, _ in ranked],
            "scores": [score for score, *_ in ranked],
        }
        if len(ranked) == 2:
            row["margin"] = ranked[0][0] - ranked[1][0]
        provenance = {
            "parents": [one.id],
            "prompt": one.where.replace("\\", "/").rpartition("/")[2],
            "generators": [name for _, _, name, _ in ranked],
            "answers": [key for _, _, _, key in ranked],
            "ranked_by": self.ranker.name,
        }
        return {**row, "lang": one.lang, "provenance": provenance}


def make_ranker(reward: Any, judge: Judge | None) -> Ranker:
    """Makes the ranker from the settings ``reward`` and ``judge``.

    Raises:
        ValueError: Neither or both are given, or the reward is not a reward.
    """
    from lightning_rlhf.evaluation import make_judge

    if (reward is None) == (judge is None):
        raise ValueError("--preferences needs what ranks the answers: set either reward or judge.")
    if judge is not None:
        return ByJudge(judge, getattr(judge, "model", type(judge).__name__))
    made = make_judge(reward)
    assert isinstance(made, RewardJudge)  # of a reward
    name = reward if isinstance(reward, str) else type(reward).__name__ if isinstance(reward, Reward) else repr(reward)
    return ByReward(made, name)
