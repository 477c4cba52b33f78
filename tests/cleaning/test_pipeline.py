"""The order of filters, what each counts, and who remembers what."""

import json

import pytest

from lightning_rlhf.cleaning import Filter, Tally, clean, make_example, make_filters
from lightning_rlhf.cleaning.filters import Length, NearDuplicate
from lightning_rlhf.cleaning.pipeline import CHUNK


def examples(*texts):
    return [make_example({"prompt": text}, f"list[{i}]") for i, text in enumerate(texts)]


class Without(Filter):
    """Drops what has a word."""

    def __init__(self, word):
        self.word, self.seen, self.prepared = word, [], 0

    def prepare(self, examples):
        self.prepared += len(examples)

    def __call__(self, example):
        self.seen.append(example.instruction)
        return f"has {self.word}" if self.word in example.instruction else None


class Remembering(Without):
    remembers = True

    def __init__(self, word):
        super().__init__(word)
        self.kept = []

    def add(self, example):
        self.kept.append(example.instruction)


def test_a_filter_sees_what_those_before_it_kept():
    a, b = Without("a"), Without("b")
    tally = Tally()
    kept = [example.instruction for example in clean(examples("a", "b", "ab", "c"), [a, b], tally)]
    assert kept == ["c"]
    assert a.seen == ["a", "b", "ab", "c"] and b.seen == ["b", "c"] and b.prepared == 2
    assert (tally.seen, tally.kept) == (4, 1)
    assert {name: (one.seen, one.dropped, dict(one.reasons)) for name, one in tally.filters.items()} == {
        "Without": (4, 2, {"has a": 2}),
        "Without 2": (2, 1, {"has b": 1}),
    }


def test_only_what_all_filters_kept_is_remembered():
    first, last = Remembering("x"), Without("b")
    assert [e.instruction for e in clean(examples("a", "b", "x", "c"), [first, last])] == ["a", "c"]
    assert first.kept == ["a", "c"] and last.seen == ["a", "b", "c"]


def test_a_duplicate_of_a_dropped_row_is_none():
    text = "Explain in two sentences why the sky is blue at noon"
    filters = [NearDuplicate(), Without("!")]
    kept = [e.instruction for e in clean(examples(text + "!", text, text.upper()), filters)]
    assert kept == [text]


def test_the_result_does_not_depend_on_chunks():
    words = [f"word{i % 397} other{i % 397} more{i % 397} and so on" for i in range(2 * CHUNK + 5)]
    whole = [e.where for e in clean(examples(*words), make_filters(["Length", "NearDuplicate"]))]
    filters = make_filters(["Length", "NearDuplicate"])
    one_by_one = [e.where for one in examples(*words) for e in clean([one], filters)]
    assert whole == one_by_one and len(whole) == 397


def test_the_tally_keeps_a_few_examples_and_is_json():
    tally = Tally()
    list(clean(examples(*(f"a{i} " * 30 for i in range(9))), [Length(max_instruction=5)], tally))
    made = json.loads(json.dumps(tally.to_json()))
    length = made["filters"]["Length"]
    assert length["dropped"] == 9 and len(length["examples"]) == 5 and length["seconds"] >= 0
    assert length["examples"][0] == {
        "where": "list[0]",
        "reason": "instruction too long",
        "text": ("a0 " * 30).strip(),
        "measured": {},
    }
    assert "seconds" not in tally.to_json(seconds=False)["filters"]["Length"]


def test_a_tally_goes_over_several_rounds():
    tally, filters = Tally(), make_filters(["NearDuplicate"])
    for _ in range(2):
        list(clean(examples("one two three four", "five six seven eight"), filters, tally))
    assert (tally.seen, tally.kept, tally.filters["NearDuplicate"].dropped) == (4, 2, 2)


def test_filters_by_name_and_settings():
    made = make_filters(["Script", {"Length": {"min_answer": 3}}, {"class_path": "PersonalData"}, Without("a")])
    assert [one.name for one in made] == ["Script", "Length", "PersonalData", "Without"]
    assert made[1].min_answer == 3
    (own,) = make_filters([{"lightning_rlhf.cleaning.filters.length.Length": {"max_answer": 7}}])
    assert own.max_answer == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Lengths", "no filter Lengths; did you mean Length"),
        ({"Length": {"max_anser": 3}}, "no setting max_anser; did you mean max_answer"),
        ({"Length": 3}, "Write a name"),
        ("Contamination", "missing a required argument: 'against'"),
        ({"Length": {"min_answer": 5, "max_answer": 2}}, "0 <= min <= max"),
        ("json.JSONDecoder", "no filter. Derive"),
    ],
)
def test_wrong_filters_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        make_filters([spec])
