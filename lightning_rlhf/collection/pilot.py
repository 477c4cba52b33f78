"""The pilot: the first round, shown before the rest is asked for."""

from __future__ import annotations

from lightning_rlhf.collection.card import Table, left_out
from lightning_rlhf.collection.grow import Growth
from lightning_rlhf.endpoint import Budget, Ledger
from lightning_rlhf.utils.text import one_line

_WIDTH = 100


def show_pilot(growth: Growth) -> str:
    """The requests of the pilot with what came of them, and the yield of each step."""
    lines = []
    for lang, count in growth.counts.items():
        asked = [one for one in growth.asked if one["lang"] == lang]
        lines.append(f"\n{lang}: the first of {len(asked)} requests\n")
        lines += [f"    | {line}" for line in asked[0]["prompt"].splitlines()] if asked else []
        lines.append("\n    what became rows of each request, and the first of them\n")
        for number, one in enumerate(asked, 1):
            first = one_line(one["rows"][0], _WIDTH) if one["rows"] else ""
            lines.append(
                f"    {number:3d}  {one['kind'] or 'any kind':14s} {len(one['rows'])} of {one['asked']}  {first}"
            )
        lines.append(f"\n    what was left out ({lang})\n")
        table = next(block for block in left_out(count) if isinstance(block, Table))
        width = max(len(str(row[0])) for row in table.rows)
        lines += [f"    {row[0]!s:{width}s} {row[1]!s:>8s}  {row[2]}".rstrip() for row in table.rows]
    return "\n".join(lines)


def estimate(growth: Growth, ledger: Ledger, budget: Budget | None) -> str:
    """Says what the pilot cost, and estimates the cost of the rest at the same rate."""
    rows, missing = len(growth.rows), sum(growth.missing.values())
    totals = ledger.totals()
    tokens = totals.usage.prompt + totals.usage.completion
    money = totals.paid.money + totals.lost_cost.money
    prices = budget is not None and budget.prices is not None
    spent = f"{tokens:,} tokens" + (f" and {money:,.4f} of money" if prices else "")
    if not rows:
        return f"The pilot took {spent}, and brought no row."
    lines = [f"The pilot took {spent} for {rows:,} rows."]
    if missing:
        per_row = f"{tokens / rows:,.0f} tokens" + (f", {money / rows:,.6f} of money" if prices else "")
        rest = f"{missing * tokens / rows:,.0f} tokens" + (
            f" and {missing * money / rows:,.2f} of money" if prices else ""
        )
        lines.append(f"At its rate ({per_row} per row) the other {missing:,} rows will take about {rest}.")
    else:
        lines.append("It brought all rows.")
    if budget is not None and budget.money is not None and (whole := money + missing * money / rows) > budget.money:
        lines.append(
            f"That is {whole:,.2f} in all, above the budget of {budget.money:,.2f}: collecting will stop there."
        )
    return "\n".join(lines)


def too_low(growth: Growth, min_yield: float) -> list[str]:
    """Languages whose yield is below the least, with their yield."""
    return [f"{lang} {count.share:.1%}" for lang, count in growth.counts.items() if count.share < min_yield]
