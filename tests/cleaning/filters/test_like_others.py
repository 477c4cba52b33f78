"""The filters that compare rows with others: duplicates, novelty, test sets."""

import json
import random

import pytest

from lightning_rlhf.cleaning import clean, make_example
from lightning_rlhf.cleaning.filters import Contamination, NearDuplicate, Novelty, make_filters
from lightning_rlhf.cleaning.text import tokens

pytest.importorskip("rensa")
pytest.importorskip("rapidfuzz")


def prompts(*texts):
    return [make_example({"prompt": text}) for text in texts]


def kept(filter, *texts):
    return [example.instruction for example in clean(prompts(*texts), [filter])]


LONG = "Explain to a child of ten in a few short sentences why the sky is blue at noon and red at sunset"
LONG_ZH = "请用几句简短的话向一个十岁的孩子解释为什么中午的天空是蓝色的而日落时是红色的"


@pytest.mark.parametrize(
    ("text", "other"),
    [
        (LONG, LONG.upper() + "!!"),
        (LONG, "Please explain" + LONG.removeprefix("Explain")),
        (LONG, LONG.replace("short ", "")),
        (LONG_ZH, LONG_ZH.replace("请", "请你")),
        (LONG_ZH, " ".join(LONG_ZH)),
        ("你好，世界！", "你好,世界!"),
    ],
)
def test_near_duplicates_go(text, other):
    assert kept(NearDuplicate(), text, other) == [text]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Write a poem about cats", "Write a poem about dogs"),
        ("写一首关于春天的诗", "写一首关于秋天的诗"),
        ("What is 12 + 35?", "What is 12 + 36?"),
    ],
)
def test_different_tasks_stay(text, other):
    assert kept(NearDuplicate(), text, other) == [text, other]


def test_duplicates_name_the_row_that_was_kept():
    rows = prompts("a b c d", LONG, LONG + ".")
    list(clean(rows, [NearDuplicate()]))
    assert rows[2].notes["near_duplicate"] == "1.00 of row 2 that was kept"


@pytest.mark.parametrize("order", [["NearDuplicate", "PersonalData"], ["Novelty", "PersonalData", "NearDuplicate"]])
def test_texts_are_compared_as_the_filters_before_left_them(order):
    texts = [
        f"Write a short reminder about the rent and send it to {name}" for name in ("ann.lee@mail.cn", "b.o@mail.cn")
    ]
    rows = prompts(texts[0], texts[0], texts[1])
    made = make_filters([{"Novelty": {"most": 1}} if name == "Novelty" else name for name in order])
    look = next(filter for filter in made if isinstance(filter, NearDuplicate))
    kept = [example.instruction for example in clean(rows, made)]
    assert kept == [text.partition("to ")[0] + "to [EMAIL]" for text in texts[: 2 - (look is made[-1])]]


def test_all_user_turns_count_and_answers_do_not():
    def row(second, answer):
        turns = [("user", LONG), ("assistant", answer), ("user", second), ("assistant", "So.")]
        return make_example({"messages": [{"role": role, "content": text} for role, text in turns]})

    rows = [row("And why are clouds white then?", "x"), row("And what is a rainbow made of, and where?", "x")]
    rows += [row("And why are clouds white, then", "quite another answer")]
    assert list(clean(rows, [NearDuplicate()])) == rows[:2]


def rouge_l(one, other):
    """By the definition: the F measure of the longest common subsequence, by dynamic programming."""
    if not one or not other:
        return 0.0
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for j, another in enumerate(other):
            row.append(before[j] + 1 if word == another else max(before[j + 1], row[j]))
        before = row
    precision, recall = before[-1] / len(one), before[-1] / len(other)
    return 2 * precision * recall / (precision + recall) if before[-1] else 0.0


def published(folder):
    for name in ("self_instruct_seed_tasks", "belle_zh_seed_tasks"):
        for line in (folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
            yield json.loads(line)["instruction"]


def made(count):
    rng = random.Random(0)
    words = ["写", "诗", "一", "首", "关", "于", "write", "a", "poem", "about", "the", "sea", "python", "7"]
    return [" ".join(rng.choices(words, k=rng.randrange(15))) for _ in range(count)]


@pytest.mark.parametrize("source", ["made", "published"])
def test_novelty_is_rouge_l_for_every_row(source, request):
    texts = made(200) if source == "made" else list(published(request.getfixturevalue("assets")))
    look, accepted = Novelty(), []
    for text in texts:
        words = tokens(text)
        best = max((rouge_l(words, other) for other in accepted), default=0.0)
        value, closest = look.closest(words)
        assert value == pytest.approx(best, abs=1e-12)
        assert not value or rouge_l(words, tokens(closest)) == pytest.approx(best, abs=1e-12)
        example = make_example({"prompt": text or "?"})
        assert (look(example) is None) == (best <= 0.7)
        assert example.notes["novelty"] == round(best, 4)
        if best <= 0.7:
            look.add(example)
            accepted.append(words)
    assert 50 < len(accepted) <= len(texts)


def test_novelty_begins_with_the_seeds_and_drops_tasks_of_one_template():
    look = Novelty(seeds=["Write a short poem about the cats of Rome"])
    texts = ["Write a short poem about the dogs of Rome", "Why is the sky blue?", "Why is the sea blue?"]
    assert kept(look, *texts) == ["Why is the sky blue?"]
    assert kept(Novelty(most=1.0), *texts, texts[0]) == [*texts, texts[0]]


def test_equal_chinese_sentences_are_alike_and_different_ones_with_a_common_word_are_not():
    """ROUGE-L of ASCII words alone gives 0 to the first and 1 to the second."""
    look = Novelty(seeds=["用 Python 写一个排序函数"])
    assert look.closest(tokens("用Python写一个排序函数"))[0] == 1
    assert look.closest(tokens("Python 是谁发明的"))[0] < 0.3


def test_more_words_than_the_basic_plane_has_characters():
    look = Novelty(seeds=[f"w{i} w{i + 1}" for i in range(0, 70_000, 2)])
    assert look.closest(["w60000", "w60001"]) == (1.0, "w60000 w60001")
    assert look.closest(["w69998", "x"]) == (0.5, "w69998 w69999")


TEST = [
    {"question": "A farmer has 17 sheep and all but 9 run away, then he buys 4 more sheep; how many has he now?"},
    {"question": "一个农夫有十七只羊，除了九只以外全都跑了，后来他又买了四只羊，请问他现在一共有多少只羊？"},
]


def test_contamination():
    look = Contamination(TEST)
    assert look.tested == 2
    near = make_example({"prompt": TEST[0]["question"].replace("now?", "today?")})
    assert look(near) == "near duplicate of a test row" and "list[0]" in near.notes["contamination"]
    within = make_example(
        {"instruction": "Check the answer", "output": f"Puzzle: {TEST[0]['question']} It is 13. " * 1}
    )
    assert look(within) == "shares a run of words with a test row"
    chinese = make_example({"instruction": "出一道题", "output": f"好的，题目如下：{TEST[1]['question']}答案是十三。"})
    assert look(chinese) == "shares a run of words with a test row"
    other = make_example({"prompt": "A farmer has 17 sheep and all but 9 run away. Why?"})
    assert look(other) is None


def test_templates_of_a_test_set_are_no_contamination():
    template = "Read the passage below with care and then answer the question with one single letter: "
    look = Contamination([{"prompt": f"{template} number {i}, said {'x' * i}"} for i in range(30)])
    assert look(make_example({"prompt": f"{template} what do bees eat in the winter?"})) is None


def test_an_empty_test_set_is_refused():
    with pytest.raises(ValueError, match="no row"):
        Contamination([])
