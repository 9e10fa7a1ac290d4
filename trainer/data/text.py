"""The forms in which texts are compared: exact, normalized, words, and the symbols that normalizing would confuse."""

import re
import unicodedata
from collections.abc import Iterable

_EDGES = ".,;:!?…\"'()[]{}«»“”‘’、。，；：！？（）「」『』"
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
                   r"|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_TOKEN = re.compile(r"[^\W_]+")
# Unicode compatibility forms with a meaning of their own: x², H₂, ½, 𝐱, ①, ㎡
_SYMBOLIC = ("<super>", "<sub>", "<fraction>", "<font>", "<circle>", "<square>")


def canonical(text: str) -> str:
    """The form that decides whether two prompts are the same: NFC, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def normalize(text: str) -> str:
    """The form in which similar texts are compared: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of the normalized text without the punctuation around them; each kana or Chinese character is one."""
    return [word for found in _WORD.findall(normalize(text)) if (word := found.strip(_EDGES))]


def same_symbols(one: str, other: str) -> bool:
    """False if `normalize` hides a difference that may carry meaning: x² and x2, A and a, CO and Co, Maße and Masse.

    Plain words may differ in case, and all words may if one text capitalizes every word and the other does not.
    """
    one, other = unicodedata.normalize("NFC", one), unicodedata.normalize("NFC", other)
    a, b = set(_TOKEN.findall(one)), set(_TOKEN.findall(other))
    if _keys(a - b).isdisjoint(_keys(b)) and _keys(b - a).isdisjoint(_keys(a)):
        return True
    (a, capitals_a), (b, capitals_b) = _spellings(one), _spellings(other)
    lower = str.lower if capitals_a != capitals_b else str
    return all(set(map(lower, a[key])) == set(map(lower, b[key])) for key in a.keys() & b.keys())


def _keys(tokens: Iterable[str]) -> set[str]:
    return set(normalize(" ".join(tokens)).replace("\u0307", "").replace("ı", "i").split())


def _spellings(text: str) -> tuple[dict[str, set[str]], bool]:
    """(spellings of every folded token, in lower case where case is a matter of style; is every word capitalized)"""
    found: dict[str, set[str]] = {}
    first = []
    end = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if not token.isascii():
            token = "".join(c if unicodedata.decomposition(c).startswith(_SYMBOLIC) else
                            unicodedata.normalize("NFKC", c) for c in token)
        if len(token) > 1 and token[0].isalpha():
            first.append(token[0].isupper())
        starts = not end or any(c in ".!?\n" for c in text[end:match.start()])
        if not _is_symbol(token) or (starts and len(token) == 1 and re.match(r" [^\W\d_]{2}", text[match.end():])):
            token = token.lower().replace("\u0307", "")  # İ becomes i and a dot
        for key in _keys([token]):
            found.setdefault(key, set()).add(token)
        end = match.end()
    return found, len(first) > 1 and all(first)


def _is_symbol(token: str) -> bool:
    """Whether the case of `token` may carry meaning: A, CO, pH, NaCl, H2O, but not The, NASA or GitHub."""
    letters = [c for c in token if c.isalpha()]
    if len(letters) < 2 or len(letters) < len(token):
        return len(letters) < 3 or any(c.isupper() for c in token[1:])
    return len(letters) < 5 and any(c.isupper() for c in token[1:]) and (len(letters) == 2 or not token.isupper())
