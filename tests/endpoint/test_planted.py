"""What the fake endpoint says is known beforehand: a function of body and seed, in the shares that it states."""

import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from endpoint import FakeEndpoint
from planted import BROKEN, NUMBERED, SHARES, Shares, language, plant, task

ROOT = Path(__file__).parents[2]
ASKED = {
    "en": "Continue the list of tasks.\n1. Name three rivers.\n2. Write a poem about snow.\n",
    "zh": "请继续下面的任务列表。\n1. 说出三条河流的名字。\n2. 写一首关于雪的诗。\n",
}


def body(text, **more):
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_lists_have_the_shares_that_are_stated(lang):
    planted = [plant(body(ASKED[lang], seed=i)) for i in range(500)]
    kinds = sum((Counter(one.counts()) for one in planted), Counter())
    assert {one.mode for one in planted} == {"list"} and {one.lang for one in planted} == {lang}
    for kind, share in SHARES.items():
        assert kinds[kind] / 4000 == pytest.approx(share, abs=0.012), kind
    assert kinds["new"] / 4000 == pytest.approx(1 - sum(SHARES.values()), abs=0.03)
    assert {one.broken for one in planted} == {None, *BROKEN}
    for one in planted:
        foreign = [text for kind, text in one.items if language(text) != lang]
        assert foreign == [text for kind, text in one.items if kind == "foreign"]
        if one.broken is None:
            numbered = [text.strip() for _, text in one.items]
            assert [(int(n), text.strip()) for n, text in NUMBERED.findall(one.text)] == list(enumerate(numbered, 3))
        shown = ["Name three rivers.", "Write a poem about snow.", "说出三条河流的名字。", "写一首关于雪的诗。"]
        for i, (kind, text) in enumerate(one.items):
            assert kind != "duplicate" or text in shown + [earlier for _, earlier in one.items[:i]]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_tasks_share_at_most_two_of_five_phrases(lang):
    from planted import PHRASES

    places = [{phrase: i for i, phrase in enumerate(column)} for column in PHRASES[lang]]
    assert [len(column) for column in places] == [23] * 5
    # the code is linear: the distance of two words is the distance of their difference from zero
    for a in range(23):
        for b in range(23):
            for c in range(23):
                word = (a, b, c, (a + b + c) % 23, (a + 2 * b + 3 * c) % 23)
                assert word.count(0) <= 2 or word == (0,) * 5
    assert len({task(lang, a, b, c) for a in range(23) for b in range(23) for c in range(23)}) == 23**3


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_personal_data_is_a_person_s_unless_it_is_nobody_s(lang):
    from lightning_rlhf.cleaning.filters import PersonalData

    found = {"personal": set(), "nobody": set()}
    shares = Shares(items={"personal": 0.5, "nobody": 0.5}, broken=0)
    for i in range(40):
        for kind, text in plant(body(ASKED[lang], seed=i), shares=shares).items:
            found[kind] |= {what for what, _, _ in PersonalData().find(text)} or {None}
    third = {"en": "card", "zh": "identity"}[lang]
    assert found == {"personal": {"mail", "phone", third}, "nobody": {None}}


def test_it_is_a_function_of_body_and_seed():
    assert plant(body(ASKED["en"]), 1) == plant(body(ASKED["en"]), 1)
    assert plant(body(ASKED["en"]), 1) != plant(body(ASKED["en"]), 2) != plant(body(ASKED["en"], seed=1), 2)
    pure = plant(body(ASKED["en"]), 1, Shares(items={}, broken=0))
    assert pure.counts() == {"new": 8} and pure.broken is None
    answer = plant(body("你好，请问怎样煮面条？"), 1, Shares(answers={}))
    assert answer.mode == "answer" and answer.lang == "zh" and answer.counts() == {"good": 1}


def test_the_longer_answer_is_judged_better():
    from lightning_rlhf.evaluation.chat_judge import TEMPLATE, parse_verdict

    def verdict(a, b):
        filled = TEMPLATE.replace("{prompt}", "Hi").replace("{answer_a}", a).replace("{answer_b}", b)
        return parse_verdict(plant(body(filled)).text).winner

    assert [verdict("long one", "short"), verdict("x", "longer"), verdict("a", "b")] == ["first", "second", "tie"]


def test_an_unknown_fault_is_told():
    with pytest.raises(ValueError, match=r"'http_418' is none of http_400"):
        FakeEndpoint(faults={"http_418": 1})


@pytest.mark.distributed
def test_it_runs_by_hand(tmp_path):
    command = [sys.executable, "-m", "tests.support.endpoint", "--port", "0", "--bill", tmp_path / "bill.jsonl"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[4].rstrip(",")
        data = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}'
        with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", data)) as reply:
            assert b'"finish_reason": "length"' in reply.read()
        assert '"completion": 5' in (tmp_path / "bill.jsonl").read_text()
    finally:
        server.kill()
        server.wait()
