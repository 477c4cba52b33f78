"""The bundled rows are well formed, unique and in two languages."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import lightning_rlhf

FOLDER = Path(lightning_rlhf.__file__).parent / "data" / "bundled"
ROWS = {
    lang: [json.loads(x) for x in (FOLDER / f"instructions.{lang}.jsonl").read_text(encoding="utf-8").splitlines()]
    for lang in ("zh", "en")
}


def test_at_least_200_rows_with_unique_first_turns():
    first = Counter(next(m["content"] for m in r["messages"] if m["role"] == "user") for r in ROWS["zh"] + ROWS["en"])
    assert len(first) >= 200
    assert [turn for turn, n in first.items() if n > 1] == []


@pytest.mark.parametrize("lang", ROWS)
def test_rows_are_well_formed(lang):
    for row in ROWS[lang]:
        assert list(row) == ["messages", "lang", "category"] and row["lang"] == lang
        roles = [m["role"] for m in row["messages"] if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(m["content"] == m["content"].strip() != "" for m in row["messages"])
        for m in row["messages"]:
            for code in re.findall(r"```python\n(.*?)```", m["content"], re.S):
                ast.parse(code)
    assert len({r["category"] for r in ROWS[lang]}) >= 8
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", json.dumps(r, ensure_ascii=False))) for r in ROWS[lang])
    assert chinese == len(ROWS["zh"]) if lang == "zh" else chinese < 10
