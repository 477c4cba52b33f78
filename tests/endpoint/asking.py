"""Asks a fixed set of questions and writes the replies; to be killed at any moment and run again.

python asking.py URL LEDGER OUT NUMBER CONCURRENCY MONEY
"""

import json
import os
import sys
from pathlib import Path

from lightning_rlhf.endpoint import Budget, BudgetExceeded, ChatRequest, Endpoint, Ledger

PRICES = {"in": 0.15, "cached": 0.07, "out": 0.60}


def questions(number, part):
    return [ChatRequest([{"role": "user", "content": f"Question {part}.{i}?"}], max_tokens=400) for i in range(number)]


def main(url, file, out, number, concurrency, money):
    budget = Budget(money=float(money) or None, prices=PRICES)
    replies = []
    settings = dict(concurrency=int(concurrency), backoff=0.001, timeout=0.5, retries=8)
    with Ledger(file) as ledger, Endpoint(url, "fake", **settings) as endpoint:
        for part in range(3):  # a round begins when the one before is written
            try:
                replies += endpoint.ask(questions(int(number), part), ledger, budget)
            except BudgetExceeded:
                sys.exit(3)
    text = "".join(json.dumps([one.key, one.text, one.finish_reason, one.kind, one.notes]) + "\n" for one in replies)
    Path(f"{out}.part").write_text(text)
    os.replace(f"{out}.part", out)


if __name__ == "__main__":
    main(*sys.argv[1:])
