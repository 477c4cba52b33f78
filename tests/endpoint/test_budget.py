"""Money is counted by class of token, and the most that a request can cost is never too low."""

import pytest

from lightning_rlhf.endpoint import Budget, BudgetExceeded, ChatRequest, Usage
from lightning_rlhf.endpoint.budget import Amount

PRICES = {"in": 0.15, "cached": 0.07, "out": 0.60}


def test_a_reply_costs_what_its_tokens_cost():
    usage = Usage(prompt=1_000_000, cached=400_000, completion=2_000_000)
    tokens, money = Budget(prices=PRICES).cost(usage)
    assert tokens == 3_000_000 and money == pytest.approx(0.6 * 0.15 + 0.4 * 0.07 + 2 * 0.60, rel=1e-12)
    assert Budget(prices={"in": 1, "out": 0}).cost(usage).money == pytest.approx(1.0)  # cached: as in
    assert Budget(tokens=5).cost(usage) == (3_000_000, 0)


@pytest.mark.parametrize("text", ["Hi", "人工智能", "\U0001f600", 'quotes "and"\nlines', "", "a" * 3000])
def test_what_is_set_aside_is_more_than_any_tokenizer_makes(text):
    body = ChatRequest([{"role": "user", "content": text}], max_tokens=7).body("m")
    tokens, money = Budget(prices=PRICES).most(body)
    # a byte a token is the worst, and a chat template adds a few to each message
    assert len(text.encode()) + 7 + 20 < tokens < len(text.encode()) + 7 + 150
    assert money == pytest.approx(((tokens - 7) * 0.15 + 7 * 0.6) / 1e6)


def test_a_dear_cache_is_reckoned_with():
    body = ChatRequest([{"role": "user", "content": "Hi"}], max_tokens=1).body("m")
    assert Budget(prices={"in": 1, "cached": 9, "out": 1}).most(body).money > 9 * 40 / 1e6


def test_either_name_of_the_limit_counts_and_none_is_refused():
    request = ChatRequest([{"role": "user", "content": "Hi"}], extra={"max_completion_tokens": 5000})
    assert 5000 < Budget().most(request.body("m")).tokens < 5200
    with pytest.raises(ValueError, match="max_tokens"):
        Budget().most(ChatRequest([{"role": "user", "content": "Hi"}]).body("m"))


def test_the_limit_can_be_reached_but_not_passed():
    budget = Budget(money=1.0, tokens=100, prices=PRICES)
    budget.check(Amount(60, 0.5), Amount(40, 0.5))
    with pytest.raises(BudgetExceeded, match=r"of 100 tokens, 61 .* could cost 40\. Raise budget\.tokens"):
        budget.check(Amount(61, 0.5), Amount(40, 0.1))
    with pytest.raises(BudgetExceeded, match=r"of 1 money, 0\.6 .* could cost 0\.5\. Raise budget\.money"):
        budget.check(Amount(0, 0.6), Amount(0, 0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"money": 1.0}, "needs prices"),
        ({"money": 0.0, "prices": PRICES}, "money must be positive"),
        ({"tokens": -1}, "tokens must be positive"),
        ({"prices": {"in": 1}}, "no 'out'"),
        ({"prices": {"in": 1, "out": 1, "input": 1}}, "'input'"),
        ({"prices": {"in": 1, "out": -1}}, "'out' must be 0 or more"),
        ({"prices": {"in": float("nan"), "out": 1}}, "'in' must be 0 or more"),
    ],
    ids=str,
)
def test_a_budget_that_can_not_be_is_told(settings, message):
    with pytest.raises(ValueError, match=message):
        Budget(**settings)
