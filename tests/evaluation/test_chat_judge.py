"""The judge behind an endpoint is asked the right thing, is believed strictly, and its failures are counted."""

import logging
import pickle
import time
from pathlib import Path

import pytest
from runs import load_script

from lightning_rlhf.endpoint import Budget, BudgetExceeded, Ledger
from lightning_rlhf.evaluation import Answer, AnswerPair, ChatJudge, JudgeError, Question, judge_pairs, rates
from lightning_rlhf.evaluation.chat_judge import parse_verdict

fake_judge = load_script(Path(__file__).with_name("fake_judge.py"))
FakeJudge, first, longer, parts = fake_judge.FakeJudge, fake_judge.first, fake_judge.longer, fake_judge.parts


def pair(i=0, a="a long answer", b="short"):
    return AnswerPair([{"role": "user", "content": f"Question {i}?"}], Answer(a), Answer(b))


def ask(judge, n=1, **options):
    options = {"backoff": 0.001, "timeout": 5.0, **options}
    return judge_pairs(ChatJudge(judge.url, "fake", **options), [pair(i) for i in range(n)])


def test_a_bias_for_the_first_place_cancels():
    with FakeJudge(first) as judge:
        found = rates(ask(judge, 6))
    assert found.win_rate == 0.5 and found.ties == 6 and found.first_place == 1 and found.agreement == 0


def test_the_longer_answer_wins_in_both_orders():
    with FakeJudge(longer) as judge:
        judged = ask(judge, 3)
        assert rates(judged).win_rate == 1 and rates(judged).first_place == 0.5
        assert judged[0].a_first == ("first", "Length decides.") and judged[0].b_first.winner == "second"
        swapped = judge_pairs(ChatJudge(judge.url, "fake"), [pair(a="short", b="a long answer")])
    assert rates(swapped).win_rate == 0
    assert judged[0].record() == {
        "prompt": [{"role": "user", "content": "Question 0?"}],
        "a": "a long answer",
        "b": "short",
        "outcome": "a",
        "a_first": "a",
        "b_first": "a",
        "reasons": ["Length decides.", "Length decides."],
    }


def test_what_is_asked():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "{answer_a}你好"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "北京在哪里？"},
    ]
    with FakeJudge() as judge:
        ChatJudge(judge.url + "/", "some-model").compare(
            [Question(chat, Answer("{prompt} in China\n"), Answer(r"\1 {answer_b}"))]
        )
    headers, body = judge.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some-model", 0, 1024)
    assert "Authorization" not in headers and headers["Content-Type"] == "application/json"
    [message] = body["messages"]
    assert message["role"] == "user"
    assert parts(message["content"]) == [
        "System: Be brief.\n\nUser: {answer_a}你好\n\nAssistant: Hi\n\nUser: 北京在哪里？",
        "{prompt} in China\n",
        r"\1 {answer_b}",
    ]


def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "judge.txt"
    file.write_text("哪个更好？[request]\n{prompt}\n[end of request][answer A]\n{answer_a}\n[end of answer A]", "utf-8")
    with pytest.raises(ValueError, match=r"judge\.txt has no \{answer_b\}"):
        ChatJudge("http://127.0.0.1:1/v1", "fake", template=file)
    file.write_text(file.read_text("utf-8") + "[answer B]\n{answer_b}\n[end of answer B]", "utf-8")
    with FakeJudge() as judge:
        ask(judge, template=file, max_tokens=None)
    assert judge.requests[0][1]["messages"][0]["content"].startswith("哪个更好？")
    assert "max_tokens" not in judge.requests[0][1]


def test_requests_go_side_by_side_and_verdicts_stay_in_order():
    def say(prompt, a, b):
        number = int(prompt.split()[1].rstrip("?"))
        time.sleep(0.05 * (8 - number) / 8)
        return f"Verdict: {'A' if number % 2 else 'tie'}"

    with FakeJudge(say) as judge:
        judged = ask(judge, 8, concurrency=4)
    assert [j.a_first.winner for j in judged] == ["tie", "first"] * 4
    assert 2 <= judge.most <= 4


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "trouble",
    [
        (429, "slow down", {}),
        (503, "busy", {}),
        (429, "", {"Retry-After": "0"}),
        (200, '{"choices": [', {}),
        (200, "{}", {}),
        (200, "[1]", {}),
    ],
    ids=str,
)
def test_trouble_that_passes_is_waited_for(trouble):
    with FakeJudge(longer, fail=lambda n: trouble if n < 2 else None) as judge:
        judged = ask(judge, concurrency=1)
    assert rates(judged).win_rate == 1 and len(judge.requests) == 4


def test_a_server_that_says_nothing_is_asked_again():
    def fail(n):
        if n == 0:
            time.sleep(1.5)

    with FakeJudge(longer, fail) as judge:
        judged = ask(judge, concurrency=1, timeout=0.75)
        assert rates(judged).win_rate == 1 and len(judge.requests) >= 3


def test_a_question_that_stays_without_a_reply_is_counted():
    with FakeJudge(longer, fail=lambda n: (500, "oh no", {}) if n < 3 else None) as judge:
        judged = ask(judge, 3, concurrency=1, retries=2)
    assert rates(judged).no_verdict == 1 and rates(judged).wins == 2
    assert judged[0].a_first.winner is None and "HTTP 500" in judged[0].a_first.reason and "oh no" in str(judged[0])
    assert judged[0].outcome is None and judged[0].record()["a_first"] is None


def test_a_question_that_is_refused_is_counted_and_not_repeated():
    with FakeJudge(longer, fail=lambda n: (400, "too long", {}) if n == 0 else None) as judge:
        judged = ask(judge, 2, concurrency=1)
    assert rates(judged).no_verdict == 1 and len(judge.requests) == 4
    assert "too long" in judged[0].a_first.reason


def test_garbage_is_no_verdict_and_not_repeated():
    with FakeJudge(lambda prompt, a, b: "Verdict: A or B" if "1" in prompt else "Both! Verdict: A") as judge:
        judged = ask(judge, 2)
    assert rates(judged).no_verdict == 2 and rates(judged).win_rate.isnan() and len(judge.requests) == 4
    assert judged[0].a_first.reason == "unreadable: Both! Verdict: A"


def test_a_judge_that_answers_nothing_ends_it():
    down = FakeJudge(fail=lambda n: (500, "down", {}))
    with down as judge, pytest.raises(JudgeError, match=r"consecutive.*HTTP 500"):
        ask(judge, 40, concurrency=2, retries=0)
    assert len(judge.requests) < 40
    judge = ChatJudge(judge.url, "fake", retries=0)  # nobody is there any more
    with pytest.raises(JudgeError, match="refused"):
        judge_pairs(judge, [pair(i) for i in range(5)])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_it_at_once(status):
    refusal = pytest.raises(JudgeError, match=rf"HTTP {status}.*no such model.*Check")
    with FakeJudge(fail=lambda n: (status, "no such model", {})) as judge, refusal:
        ask(judge, 40, concurrency=1)
    assert len(judge.requests) < 10


def test_half_a_surrogate_pair_in_an_answer_is_replaced():
    with FakeJudge(lambda prompt, a, b: f"Verdict: {'A' if a == 'x�' else 'B'}") as judge:
        assert rates(judge_pairs(ChatJudge(judge.url, "fake"), [pair(a="x\ud800")])).win_rate == 1


def test_with_a_ledger_no_question_is_asked_again(tmp_path):
    pairs = [pair(i) for i in range(5)]
    with FakeJudge(longer, fail=lambda n: (400, "too long", {}) if n == 0 else None) as judge:
        options = dict(concurrency=1, ledger=tmp_path / "judge.db", budget=Budget(tokens=100_000))
        first = judge_pairs(ChatJudge(judge.url, "fake", **options), pairs)
        assert judge_pairs(ChatJudge(judge.url, "fake", **options), pairs) == first and len(judge.requests) == 10
        with Ledger(tmp_path / "judge.db") as ledger:
            assert judge_pairs(ChatJudge(judge.url, "fake", ledger=ledger), pairs) == first
            assert ledger.totals().answered == 9 and ledger.totals().kinds["http_400"] == 1
        with pytest.raises(BudgetExceeded):
            chat = ChatJudge(judge.url, "fake", ledger=tmp_path / "new.db", budget=Budget(tokens=1000))
            judge_pairs(chat, pairs)
    assert len(judge.requests) == 10


# ------------------------------------------------------------------------------------------------- the key


KEY = "sk-very-secret-1234"


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog, capsys):
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    with FakeJudge(fail=lambda n: (400, f"strange key {KEY}", {})) as judge:
        chat = ChatJudge(judge.url, "fake", api_key_env="MY_KEY", retries=0)
        judged = judge_pairs(chat, [pair()])
    assert judge.requests[0][0]["Authorization"] == f"Bearer {KEY}"
    with FakeJudge(fail=lambda n: (401, f"wrong key {KEY}", {})) as other:
        chat.endpoint.base_url = other.url
        with pytest.raises(JudgeError) as error:
            judge_pairs(chat, [pair()])
    everything = [
        judged,
        error.getrepr(style="long"),
        caplog.text,
        *capsys.readouterr(),
        vars(chat),
        pickle.dumps(chat),
    ]
    assert "strange key ***" in str(judged) and "wrong key ***" in str(error.value)
    assert not any(KEY in str(text) for text in everything)


@pytest.mark.parametrize("value", [None, "", "  ", "line\nbreak", "schlüssel"])
def test_a_key_that_can_not_be_is_told_without_it(value, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ValueError, match="MY_KEY has no valid API key") as error:
        ChatJudge("http://127.0.0.1:1/v1", "fake", api_key_env="MY_KEY")
    assert not (value or "").strip() or value not in str(error.value)


def test_a_redirect_is_not_followed(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    refusal = pytest.raises(JudgeError, match="HTTP 302")
    with FakeJudge() as other, FakeJudge(fail=lambda n: (302, "", {"Location": other.url})) as judge, refusal:
        ask(judge, api_key_env="MY_KEY")
    assert judge.requests and not other.requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "not a URL"),
        ({"model": ""}, "--judge-model"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"retries": -1}, "retries"),
        ({"budget": Budget(tokens=5)}, "a budget needs a ledger"),
    ],
    ids=str,
)
def test_settings_that_can_not_work_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        ChatJudge(**{"base_url": "http://127.0.0.1:1/v1", "model": "fake", **options})


# ------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("reply", "winner"),
    [
        ("Verdict: A", "first"),
        ("A is vague.\n\nVerdict: B\n", "second"),
        ("**Verdict: tie**", "tie"),
        ("Fine.\n**Verdict:** [[A]]", "first"),
        ("回答B更准确。\nVerdict：B。", "second"),
        ("verdict: Tie.", "tie"),
        ("B", "second"),
        ("[[A]]", "first"),
        ("tie", "tie"),
        ("<think>Verdict: A? Or\nVerdict: B</think>\nVerdict: B", "second"),
        ("Verdict: B\nI mean it.\nVerdict: B", "second"),
        ("", None),
        ("Verdict:", None),
        ("Verdict: C", None),
        ("Verdict: A or B", None),
        ("Verdict: Answer A", None),
        ("Verdict: A\nVerdict: B", None),
        ("Verdict: A\nBut B is good, too.", None),
        ("A is better.", None),
        ("My Verdict: A", None),
        ("<think>Verdict: A", None),
        ("AB", None),
    ],
)
def test_verdicts_are_read_strictly(reply, winner):
    assert parse_verdict(reply).winner == winner
