"""Growth in rounds: what is asked for, what is counted, and that neither kills nor order change what comes out."""

import json
import random
import re

import pytest
from scripted import Scripted, new_task

from lightning_rlhf.collection.answers import Writing
from lightning_rlhf.collection.command import filters
from lightning_rlhf.collection.grow import Growth, GrowthError, Plan, split
from lightning_rlhf.collection.seeds import Task, read_seeds
from lightning_rlhf.collection.settings import Settings
from lightning_rlhf.collection.trace import Trace
from lightning_rlhf.data.sources import BadRows
from lightning_rlhf.endpoint import Ledger, Reply

SEEDS = [Task(f"seed-{lang}-{i}", new_task(random.Random(f"{lang}{i}"), lang), lang, f"kind {i % 3}")
         for lang in ("en", "zh") for i in range(12)]  # fmt: skip
PLAN = Plan({"en": 40, "zh": 30}, pilot=3, requests=4, examples=4, tasks=8)


def grow(folder, generator, plan=PLAN, rounds=99, **options) -> Growth:
    folder.mkdir(exist_ok=True)
    with Ledger(folder / "ledger.sqlite") as ledger:
        settings = Settings(generator, **options)
        made = filters(settings)
        growth = Growth(
            plan, SEEDS, generator, generator, made, Writing(), Writing(), Trace(folder / "trace", {}), ledger
        )
        while growth.missing and growth.round < rounds:
            growth.step()
    return growth


def files(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "trace").iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    generator = Scripted()
    return grow(folder, generator), generator, folder


def test_all_rows_come_with_their_provenance(whole):
    growth, generator, _ = whole
    assert {lang: count.rows for lang, count in growth.counts.items()} == {"en": 40, "zh": 30}
    keys = {request.key("scripted") for request in generator.sent}
    known = {seed.id for seed in SEEDS}
    assert len({row["id"] for row in growth.rows}) == 70
    for row in growth.rows:
        made = row["provenance"]
        assert {made["request"], made["answer"]} <= keys and made["prompts"] and made["generator"] == "scripted"
        assert len(made["parents"]) == 4 and set(made["parents"]) <= known  # rows shown are older than this row
        assert 0 < made["filters"]["novelty"] <= 0.7
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        if row["id"] == growth.rows[-1]["id"] or growth.round > made["round"]:
            known.add(row["id"])
    assert any(id.startswith(("en-", "zh-")) for row in growth.rows for id in row["provenance"]["parents"])


def test_each_problem_is_counted_as_often_as_it_was_made(whole):
    growth, generator, _ = whole
    unread = sum((count.unread for count in growth.counts.values()), start=type(growth.counts["en"].unread)())
    assert unread["empty"] + unread["no list"] == generator.did["broken"] > 0
    assert unread["repeats an example"] == generator.did["known"] > 0
    refused = [count.row["filters"]["Refusal"]["reasons"].get("answer refuses", 0) for count in growth.counts.values()]
    assert sum(refused) == generator.did["refused"] > 0
    for count in growth.counts.values():
        assert count.tasks == count.instruction["seen"] and count.instruction["kept"] == count.answers + count.surplus
        assert count.row["kept"] == count.rows == count.answers - count.row["filters"]["Refusal"]["dropped"]


def test_a_second_run_sends_nothing_and_writes_the_same(whole):
    growth, _, folder = whole
    before, again = files(folder), Scripted()
    assert grow(folder, again).rows == growth.rows
    assert again.sent == [] and files(folder) == before


def test_the_ledger_alone_brings_back_all(whole, tmp_path):
    growth, _, folder = whole
    (tmp_path / "ledger.sqlite").write_bytes((folder / "ledger.sqlite").read_bytes())
    again = Scripted()
    assert grow(tmp_path, again).rows == growth.rows
    assert again.sent == [] and files(tmp_path) == files(folder)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 4, 7, 20, 41, 60])
def test_a_run_that_was_stopped_ends_with_the_same_files(whole, tmp_path, after):
    growth, first, folder = whole
    left = iter(range(after))

    class Dying(Scripted):
        def _text(self, request, rng):
            if next(left, None) is None:
                raise Killed
            return super()._text(request, rng)

    with pytest.raises(Killed):
        grow(tmp_path, Dying())
    rest = Scripted()
    assert grow(tmp_path, rest).rows == growth.rows
    assert files(tmp_path) == files(folder)
    assert after + len(rest.sent) == len(first.sent)  # nothing that arrived is asked for again


def test_requests_depend_on_seed_round_and_pool_alone(whole, tmp_path):
    growth = grow(tmp_path / "a", Scripted(), rounds=1)
    other = grow(tmp_path / "b", Scripted(), rounds=1)
    keys = [one.request.key("m") for one in growth.requests(2)]
    assert keys == [one.request.key("m") for one in other.requests(2)] and len(set(keys)) == len(keys)
    assert not {*keys} & {one.request.key("m") for one in growth.requests(3)}
    plan = Plan(PLAN.languages, pilot=3, requests=4, examples=4, tasks=8, seed=1)
    assert not {*keys} & {one.request.key("m") for one in grow(tmp_path / "c", Scripted(), plan, rounds=1).requests(2)}


def test_every_kind_is_asked_for_with_examples_of_it(whole):
    growth, _, _ = whole
    assert {one["kind"] for one in growth.asked} == {"kind 0", "kind 1", "kind 2"}
    for one in growth.asked:
        assert one["kind"] in one["prompt"]
    assert len(growth.asked) == 2 * PLAN.pilot


def test_growth_that_brings_nothing_new_ends(tmp_path):
    def same(request, rng):
        return "1. Name a river." if len(request.messages) == 1 else "The Rhine."

    growth = grow(tmp_path, Scripted(write=same), Plan({"en": 40}, pilot=2, requests=2))
    assert growth.dried_up == ["en"] and growth.counts["en"].rows == 1 and growth.round == 4


def test_a_model_that_does_not_reply_ends_growth_and_is_asked_again(tmp_path):
    class Silent(Scripted):
        def generate(self, requests, ledger=None, budget=None, on_reply=None):
            replies = [Reply(one.key(self.name), problem="HTTP 500: busy", kind="http_500") for one in requests]
            ledger.settle(replies)
            return replies

    with pytest.raises(
        GrowthError, match=r"6 of 6 requests to scripted got no reply \(6 x http_500; first: HTTP 500: busy"
    ):
        grow(tmp_path, Silent())
    assert not files(tmp_path).keys() & {"step-00001.json"}
    assert grow(tmp_path, Scripted(), rounds=1).rows


def test_a_task_can_be_evolved_and_a_turn_be_opened(tmp_path):
    plan = Plan({"en": 10}, style="evolve", pilot=3, requests=3)
    growth = grow(tmp_path / "evolve", Scripted(), plan)
    for row in growth.rows:
        assert len(row["provenance"]["parents"]) == 1 and row["provenance"]["way"]
    opening = Plan({"en": 10}, style="opening", pilot=3, requests=3)
    with pytest.raises(ValueError, match="style: opening needs a model that can continue"):
        grow(tmp_path / "opening", Scripted(), opening)

    class Continuing(Scripted):
        continues = True

        def _text(self, request, rng):
            return new_task(rng, "en")

    generator = Continuing()
    assert len(grow(tmp_path / "continuing", generator, opening).rows) == 10
    assert generator.sent[0].messages[-1] == {"role": "user", "content": ""}
    assert generator.sent[0].extra["continue_final_message"]


def test_a_model_that_continues_gets_the_list_begun(tmp_path):
    class Continuing(Scripted):
        continues = True

        def _text(self, request, rng):
            if request.messages[-1]["role"] != "assistant":
                return "Yes: " + new_task(rng, "en")
            assert re.search(r"\n5\.$", request.messages[-1]["content"]) and "\n13." in request.stop
            return f" {new_task(rng, 'en')}\n6. {new_task(rng, 'en')}\n7. Half a ta"

    growth = grow(tmp_path, Continuing(), Plan({"en": 10}, pilot=3, requests=3, examples=4, tasks=8))
    assert growth.counts["en"].rows == 10


def test_rewards_test_sets_and_personal_data_decide_on_rows_too(tmp_path):
    against = tmp_path / "test.jsonl"
    tasks = [new_task(random.Random(f"test {i}"), "en") for i in range(3)]
    against.write_text("".join(json.dumps({"prompt": task}) + "\n" for task in tasks))

    def write(request, rng):
        if len(request.messages) > 1:
            return "abc" if rng.random() < 0.3 else "The quick brown fox jumps over the lazy dog."
        call = f"Explain why {new_task(rng, 'en')[:30]} should call (212) 555-0{rng.randrange(100, 199)} at noon."
        return "\n".join(f"{i}. {task}" for i, task in enumerate([rng.choice(tasks), new_task(rng, "en"), call], 1))

    filters = [
        {"NearDuplicate": {"threshold": 0.9}},
        {"Contamination": {"against": str(against)}},
        {"RewardAbove": {"reward": "reward_of_letters.letters", "least": 10}},
        "PersonalData",
    ]
    plan = Plan({"en": 12}, pilot=3, requests=3, examples=4, tasks=3)
    growth = grow(tmp_path / "out", Scripted(write=write), plan, filters=filters)
    count = growth.counts["en"]
    assert list(count.instruction["filters"]) == [
        "Contamination", "RewardAbove", "PersonalData", "NearDuplicate", "Novelty",
    ]  # fmt: skip
    assert count.instruction["filters"]["Contamination"]["reasons"] == {"near duplicate of a test row": count.requests}
    assert count.row["filters"]["RewardAbove"]["reasons"]["score too low"] > 0
    assert all(row["provenance"]["filters"]["reward"] == 29 for row in growth.rows)
    assert any("[PHONE]" in row["messages"][0]["content"] for row in growth.rows)
    assert "555-0" not in json.dumps(growth.rows)
    assert grow(tmp_path / "out", Scripted(write=write), plan, filters=filters).rows == growth.rows


def test_settings_out_of_range_are_named():
    for wrong, message in (
        ({"languages": {"en": 0}}, "languages: en must be at least 1 row; got 0"),
        ({"languages": {"en": 1}, "pilot": 0}, "pilot must be at least 1; got 0"),
        ({"languages": {"en": 1}, "grown": 8}, r"grown must be below examples \(8\); got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            Plan(**wrong)


def test_unknown_languages_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are prompts for en and zh, but not for fr"):
        grow(tmp_path, Scripted(), Plan({"fr": 1}))
    with pytest.raises(ValueError, match="languages is empty"):
        grow(tmp_path, Scripted(), Plan())


def test_seeds_come_with_kind_language_and_place(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text(
        '{"instruction": "Name a river.", "output": "The Rhine.", "category": "question"}\n'
        '{"prompt": "写一首诗。", "lang": "zh"}\n'
        '{"broken"\n'
        '{"prompt": "Nenne einen Fluss in Deutschland.", "lang": "de"}\n',
        encoding="utf-8",
    )
    bad = BadRows("skip")
    (one, row), (other, _) = read_seeds(str(path), ["en", "zh"], bad)
    assert one == Task("seed-en-1", "Name a river.", "en", "question") and row["provenance"] == {"seed": "my.jsonl:1"}
    assert other == Task("seed-zh-1", "写一首诗。", "zh", "")
    assert bad.counts == {"malformed JSON": 1} and "my.jsonl:3" in bad.reasons
    with pytest.raises(ValueError, match="seeds: there is no row in the language 'fr'"):
        read_seeds(str(path), ["fr"], BadRows("skip"))


def test_bundled_seeds_are_two_hundred_a_language():
    seeds = [task for task, _ in read_seeds("bundled", ["en", "zh"], BadRows())]
    for lang in ("en", "zh"):
        assert sum(seed.lang == lang for seed in seeds) >= 200
    assert len({seed.text for seed in seeds}) == len(seeds)


def test_parts_have_their_shares_in_each_language_and_equal_texts_stay_together():
    rows = [{"lang": lang, "text": f"{lang} {i // 2}"} for lang in ("en", "zh") for i in range(100)]
    parts = dict(split(rows, 0.1, 0.2, lambda row: row["text"], seed=0))
    assert {name: len(part) for name, part in parts.items()} == {"train": 140, "val": 20, "test": 40}
    assert sum(row["lang"] == "en" for row in parts["val"]) == 10
    texts = [{row["text"] for row in part} for part in parts.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert parts == dict(split(rows, 0.1, 0.2, lambda row: row["text"], seed=0))
    assert parts != dict(split(rows, 0.1, 0.2, lambda row: row["text"], seed=1))
