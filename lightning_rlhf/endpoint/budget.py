"""What may be spent, and what a request may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_rlhf.endpoint.requests import Usage, canonical

_CLASSES = ("in", "cached", "out")


class BudgetExceeded(RuntimeError):
    """The next request could cost more than what is left. It was not sent."""


class Amount(NamedTuple):
    """Tokens and what they cost.

    Attributes:
        tokens: Tokens of prompts and replies together.
        money: Their price, in the unit of the budget's prices.
    """

    tokens: int = 0
    money: float = 0.0


@dataclass(frozen=True)
class Budget:
    """A limit on what a ledger's requests cost together, over all runs. Without limits, it only counts.

    Before a request is sent, the most that it can cost is set aside: the bytes of its body, since no tokenizer makes
    more tokens of a text, and its ``max_tokens``. The reply's own usage takes the place of that. A request whose reply
    was lost keeps it, because the server may have billed it.

    Attributes:
        money: Limit in the unit of the prices. A larger value allows more requests. None: no limit.
        tokens: Limit of tokens, of prompts and replies together. None: no limit.
        prices: Price of a million tokens: ``in`` for prompts, ``cached`` for what of a prompt the server had cached
            (as ``in`` if left out), ``out`` for replies. None: nothing costs money.

    Raises:
        ValueError: A limit is not positive, a price is missing, negative or unknown, or a limit of money has no prices.
    """

    money: float | None = None
    tokens: int | None = None
    prices: Mapping[str, float] | None = None
    _prices: tuple[float, float, float] = field(init=False, repr=False, default=(0.0, 0.0, 0.0))

    def __post_init__(self) -> None:
        for name, limit in (("money", self.money), ("tokens", self.tokens)):
            if limit is not None and not limit > 0:
                raise ValueError(f"budget: {name} must be positive; got {limit}.")
        if self.prices is None:
            if self.money is not None:
                raise ValueError(
                    "budget: a limit of money needs prices of a million tokens, such as prices: {in: 0.15, cached: "
                    "0.07, out: 0.60}."
                )
            return
        if unknown := sorted(set(self.prices) - set(_CLASSES)):
            raise ValueError(f"budget: prices has {unknown[0]!r}, which is none of {', '.join(_CLASSES)}.")
        if missing := [name for name in ("in", "out") if name not in self.prices]:
            raise ValueError(f"budget: prices has no {missing[0]!r}. Write the price of a million tokens, or 0.")
        values = tuple(float(self.prices.get(name, self.prices["in"])) for name in _CLASSES)
        if bad := [name for name, value in zip(_CLASSES, values, strict=True) if not 0 <= value < float("inf")]:
            raise ValueError(f"budget: the price {bad[0]!r} must be 0 or more; got {self.prices.get(bad[0])}.")
        object.__setattr__(self, "_prices", values)

    def cost(self, usage: Usage) -> Amount:
        """Returns what a reply cost.

        Args:
            usage: Its tokens.
        """
        new, cached, out = self._prices
        micro = (usage.prompt - usage.cached) * new + usage.cached * cached + usage.completion * out
        return Amount(usage.prompt + usage.completion, micro / 1e6)

    def most(self, body: Mapping[str, Any]) -> Amount:
        """Returns the most that a request can cost.

        Args:
            body: The body that will be sent.

        Raises:
            ValueError: The request has no limit of tokens.
        """
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is None:
            raise ValueError("A budget needs to know how long a reply can be: set max_tokens.")
        prompt, out = len(canonical(body).encode()), int(limit)
        new, cached, per_reply = self._prices
        return Amount(prompt + out, (prompt * max(new, cached) + out * per_reply) / 1e6)

    def check(self, taken: Amount, request: Amount) -> None:
        """Checks that a request fits.

        Args:
            taken: What was spent, lost and set aside so far.
            request: The most that the request can cost.

        Raises:
            BudgetExceeded: It could pass a limit.
        """
        for name, limit, has, needs in (
            ("money", self.money, taken.money, request.money),
            ("tokens", self.tokens, taken.tokens, request.tokens),
        ):
            if limit is not None and has + needs > limit:
                raise BudgetExceeded(
                    f"The budget is used up: of {limit:,.6g} {name}, {has:,.6g} were spent or may be, and the next "
                    f"request could cost {needs:,.6g}. Raise budget.{name} and run the same command again: it pays for "
                    "no answer twice."
                )
