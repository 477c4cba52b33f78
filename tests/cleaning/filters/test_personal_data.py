"""Personal data: 1,000 planted of each kind, real rows without any, and what looks alike."""

import json
import random

import pytest

from lightning_rlhf.cleaning import make_example
from lightning_rlhf.cleaning.filters import PersonalData

pytest.importorskip("phonenumbers")
pytest.importorskip("stdnum")

COUNT = 1000
SENTENCES = {
    "en": [
        "You can reach me at {}, any day of the week.",
        "My contact is {}. Please reply soon.",
        "Rewrite this note: call Ann ({}) before noon",
        "Extract all facts.\nName: Bob Miller\nContact: {}\nCity: Leeds",
    ],
    "zh": [
        "我的联系方式是{}，请尽快回复。",
        "把这句话改得客气一点：有事打{}找我",
        "张伟（{}）明天到北京。",
        "提取信息。\n姓名：李娜\n联系方式：{}\n城市：杭州",
    ],
}
#: Characters of full width, as Chinese input methods write them.
WIDE = {code: code + 0xFEE0 for code in range(0x30, 0x3A)} | {0x40: 0xFF20}


def mail(rng):
    name = rng.choice(["li.wei", "zhang_san", "ann", "bob.o-neil", "wang2024", "j.smith+news", "x7"])
    host = rng.choice(["qq.com", "163.com", "gmail.com", "mail.tsinghua.edu.cn", "a-b.co.uk", "example-shop.io"])
    return f"{name}{rng.randrange(100)}@{host}"


def identity(rng):
    place = rng.choice(["110101", "310104", "440305", "330106", "510104", "420106"])
    born = f"{rng.randrange(1950, 2010)}{rng.randrange(1, 13):02}{rng.randrange(1, 29):02}"
    digits = f"{place}{born}{rng.randrange(1000):03}"
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999
    check = "10X98765432"[sum(int(d) * w for d, w in zip(digits, weights, strict=True)) % 11]
    return digits + (check.lower() if rng.random() < 0.3 else check)


def card(rng):
    start, length = rng.choice([("4", 16), ("51", 16), ("2221", 16), ("37", 15), ("62", 16), ("62", 19), ("6011", 16)])
    digits = start + "".join(str(rng.randrange(10)) for _ in range(length - len(start) - 1))
    doubled = [int(d) * 2 if i % 2 == 0 else int(d) for i, d in enumerate(reversed(digits))]  # Luhn
    digits += str(-sum(d - 9 if d > 9 else d for d in doubled) % 10)
    between = rng.choice(["", " ", "-"])
    return between.join(digits[i : i + 4] for i in range(0, length, 4))


def phone(rng):
    def some(count):
        return "".join(str(rng.randrange(10)) for _ in range(count))

    cn = f"{rng.choice(['138', '139', '150', '151', '159', '176', '186', '188', '199'])}{some(8)}"
    us = f"{rng.choice(['212', '415', '312', '617', '206'])}{rng.randrange(2, 10)}{rng.choice('023456789')}{some(5)}"
    return rng.choice(
        [
            cn,
            f"{cn[:3]}-{cn[3:7]}-{cn[7:]}",
            f"{cn[:3]} {cn[3:7]} {cn[7:]}",
            f"+86 {cn}",
            f"+86-{cn[:3]}-{cn[3:7]}-{cn[7:]}",
            f"010-{rng.choice('5678')}{some(7)}",
            f"(021) {rng.choice('56')}{some(3)} {some(4)}",
            f"({us[:3]}) {us[3:6]}-{us[6:]}",
            f"{us[:3]}-{us[3:6]}-{us[6:]}",
            f"{us[:3]}.{us[3:6]}.{us[6:]}",
            f"+1 {us[:3]} {us[3:6]} {us[6:]}",
            f"+44 20 7{some(3)} {some(4)}",
        ]
    )


KINDS = {"mail": mail, "identity": identity, "card": card, "phone": phone}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lang", SENTENCES)
def test_nearly_all_that_is_planted_is_found_whole(kind, lang):
    rng = random.Random(f"{kind} {lang}")
    look, missed = PersonalData(), []
    for i in range(COUNT):
        planted = KINDS[kind](rng)
        if lang == "zh" and i % 5 == 0:
            planted = planted.translate(WIDE)
        text = rng.choice(SENTENCES[lang]).format(planted)
        if [(found, text[start:end]) for found, start, end in look.find(text)] != [(kind, planted)]:
            missed.append(text)
    assert len(missed) <= 0.02 * COUNT, missed[:20]


def real_texts(folder, lang):
    """The texts of 1,000 rows with a language."""
    rows = [
        json.loads(line)
        for name in ("sft", "preference")
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ]
    rows = [make_example(row) for row in rows if row["lang"] == lang]
    return [(*row.questions, *row.answers) for row in rows]


@pytest.mark.parametrize("lang", SENTENCES)
def test_few_false_alarms_in_real_rows(assets, lang):
    look = PersonalData()
    rows = real_texts(assets / "data", lang)
    assert len(rows) > 700
    alarms = [text[max(0, start - 20) : end] for texts in rows for text in texts for _, start, end in look.find(text)]
    # one is an address indeed, that of a bank
    false = [alarm for alarm in alarms if not alarm.endswith("alerts@info6.citi.com")]
    assert len(false) <= len(rows) / 1000, false


@pytest.mark.parametrize(
    "text",
    [
        "3.14159265358979323846",
        "13800138000 + 1 = ?",
        "x = 4111111111111112",  # a wrong check digit
        "110101199003078888",  # likewise
        "From 2019-2020 to 2021-2022",
        "ISBN 978-3-16-148410-0",
        "http://example.cn/item/13912345678",
        "192.168.100.200",
        "1,234,567,890 people",
        "me@example.com, you@shop.example, git@github.com:a/b.git",
        "@property\ndef a(self): ...",
        "2024-05-17 12:30:45",
        "The sequence 1 2 3 4 5 6 7 8 9 10",
        "0000000000000000",
        "10000000",
    ],
)
def test_what_only_looks_alike(text):
    assert PersonalData().find(text) == []


def test_masks():
    example = make_example(
        {
            "instruction": "Tidy up",
            "input": "Ann, ann.lee@mail.cn, 13912345678",
            "output": "Ann: 13912345678",
            "id": "x",
        }
    )
    assert PersonalData()(example) is None
    assert example.row == {
        "instruction": "Tidy up",
        "input": "Ann, [EMAIL], [PHONE]",
        "output": "Ann: [PHONE]",
        "id": "x",
    }
    assert example.notes["personal_data"] == "1 mail, 2 phone"
    assert example.answer == "Ann: [PHONE]"


def test_dropping_and_choosing():
    row = {"prompt": "Mail a@mail.cn", "completion": "Sent."}
    assert PersonalData("drop")(make_example(row)) == "has a mail"
    assert PersonalData("drop", what=["phone"])(make_example(row)) is None


def test_answers_that_masks_make_equal_drop_the_row():
    row = {"prompt": "Her number?", "chosen": "13912345678", "rejected": "13812345679"}
    assert PersonalData()(make_example(row)) == "unfit when masked: no difference"


@pytest.mark.parametrize(
    "settings", [{"action": "hide"}, {"what": ["name"]}, {"what": "mail"}, {"regions": ["CN", "XX"]}, {"regions": "CN"}]
)
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match="PersonalData"):
        PersonalData(**settings)
