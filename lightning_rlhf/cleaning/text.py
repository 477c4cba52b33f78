"""What all filters see of a text: its tokens, its scripts and its language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from lightning_rlhf.utils.imports import require

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

_HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff"
#: Scripts without spaces between words: each character is a token.
_UNSPACED = _HAN + _KANA
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_SCRIPTS = {
    "han": re.compile(rf"[{_HAN}]"),
    "kana": re.compile(rf"[{_KANA}]"),
    "hangul": re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]"),
    "latin": re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff]"),
    "cyrillic": re.compile("[\u0400-\u052f]"),
    "arabic": re.compile("[\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff]"),
}
_EAST_ASIAN = re.compile(rf"[{_UNSPACED}\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+")
_LETTER = re.compile(r"[^\W\d_]")
_LATIN_WORD = re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")
_QUOTED = re.compile(
    "\"[^\"]*\"|“[^”]*”|«[^»]*»|「[^」]*」|『[^』]*』|《[^》]*》|`[^`]*`|(?<!\\w)'[^']*'(?!\\w)|‘[^’]*’"
)
#: Characters that decide on a language: more say nothing new.
_ENOUGH = 1000
#: Below this probability a short text in Latin letters counts as English: of its languages it is the most frequent.
_SURE = 0.3


def normalize(text: str) -> str:
    """A text in one width and case (NFKC, lower case), so that texts that look alike are equal.

    Example:
        >>> normalize("Ｐｌｅａｓｅ　WRITE：")
        'please write:'
    """
    return unicodedata.normalize("NFKC", text).lower()


def tokens(text: str) -> list[str]:
    """The words of a text in one width and case; of Chinese and Japanese, the single characters.

    Punctuation and white space are left out.

    Example:
        >>> tokens("用 Python 写一个 'Hello, World'！")
        ['用', 'python', '写', '一', '个', 'hello', 'world']
    """
    return _TOKEN.findall(normalize(text))


def scripts(text: str) -> dict[str, int]:
    """Number of letters by script: han, kana, hangul, latin, cyrillic, arabic, other. Scripts without any are left out.

    Example:
        >>> scripts("WLAN 是什么？")
        {'han': 3, 'latin': 4}
    """
    if text.isascii():
        found = {"latin": len(_SCRIPTS["latin"].findall(text))}
    else:
        found = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
        found["other"] = len(_LETTER.findall(text)) - sum(found.values())
    return {name: count for name, count in found.items() if count > 0}


def request(text: str) -> str:
    """Returns the request in a text: its first paragraph up to a colon, without quotes.

    If fewer than three tokens are left, it returns the whole text.

    Example:
        >>> request("Translate into French: 'good morning'")
        'Translate into French'
    """
    first = _QUOTED.sub(" ", text[:_ENOUGH].strip().partition("\n")[0])
    asked = re.split(r"：|:(?=\s|[^\x00-\x7f]|$)", first)[0].strip()
    return asked if len(tokens(asked)) >= 3 else text


def language_of(text: str) -> str:
    """The language that a text is mostly written in, by its beginning.

    Scripts decide on Chinese, Japanese and Korean. A foreign word within Chinese, or a few Chinese characters within
    English, don't change the language. `py3langid <https://pypi.org/project/py3langid/>`_ tells other languages apart.

    Returns:
        The code of the language (ISO 639, such as ``en`` or ``zh``), or an empty text if there are no letters.

    Raises:
        ImportError: py3langid is not installed, and the text is neither Chinese, Japanese nor Korean.
    """
    text = text[:_ENOUGH]
    found = scripts(text)
    if not found:
        return ""
    east_asian = _east_asian(text, found)
    if east_asian:
        return east_asian
    if set(found) & {"latin", "cyrillic", "arabic", "other"}:
        return _by_model(text, found)
    return "zh" if "han" in found else "ja" if "kana" in found else "ko"


def _east_asian(text: str, found: Mapping[str, int]) -> str:
    """Chinese, Japanese or Korean, if the text is in one of these."""
    han, kana, hangul = (found.get(script, 0) for script in ("han", "kana", "hangul"))
    letters = han + kana + hangul
    if not letters:
        return ""
    words = len(_LATIN_WORD.findall(text)) + sum(found.get(name, 0) for name in ("cyrillic", "arabic", "other")) // 5
    first = _LETTER.search(text)
    begins = first is not None and not _LATIN_WORD.match(first[0])
    if letters <= words and not (begins and 4 * letters > words):
        return ""
    if hangul > han + kana:
        return "ko"
    return "ja" if 5 * kana > han else "zh"


def _by_model(text: str, found: Mapping[str, int]) -> str:
    language, probability = _identifier().classify(_EAST_ASIAN.sub(" ", text))
    if language == "pcm" or (probability < _SURE and found.get("latin", 0) == max(found.values())):
        return "en"  # Nigerian Pidgin is what short English is taken for
    return str(language)


@cache
def _identifier() -> LanguageIdentifier:
    langid = require("py3langid.langid", "Telling languages apart", "collect")
    found: LanguageIdentifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    return found
