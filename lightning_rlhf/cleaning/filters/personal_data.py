"""Masks or drops mail addresses, telephone numbers, Chinese identity numbers and numbers of payment cards."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter
from lightning_rlhf.data.formats import FormatError
from lightning_rlhf.utils.imports import require

What = Literal["mail", "identity", "card", "phone"]
MASKS: dict[What, str] = {
    "mail": "[EMAIL]",
    "identity": "[ID NUMBER]",
    "card": "[CARD NUMBER]",
    "phone": "[PHONE]",
}
#: Full-width forms, each as the one character that it stands for, so that places stay the same.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_MAIL = re.compile(
    r"(?<![A-Za-z0-9._%+/=-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
#: Addresses that belong to nobody: reserved for examples (RFC 2606), and logins of version control.
_NOBODY = re.compile(r"^git@|[@.]example(?:\.(?:com|net|org|edu))?$|\.(?:test|invalid|localhost)$", re.IGNORECASE)
#: The first two digits are the province.
_IDENTITY = re.compile(
    r"(?<![0-9A-Za-z.])(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])\d{15}[\dXx](?![0-9A-Za-z])"
)
_CARD = re.compile(r"(?<![0-9A-Za-z.])\d(?:[ -]?\d){12,18}(?![0-9A-Za-z])")
#: Beginnings and lengths of card numbers: Visa, Mastercard, American Express, Discover, Diners, JCB, UnionPay.
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|6(?:011|5\d\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|62\d{14,17}"
)
_PHONE = re.compile(
    r"(?<![0-9A-Za-z.,/=#&%_+$€£¥^*-])(?<![0-9] )"
    r"(?:\+\d|\(\+?\d|\d)(?:[ .()/-]{0,2}\d){6,14}(?![0-9A-Za-z%=_]|[.,/:*^-]\d| ?[-+*/=×÷] ?\d)"
)
_SAYS_PHONE = re.compile(
    r"phone|tel|call|cell|mobile|fax|whatsapp|dial|contact|reach|sms|text|number is|"
    r"电话|手机|联系|拨打|致电|传真|热线|号码|微信",
    re.IGNORECASE,
)
#: Characters before a number in which a word may say that it is a telephone's.
_NEAR = 24
_MOBILE = re.compile(r"1[3-9]\d{9}")
_GROUPED = re.compile(r"\(\d{3}\) ?\d{3}[-. ]\d{4}|1?[-. ]?\d{3}([-.])\d{3}\1\d{4}")
_LANDLINE = re.compile(r"\(?0\d{2,3}\)?[- ]\d{4} ?\d{3,4}|\(0\d{2,3}\)\d{7,8}|[48]00-\d{3}-\d{4}")


@dataclass(frozen=True)
class PersonalData(Filter):
    """Masks or drops what tells who a person is: mail addresses, telephone, identity and card numbers.

    Numbers are checked: a telephone number must be valid in its country (``phonenumbers``), identity numbers and cards
    must have the right check digit (``python-stdnum``). Numbers alone that could be anything need a word such as
    "phone" before them, unless they have the form of a Chinese mobile number, or the groups of a telephone number.
    Names and street addresses are not found.

    Args:
        action: ``mask`` puts ``[EMAIL]``, ``[PHONE]``, ``[ID NUMBER]`` or ``[CARD NUMBER]`` in its place; ``drop``
            drops the row.
        what: What to look for.
        regions: Countries whose telephone numbers are found without ``+`` and country code.
    """

    action: Literal["mask", "drop"] = "mask"
    what: Sequence[What] = get_args(What)
    regions: Sequence[str] = ("CN", "US")

    def __post_init__(self) -> None:
        if self.action not in ("mask", "drop"):
            raise ValueError(f"PersonalData: action is {self.action!r}. Choose mask or drop.")
        if isinstance(self.what, str) or not set(self.what) <= set(MASKS):
            raise ValueError(f"PersonalData: what is {self.what!r}. Give a list of: {', '.join(MASKS)}.")
        if isinstance(self.regions, str) or _unknown(self.regions):
            raise ValueError(
                f"PersonalData: regions is {self.regions!r}. Give a list of country codes, such as [CN, US]."
            )

    def __call__(self, example: Example) -> str | None:
        """Masks the example's texts, or says what was found."""
        found: Counter[str] = Counter(
            kind for text in (*example.questions, *example.answers) for kind, _, _ in self.find(text)
        )
        if not found:
            return None
        example.notes["personal_data"] = ", ".join(f"{count} {kind}" for kind, count in found.items())
        if self.action == "drop":
            return f"has a {next(iter(found))}"
        try:
            example.rewrite(self.mask)
        except FormatError as error:
            return f"unfit when masked: {error.kind}"
        return None

    def mask(self, text: str) -> str:
        """A text with masks in the place of personal data.

        Example:
            >>> PersonalData(what=["mail"]).mask("Write to ann.lee@mail.cn, not to me@example.com.")
            'Write to [EMAIL], not to me@example.com.'
        """
        for kind, start, end in reversed(self.find(text)):
            text = f"{text[:start]}{MASKS[kind]}{text[end:]}"
        return text

    def find(self, text: str) -> list[tuple[What, int, int]]:
        """Finds personal data in a text: for each, its kind, and the indices of its start and end, in order."""
        plain = text if text.isascii() else text.translate(_HALF_WIDTH)
        found: list[tuple[What, int, int]] = []
        for kind in MASKS:  # identity numbers before cards before telephones: the longer have parts like the shorter
            if kind in self.what and _may_have(kind, plain):
                spans = _FINDERS[kind](plain, self.regions)
                found += [
                    (kind, start, end)
                    for start, end in spans
                    if all(end <= before or start >= after for _, before, after in found)
                ]
        return sorted(found, key=lambda entry: entry[1])


_SEVEN_DIGITS = re.compile(r"\d(?:[ .()/-]{0,2}\d){6}")


def _may_have(kind: What, text: str) -> bool:
    return "@" in text if kind == "mail" else _SEVEN_DIGITS.search(text) is not None


def _mails(text: str, regions: Sequence[str]) -> Iterator[tuple[int, int]]:
    return (found.span() for found in _MAIL.finditer(text) if not _NOBODY.search(found[0]))


def _identities(text: str, regions: Sequence[str]) -> Iterator[tuple[int, int]]:
    for found in _IDENTITY.finditer(text):
        ric = require("stdnum.cn.ric", "Finding identity numbers", "collect")
        number = found[0].upper()
        # not is_valid: it refuses numbers whose county had another code in the year of birth
        if ric.calc_check_digit(number) == number[-1] and _is_date(number[6:14]):
            yield found.span()


def _is_date(digits: str) -> bool:
    try:
        return 1900 <= datetime.datetime.strptime(digits, "%Y%m%d").year <= datetime.date.today().year
    except ValueError:
        return False


def _cards(text: str, regions: Sequence[str]) -> Iterator[tuple[int, int]]:
    for found in _CARD.finditer(text):
        digits = re.sub(r"[ -]", "", found[0])
        if _ISSUER.fullmatch(digits) and len(set(digits)) > 2:
            luhn = require("stdnum.luhn", "Finding card numbers", "collect")
            if luhn.is_valid(digits):
                yield found.span()


def _phones(text: str, regions: Sequence[str]) -> Iterator[tuple[int, int]]:
    for found in _PHONE.finditer(text):
        number = found[0] if ")" in found[0] else found[0].removeprefix("(")
        international = "+" in number[:2]
        said = _SAYS_PHONE.search(text, max(0, found.start() - _NEAR), found.start())
        digits = re.sub(r"\D", "", number)
        shaped = _GROUPED.fullmatch(number) or _LANDLINE.fullmatch(number) or _MOBILE.fullmatch(digits)
        if not (international or said or shaped) or len(set(digits)) < 3:
            continue
        if any(_valid(number, region) for region in ([None] if international else regions)):
            yield found.end() - len(number), found.end()


def _unknown(regions: Sequence[str]) -> set[str]:
    """Returns the regions whose telephone numbers are not known."""
    numbers = require("phonenumbers", "Finding telephone numbers", "collect")
    return set(regions) - set(numbers.SUPPORTED_REGIONS)


def _valid(text: str, region: str | None) -> bool:
    numbers = require("phonenumbers", "Finding telephone numbers", "collect")
    try:
        return bool(numbers.is_valid_number(numbers.parse(text, region)))
    except numbers.NumberParseException:
        return False


_FINDERS = {"mail": _mails, "identity": _identities, "card": _cards, "phone": _phones}
