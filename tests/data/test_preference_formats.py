"""Preference rows of every format, Chinese, English and emoji; and every way in which a row can be unfit."""

import itertools
import json
import math
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.data.formats import FormatError, check_conversation
from lightning_rlhf.data.preference_formats import PREFERENCE_FORMATS, Preference, to_preference
from lightning_rlhf.data.sources import BadRows, read_rows

NAMES = {"s": "system", "u": "user", "a": "assistant"}
HH_NAMES = {"user": "Human", "assistant": "Assistant"}
PAIRS = [name for name in PREFERENCE_FORMATS if name not in ("ranking", "unpaired")]
fast = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def turns(*pairs: tuple[str, str]) -> tuple[dict, ...]:
    return tuple({"role": NAMES[role], "content": content} for role, content in pairs)


def renamed(messages, role_key: str, content_key: str) -> list[dict]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{role_key: names[m["role"]], content_key: m["content"]} for m in messages]


def hh(messages) -> str:
    return "".join(f"\n\n{HH_NAMES[m['role']]}: {m['content']}" for m in messages)


CASES = {
    "en": (turns(("u", "Name a colour.")), turns(("a", "Red, the colour of roses.")), turns(("a", "no"))),
    "zh": (turns(("u", "说出一种颜色。")), turns(("a", "红色，\n玫瑰的颜色。")), turns(("a", "不说"))),
    "emoji": (turns(("u", "👩‍👩‍👧 or 🟥?")), turns(("a", "🟥👍🏽")), turns(("a", "🟥👍🏿"))),
    "long": (
        turns(("s", "请简短。"), ("u", "Hi"), ("a", "Hello 🙂"), ("u", "说出一种颜色")),
        turns(("a", "Red\n\nor Human: blue")),
        turns(("a", "蓝"), ("u", "Really?"), ("a", "红")),
    ),
}


def in_format(name: str, prompt, best, worst) -> dict:
    """A row of the format that prefers best to worst."""
    if name == "pair":
        return {"prompt": list(prompt), "chosen": list(best), "rejected": list(worst)}
    if name == "transcripts":
        return {"chosen": [*prompt, *best], "rejected": [*prompt, *worst]}
    if name == "ranking":
        return {"prompt": list(prompt), "answers": [list(worst), list(best)], "ranks": [2, 1]}
    column, keys = {
        "colossalchat": ("context", ("from", "content")),
        "sharegpt_preference": ("conversations", ("from", "value")),
    }[name]
    sides = {"chosen": renamed(best, *keys), "rejected": renamed(worst, *keys)}
    return {column: renamed(prompt, *keys), **sides, "id": 5}


# Formats


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*PAIRS, "ranking"])
def test_formats(name, case):
    prompt, best, worst = CASES[case]
    row = in_format(name, prompt, best, worst)
    before = json.dumps(row)
    preference = to_preference(row)
    assert preference == to_preference(row, name) == Preference(prompt, (best, worst), ((0, 1),))
    assert PREFERENCE_FORMATS.detect(row).name == name
    assert preference.first_user_turn == next(m["content"] for m in prompt if m["role"] == "user")
    assert json.dumps(row) == before
    # the other way round, nothing but the order may change
    assert to_preference(in_format(name, prompt, worst, best)) == Preference(prompt, (worst, best), ((0, 1),))


@pytest.mark.parametrize("case", ["en", "zh", "emoji"])
def test_a_pair_is_written_in_strings_or_messages(case):
    prompt, best, worst = CASES[case]
    expected = Preference(prompt, (best, worst), ((0, 1),))
    texts = [messages[0]["content"] for messages in (prompt, best, worst)]
    shapes = [(text, list(m), list(prompt + m)) for text, m in zip(texts, (prompt, best, worst), strict=True)]
    for p, c, r in itertools.product(shapes[0][:2], shapes[1], shapes[2]):
        assert to_preference({"prompt": p, "chosen": c, "rejected": r}) == expected


def test_transcripts_beside_a_longer_prompt():
    prompt, best, worst = CASES["long"]
    row = {"prompt": list(prompt), "chosen": [*prompt, *best], "rejected": [*prompt, *worst]}
    assert to_preference(row) == Preference(prompt, (best, worst), ((0, 1),))


def test_an_answer_may_be_one_turn_or_a_string():
    prompt, best, worst = CASES["zh"]
    expected = Preference(prompt, (best, worst), ((0, 1),))
    for column, keys in (("context", ("from", "content")), ("conversations", ("from", "value"))):
        chosen = [renamed(best, *keys), renamed(best, *keys)[0], best[0]["content"]]
        for answer in chosen:
            row = {column: renamed(prompt, *keys), "chosen": answer, "rejected": renamed(worst, *keys)[0]}
            assert to_preference(row) == expected


def test_what_answers_share_belongs_to_the_prompt():
    """Answers that agree on a turn are compared from where they part."""
    start = turns(("u", "Hi"))
    more = turns(("a", "Hello"), ("u", "Name a colour."))
    row = {"prompt": "Hi", "chosen": [*more, *turns(("a", "Red"))], "rejected": [*more, *turns(("a", "no"))]}
    assert to_preference(row) == Preference(start + more, (turns(("a", "Red")), turns(("a", "no"))), ((0, 1),))


def test_a_transcript_that_goes_on_after_the_other():
    short = turns(("u", "Hi"), ("a", "Hello"))
    long = short + turns(("u", "Bye"), ("a", "Bye"))
    preference = to_preference({"chosen": list(long), "rejected": list(short)})
    assert preference == Preference(short[:1], (long[1:], short[1:]), ((0, 1),))


# Transcripts in strings


def test_hh_transcripts():
    chosen = (
        "\n\nHuman: What does Human: mean? \n\nAssistant:  A marker.\nHuman: is one.\n\nHuman: And \n\nAssistant: Red "
    )
    rejected = chosen.removesuffix("Red ") + "\n\n不。"
    prompt = turns(("u", "What does Human: mean?"), ("a", "A marker.\nHuman: is one."), ("u", "And"))
    expected = Preference(prompt, (turns(("a", "Red")), turns(("a", "不。"))), ((0, 1),))
    assert to_preference({"chosen": chosen, "rejected": rejected}) == expected
    windows = {"chosen": "\r\n\r\nHuman: a\r\n\r\nAssistant: b", "rejected": "Human: a\r\n\r\nAssistant: c"}
    assert to_preference(windows).prompt == turns(("u", "a"))


def test_shared_characters_are_no_shared_messages():
    chosen, rejected = "\n\nHuman: 你好\n\nAssistant: Re", "\n\nHuman: 你好\n\nAssistant: Red"
    assert to_preference({"chosen": chosen, "rejected": rejected}).answers == (turns(("a", "Re")), turns(("a", "Red")))


@pytest.mark.parametrize("chosen", [" Red", "\n\nHuman: 你好\n\nAssistant: Red"])
def test_a_transcript_as_prompt(chosen):
    row = {"prompt": "\n\nHuman: 你好\n\nAssistant:", "chosen": chosen, "rejected": "no"}
    preference = to_preference(row)
    assert preference.prompt == turns(("u", "你好"))
    assert preference.answers[0][0]["content"].strip() == "Red"


def test_a_text_beside_a_prompt_may_begin_like_a_transcript():
    row = {"prompt": "Human: or ape?", "chosen": "Human: both.", "rejected": "Assistant: none"}
    assert to_preference(row).prompt == turns(("u", "Human: or ape?"))
    assert to_preference(row).answers[0] == turns(("a", "Human: both."))


TEXT = st.text(st.sampled_from("ab你好🙂👩‍👧 :\nHumanAssistant"), min_size=1, max_size=20).map(str.strip).filter(bool)
# a marker in the text itself can't be told from a real one
HH_TEXT = TEXT.filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)


def alternating(texts: list[str], first: str = "u") -> tuple[dict, ...]:
    return turns(*zip(itertools.cycle("ua" if first == "u" else "au"), texts, strict=False))


@st.composite
def dialogues(draw, text=TEXT):
    """A prompt and two answers that part at their first turn."""
    prompt = alternating(draw(st.lists(text, min_size=1, max_size=7).filter(lambda texts: len(texts) % 2)))
    odd = st.lists(text, min_size=1, max_size=3).filter(lambda texts: len(texts) % 2)
    best, worst = draw(st.tuples(odd, odd).filter(lambda both: both[0][0] != both[1][0]))
    return prompt, alternating(best, "a"), alternating(worst, "a")


@fast
@given(dialogues(HH_TEXT), st.sampled_from(["", " ", "\n"]))
def test_hh_round_trip(dialogue, padding):
    prompt, best, worst = dialogue
    padded = [tuple(m | {"content": m["content"] + padding} for m in prompt + answer) for answer in (best, worst)]
    row = {"chosen": hh(padded[0]), "rejected": hh(padded[1])}
    assert to_preference(row) == Preference(prompt, (best, worst), ((0, 1),))


@fast
@given(dialogues(), st.booleans(), st.data())
def test_every_format_finds_the_same_preference(dialogue, with_system, data):
    prompt, best, worst = dialogue
    prompt = turns(("s", "请简短。")) * with_system + prompt
    expected = Preference(prompt, (best, worst), ((0, 1),))
    for name in [*PAIRS, "ranking"]:
        assert to_preference(in_format(name, prompt, best, worst)) == expected
    # wherever the row says the prompt ends, and whether or not answers repeat it
    cut = data.draw(st.integers(1, len(prompt)))
    sides = [list(prompt + side) if data.draw(st.booleans()) else list(prompt[cut:] + side) for side in (best, worst)]
    assert to_preference({"prompt": list(prompt[:cut]), "chosen": sides[0], "rejected": sides[1]}) == expected


# Rankings


@fast
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6).filter(lambda ranks: len(set(ranks)) > 1), st.data())
def test_rankings(ranks, data):
    texts = data.draw(st.permutations([f"答 {i}" for i in range(len(ranks))]))
    column = data.draw(st.sampled_from(["answers", "responses", "completions", "ranked"]))
    better = {(a, b) for (a, i), (b, j) in itertools.permutations(zip(texts, ranks, strict=True), 2) if i < j}
    by_rank = to_preference({"prompt": "问", column: texts, data.draw(st.sampled_from(["ranks", "rank"])): ranks})
    by_score = to_preference({"prompt": "问", column: texts, "scores": [-0.5 * rank for rank in ranks]})
    for preference in (by_rank, by_score):
        found = [answer[0]["content"] for answer in preference.answers]
        assert sorted(found) == sorted(texts)
        assert {(found[i], found[j]) for i, j in preference.pairs} == better
        assert len(preference.pairs) == len(better)
        assert all(i < j for i, j in preference.pairs)
    assert by_rank.scores is None and by_rank.margins is by_score.margins is None
    assert by_score.scores == tuple(sorted((-0.5 * rank for rank in ranks), reverse=True))
    assert by_score.answers == by_rank.answers


def test_ranked_answers_come_best_first():
    preference = to_preference({"prompt": "问", "ranked": ["甲", "乙", "丙"]})
    assert [answer[0]["content"] for answer in preference.answers] == ["甲", "乙", "丙"]
    assert preference.pairs == ((0, 1), (0, 2), (1, 2))


def test_scores_beside_ranks():
    row = {"prompt": "q", "answers": ["a", "b", "c"], "ranks": [3, 1, 2], "scores": [1, 7, 7]}
    preference = to_preference(row)
    assert preference.scores == (7.0, 7.0, 1.0)
    assert [answer[0]["content"] for answer in preference.answers] == ["b", "c", "a"]
    with pytest.raises(FormatError, match=r"answer 3 of 'answers' has the score 6, and answer 1 of 'answers', .* 8"):
        to_preference(row | {"scores": [8, 9, 6], "ranks": [3, 1, 2]})


def test_tied_answers_may_be_the_same():
    row = {"prompt": "q", "answers": ["a", "a", "b"], "ranks": [1, 1, 2]}
    assert to_preference(row).pairs == ((0, 2), (1, 2))


# Further columns

PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize("name", PAIRS)
def test_margin_scores_source_and_lang(name):
    row = in_format(name, *CASES["zh"])
    more = {"margin": 0.5, "source": "oasst1", "lang": "zh"}
    for scores in ({"chosen_score": 8, "rejected_score": 2.5}, {"score_chosen": 8, "score_rejected": 2.5}):
        preference = to_preference(row | more | scores)
        assert preference.margins == (0.5,) and preference.scores == (8.0, 2.5)
        assert (preference.source, preference.lang) == ("oasst1", "zh")
    plain = to_preference(row | dict.fromkeys([*more, "language", "chosen_score", "score_rejected", "system"]))
    assert plain == to_preference(row)
    assert plain.margins is plain.scores is None and plain.source == plain.lang == ""


def test_further_columns_at_their_edges():
    assert to_preference(PAIR | {"margin": 0}).margins == (0.0,)
    assert to_preference(PAIR | {"chosen_score": 0, "rejected_score": 0}).scores == (0.0, 0.0)
    assert to_preference(PAIR | {"language": "en"}).lang == "en"
    assert to_preference(PAIR | {"lang": "zh", "language": "en"}).lang == "zh"
    ranking = {"prompt": "q", "ranked": ["a", "b"], "margin": 2}
    assert to_preference(ranking).margins == (2.0,)


@pytest.mark.parametrize("name", [*PAIRS, "ranking"])
def test_system_column_and_default(name):
    prompt, best, worst = CASES["zh"]
    row = in_format(name, prompt, best, worst)
    with_system = Preference(turns(("s", "甲")) + prompt, (best, worst), ((0, 1),))
    assert to_preference(row, system="甲") == to_preference(row | {"system": "甲"}, system="乙") == with_system
    for empty in (None, "", " "):
        assert to_preference(row | {"system": empty}).prompt == prompt
        assert to_preference(row | {"system": empty}, system="甲") == with_system
    own = in_format(name, *CASES["long"])
    assert to_preference(own, system="乙") == to_preference(own)
    with pytest.raises(FormatError, match="'system' and the system turn differ") as caught:
        to_preference(own | {"system": "乙"})
    assert caught.value.kind == "two system prompts"
    assert to_preference(row, system="甲").first_user_turn == prompt[0]["content"]


def test_recognition_order():
    row = {
        "prompt": "q",
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": "bad",
        "ranked": ["a", "b"],
        "completion": "x",
        "label": True,
    }
    expected = to_preference(PAIR)
    assert to_preference(row) == expected
    assert to_preference(row | {"context": [], "conversations": []}) == expected
    assert to_preference(row, "ranking").answers == (turns(("a", "a")), turns(("a", "b")))
    assert to_preference(row | {"chosen": None}) == to_preference(row, "ranking")
    with pytest.raises(FormatError, match="KTO"):
        to_preference(row | {"chosen": None, "ranked": None})


# Unfit rows


def ranking(answers: object, **columns: object) -> dict:
    return {"prompt": "q", "answers": answers, **columns}


S, U, P, A, B = turns(("s", "x"), ("u", "q"), ("u", "p"), ("a", "a"), ("a", "b"))
SURROGATE = json.loads('"ok\\ud83d"')
UNFIT = [
    # kind, what the message names, row
    (
        "unknown format",
        r"this row: 'frage', 'chosen'\. .*pair: 'prompt', 'chosen', 'rejected'; ",
        {"frage": 1, "chosen": 2},
    ),
    ("unknown format", "ranking: 'prompt', 'ranked' or 'answers' or 'responses' or 'completions'", {"prompt": "q"}),
    ("unknown format", "this row: none that is filled", {"chosen": None, "rejected": None}),
    ("unknown format", "this row: 'prompt', 'completion'", {"prompt": "q", "completion": "a"}),
    ("unpaired", "'label' rates a single answer.*KTO-style.*Group", {"prompt": "q", "completion": "a", "label": True}),
    ("unpaired", "KTO-style.*KTOModule and UnpairedDataModule", {"prompt": [U], "response": "a", "label": False}),
    ("unpaired", "'kto_tag' rates a single answer", {"messages": [U], "kto_tag": True}),
    ("unpaired", "'rating' rates a single.*UnpairedDataModule", {"prompt": "q", "completion": "a", "rating": 4}),
    ("unpaired", "'score' rates a single answer", {"instruction": "q", "output": "a", "score": "0.5"}),
    ("missing column", r"which of 'answers' is better\. Add a column 'ranks'.*'ranked'", ranking(["a", "b"])),
    ("missing column", "only the score 'chosen_score'", PAIR | {"chosen_score": 1, "rejected_score": None}),
    ("missing column", "only the score 'score_rejected'", PAIR | {"score_rejected": 1}),
    ("no transcript", "'chosen' does not begin with 'Human:'.*name it 'prompt'", {"chosen": "a", "rejected": "b"}),
    ("no transcript", "'rejected' does not", {"chosen": [U, A], "rejected": "Hi Human: q\n\nAssistant: b"}),
    ("no transcript", "'chosen' does not", {"chosen": "", "rejected": "b"}),
    (
        "different prompts",
        "'chosen' and the column 'rejected' differ before.*: 'q' and 'p'",
        {"chosen": [U, A], "rejected": [P, B]},
    ),
    ("different prompts", ": 'x' and 'q'", {"chosen": [S, U, A], "rejected": [U, B]}),
    ("different prompts", ": 'q' and 'p'", {"prompt": [U, A], "chosen": [U, A], "rejected": [P, B]}),
    ("no difference", "'chosen' and the column 'rejected' are the same", PAIR | {"chosen": "bad"}),
    ("no difference", "are the same", {"chosen": [U, A], "rejected": [U, A]}),
    (
        "no difference",
        "are the same",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "Human: q \n\nAssistant: a\n"},
    ),
    ("no difference", "answer 3 of 'answers' and answer 1 of 'answers'", ranking(["a", "b", "a"], ranks=[3, 2, 1])),
    ("no pair", "all answers are tied", ranking(["a", "b"], ranks=[1, 1])),
    ("no pair", "all answers are tied", ranking(["a", "b", "c"], scores=[0.5, 0.5, 0.5])),
    ("too few answers", "'answers' holds 1 of the two", ranking(["a"], ranks=[1])),
    ("too few answers", "'ranked' holds 0 of the two", {"prompt": "q", "ranked": []}),
    ("wrong length", "'ranks' has 1 numbers for 2 answers", ranking(["a", "b"], ranks=[1])),
    ("wrong length", "'scores' has 3 numbers for 2 answers", ranking(["a", "b"], ranks=[1, 2], scores=[1, 2, 3])),
    (
        "scores out of order",
        "'chosen' has the score 1, and the column 'rejected', the worse one, 2",
        PAIR | {"chosen_score": 1, "rejected_score": 2},
    ),
    ("negative margin", r"'margin' is -0\.5", PAIR | {"margin": -0.5}),
    (
        "ambiguous margin",
        "one number, and the row has 2 pairs",
        ranking(["a", "b", "c"], ranks=[1, 1, 2], margin=1),
    ),
    ("not finite", "the column 'margin' is nan", PAIR | {"margin": math.nan}),
    ("not finite", "the column 'margin' is inf", PAIR | {"margin": 10**400}),
    ("not finite", "the column 'score_rejected' is -inf", PAIR | {"score_chosen": 1, "score_rejected": -math.inf}),
    ("not finite", "number 2 of 'scores' is nan", ranking(["a", "b"], scores=[1, "nan"])),
    ("not finite", "number 1 of 'ranks' is inf", ranking(["a", "b"], ranks=[math.inf, 1])),
    ("wrong type", "the column 'margin' is a bool", PAIR | {"margin": True}),
    ("wrong type", "the column 'margin' is a list", PAIR | {"margin": [1]}),
    ("wrong type", "the column 'margin' is the text 'wide'", PAIR | {"margin": "wide"}),
    ("wrong type", "the column 'margin' is the text ''", PAIR | {"margin": ""}),
    ("wrong type", "the column 'chosen_score' is a dict", PAIR | {"chosen_score": {}, "rejected_score": 1}),
    ("wrong type", "the column 'source' is a dict", PAIR | {"source": {"a": 5}}),
    ("wrong type", "the column 'language' is a dict", PAIR | {"language": {}}),
    ("wrong type", "the column 'system' is a int", PAIR | {"system": 5}),
    ("wrong type", r"the column 'prompt' is a int\. Make it a string or a list of \{role", PAIR | {"prompt": 5}),
    ("wrong type", r"the column 'chosen' is a float\. Make it a string", PAIR | {"chosen": 0.5}),
    ("wrong type", "turn 1 of the column 'rejected' is a str", PAIR | {"rejected": ["bad"]}),
    ("wrong type", "turn 1 of the column 'chosen' lacks 'from'", PAIR | {"chosen": [{"value": "a"}]}),
    ("wrong type", "the column 'context' is a str", {"context": "q", "chosen": "a", "rejected": "b"}),
    ("wrong type", "turn 1 of 'context' lacks 'role'", {"context": [{"content": "q"}], "chosen": "a", "rejected": "b"}),
    ("wrong type", "the column 'conversations' is a str", {"conversations": "q", "chosen": "a", "rejected": "b"}),
    (
        "wrong type",
        "the column 'rejected' lacks 'from'",
        {"conversations": renamed([U], "from", "value"), "chosen": "a", "rejected": {"value": "b"}},
    ),
    ("wrong type", "the column 'chosen' is a int", {"chosen": 1, "rejected": [U, B]}),
    ("wrong type", "the column 'answers' is a str", ranking("ab", ranks=[1, 2])),
    ("wrong type", "answer 2 of 'answers' is a int", ranking(["a", 5], ranks=[1, 2])),
    ("wrong type", "answer 1 of 'answers' is a NoneType", ranking([None, "b"], ranks=[1, 2])),
    ("wrong type", "the column 'ranks' is a int", ranking(["a", "b"], ranks=1)),
    ("wrong type", "number 2 of 'rank' is a NoneType", ranking(["a", "b"], rank=[1, None])),
    ("wrong type", "number 1 of 'scores' is a bool", ranking(["a", "b"], scores=[True, False])),
    (
        "unknown role",
        "turn 1 of the column 'prompt' has the role 'tool'",
        PAIR | {"prompt": [{"role": "tool", "content": "x"}]},
    ),
    ("tool call", "turn 1 of the column 'chosen' has 'tool_calls'", PAIR | {"chosen": [B | {"tool_calls": [1]}]}),
    ("broken character", "character 3 of the column 'rejected'", PAIR | {"rejected": SURROGATE}),
    ("broken character", "character 3 of the column 'prompt'", PAIR | {"prompt": SURROGATE}),
    ("broken character", "character 3 of answer 2 of 'answers'", ranking(["a", SURROGATE], ranks=[1, 2])),
    (
        "broken character",
        "character 22 of the column 'chosen'",
        {"chosen": f"Human: q\n\nAssistant: {SURROGATE[-1]}", "rejected": "Human: q"},
    ),
    ("broken character", "character 3 of the column 'source'", PAIR | {"source": SURROGATE}),
    ("empty turn", r"with the column 'rejected', turn 2 \(assistant\) is empty", PAIR | {"rejected": " \n"}),
    ("empty turn", r"with answer 2 of 'answers', turn 2 \(assistant\) is empty", ranking(["a", ""], ranks=[1, 2])),
    ("empty turn", r"turn 1 \(user\) is empty", PAIR | {"prompt": ""}),
    (
        "empty turn",
        r"with the column 'chosen', turn 4 \(assistant\) is empty",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: p\n\nAssistant:",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: p\n\nAssistant: b",
        },
    ),
    (
        "last turn not assistant",
        r"with the column 'rejected', turn 3 \(user\) is the last",
        {"chosen": [U, A], "rejected": [U, B, U]},
    ),
    ("no assistant turn", "with the column 'chosen', no turn is the assistant's", PAIR | {"chosen": []}),
    ("no messages", "with the column 'chosen', the conversation has no turns", {"chosen": [], "rejected": [U, A]}),
    ("roles out of order", r"turn 3 \(assistant\) follows", PAIR | {"prompt": [U, A]}),
    ("roles out of order", r"turn 2 \(user\) follows", PAIR | {"chosen": [P, A]}),
    ("roles out of order", r"turn 1 \(assistant\) answers no user turn", PAIR | {"prompt": []}),
    ("roles out of order", r"turn 2 \(assistant\) answers no", PAIR | {"prompt": [S]}),
    ("roles out of order", r"turn 2 \(system\) is not the first", PAIR | {"chosen": [S, U, A]}),
    ("two system prompts", "'system' and the system turn differ", PAIR | {"prompt": [S, U], "system": "y"}),
]


@pytest.mark.parametrize(("kind", "message", "row"), UNFIT, ids=[f"{kind}-{i}" for i, (kind, *_) in enumerate(UNFIT)])
def test_unfit_rows(kind, message, row):
    with pytest.raises(FormatError, match=message) as caught:
        to_preference(row)
    assert caught.value.kind == kind
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.kind) == (str(caught.value), kind)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "pair",
            {"prompt": "q", "rejected": None},
            "'pair' needs the column 'chosen', 'rejected', and the row has 'prompt'",
        ),
        ("ranking", PAIR, "needs the column 'ranked' or 'answers' or 'responses' or 'completions', and the row has"),
        ("colossalchat", PAIR, "needs the column 'context'"),
        ("unpaired", {}, "needs the column 'label' or 'kto_tag' or 'rating' or 'score', and the row has none"),
    ],
)
def test_named_format_that_does_not_fit(name, row, message):
    with pytest.raises(FormatError, match=message) as caught:
        to_preference(row, name)
    assert caught.value.kind == "missing column"


def test_unknown_format_name_is_no_fault_of_a_row():
    with pytest.raises(ValueError, match=r"'pairs' is not known.*'auto'.*pair, colossalchat") as caught:
        to_preference(PAIR, "pairs")
    assert not isinstance(caught.value, FormatError)


# Together with the sources


def load(source) -> list[Preference]:
    return [to_preference(row.value) for row in read_rows(source, BadRows("raise"))]


def test_columns_filled_up_with_none(tmp_path):
    """Parquet and Arrow give each row the columns, and each turn the keys, of all others."""
    rows = [json.loads(json.dumps(in_format(name, *CASES["long"]))) for name in [*PAIRS, "ranking"]]
    rows[0] |= {"margin": 0.5, "score_chosen": 2.0, "score_rejected": 1.0, "lang": "zh"}
    keys = {key: None for row in rows for key in row}
    for i, row in enumerate(rows):
        for column in ("chosen", "rejected"):
            for turn in row.get(column, []):
                turn.update({key: turn.get(key) for key in ("role", "from", "content", "value")})
        rows[i] = keys | row
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    prompt, *answers = CASES["long"]
    plain = Preference(prompt, tuple(answers), ((0, 1),))
    full = Preference(prompt, tuple(answers), ((0, 1),), (0.5,), (2.0, 1.0), lang="zh")
    assert load(tmp_path / "rows.parquet") == load(datasets.Dataset.from_list(rows)) == [full] + [plain] * 4


def test_csv_rows(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("prompt,chosen,rejected,margin,system\n颜色？,红色。,不,0.5,\n", encoding="utf-8")
    expected = Preference(turns(("u", "颜色？")), (turns(("a", "红色。")), turns(("a", "不"))), ((0, 1),), (0.5,))
    assert load(path) == [expected]


def test_real_rows(assets):
    rows = [json.loads(line) for line in (assets / "data" / "preference.jsonl").open(encoding="utf-8")]
    preferences = [to_preference(row) for row in rows]
    assert len(preferences) == 1120
    for row, preference in zip(rows, preferences, strict=True):
        assert preference.prompt == tuple(row["prompt"])
        assert [answer[0]["content"] for answer in preference.answers] == [row["chosen"], row["rejected"]]
        assert (preference.lang, preference.source) == (row["lang"], row["source"])


# Any row at all

COLUMNS = ["prompt", "chosen", "rejected", "context", "conversations", "ranked", "answers", "ranks", "scores", "margin"]
COLUMNS += ["chosen_score", "rejected_score", "system", "source", "language", "label", "completion"]
WORDS = st.sampled_from([*NAMES.values(), "gpt", "a", "", " ", "你", "\ud800", "\n\nHuman: a\n\nAssistant: b", "1"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries({}, optional=dict.fromkeys(["role", "from", "content", "value"], WORDS | NESTED))
ROW = st.dictionaries(st.sampled_from(COLUMNS), WORDS | NESTED | st.lists(TURN | NESTED, max_size=4), max_size=6)


@st.composite
def nearly_fit(draw) -> dict:
    """A good row with up to two values, at any depth, replaced or removed."""
    name = draw(st.sampled_from([*PAIRS, "ranking"]))
    more = {"margin": 1, "chosen_score": 2, "rejected_score": 1, "scores": [1, 2], "source": "a", "system": None}
    row = json.loads(json.dumps(in_format(name, *draw(st.sampled_from(list(CASES.values())))) | more))
    for _ in range(draw(st.integers(0, 2))):
        spot = row
        key = draw(st.sampled_from(sorted(spot)))
        while isinstance(spot[key], (dict, list)) and spot[key] and draw(st.booleans()):
            spot = spot[key]
            key = draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
        if draw(st.booleans()):
            spot[key] = draw(WORDS | NESTED)
        elif len(spot) > 1:
            del spot[key]
    return row


@settings(fast, max_examples=500)
@given(nearly_fit() | ROW, st.just("auto") | st.sampled_from(list(PREFERENCE_FORMATS)), st.none() | st.just("甲"))
def test_any_row_is_a_fit_preference_or_a_format_error(row, name, system):
    try:
        preference = to_preference(row, name, system)
    except FormatError as error:
        assert error.kind and str(error)
        return
    assert preference.prompt[-1]["role"] == "user" and preference.first_user_turn.strip()
    assert len(preference.answers) >= 2 and preference.pairs
    for answer in preference.answers:
        assert answer[0]["role"] == answer[-1]["role"] == "assistant"
        check_conversation(preference.prompt + answer)
    assert all(preference.answers[i] != preference.answers[j] and i < j for i, j in preference.pairs)
    numbers = [*(preference.margins or ()), *(preference.scores or ())]
    assert all(isinstance(number, float) and math.isfinite(number) for number in numbers)
    assert preference.margins is None or len(preference.margins) == len(preference.pairs)
    if preference.scores is not None:
        assert len(preference.scores) == len(preference.answers)
        assert all(preference.scores[i] >= preference.scores[j] for i, j in preference.pairs)


def test_turns_of_either_spelling():
    for who, what in (("role", "content"), ("from", "value"), ("from", "content")):
        q, a, b = ({who: role, what: text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
        for row in ({"prompt": [q]}, {"context": [q]}, {"conversations": [q]}):
            made = to_preference({**row, "chosen": a, "rejected": [b]})
            assert made == to_preference({"prompt": "q", "chosen": "a", "rejected": "b"})


def test_transcripts_without_empty_lines():
    want = to_preference({"prompt": "hello", "chosen": "hi", "rejected": "go"})
    for start, gap in (("\n", "\n"), ("", "\r\n"), ("\n\n", "\n \n"), ("\n\n", "\n")):
        sides = {
            side: f"{start}Human: hello{gap}Assistant: {text}" for side, text in (("chosen", "hi"), ("rejected", "go"))
        }
        assert to_preference(sides) == want
    assert to_preference({"prompt": "\nHuman: hello\nAssistant:", "chosen": "hi", "rejected": "go"}) == want
    strict = "\n\nHuman: say\nAssistant: x\n\nAssistant: "  # a marker in a text stays text where others are set off
    made = to_preference({"chosen": f"{strict}a", "rejected": f"{strict}b"})
    assert [m["content"] for m in made.prompt] == ["say\nAssistant: x"]


def test_names_of_groups_may_be_numbers_and_lists():
    made = to_preference(PAIR | {"source": 5, "lang": ["en", "de"]})
    assert (made.source, made.lang) == ("5", "en, de")


def test_what_other_trainers_mean_in_preferences():
    user, good, bad = U, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    row = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    made = to_preference(
        row | {"tools": [{"a": 1}], "system_prompt": "s", "id": 3, "score_chosen": 2, "score_rejected": 1}
    )
    assert made.options == {"tools": [{"a": 1}]} and made.prompt[0]["content"] == "s" and made.unread == ("id",)
    whole = {"chosen": [user, good | {"weight": 0}, user, good], "rejected": [user, good, user, bad]}
    assert to_preference(whole).answers == ((good,), (bad,))  # weights of earlier turns play no part
    for faulty, message in (
        (row | {"images": ["a"]}, "has 'images'"),
        (row | {"weight": 0}, "'weight' is 0"),
        (row | {"chosen": [good | {"weight": 0}]}, "has the weight 0, but it is the answer that is compared"),
    ):
        with pytest.raises(FormatError, match=message):
            to_preference(faulty)
