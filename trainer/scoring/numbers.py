r"""Numbers as people write them, exactly: 1,234  -5  .5  1.5e3  2 x 10^6  3/4  2 1/2  \frac{3}{4}  3,14  50%.

A number that is only part of a larger term (12\sqrt{3}, 2x, 10/2, 3:4, the exponent of a unit) is no answer.
"""

import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from strop.trainer.scoring.answers import finals, sentences, unwrap

_SCALES = {"%": Fraction(1, 100), "percent": Fraction(1, 100), "hundred": 100, "thousand": 10**3, "k": 10**3,
           "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_BEFORE = re.compile(r"<<[^<>\n]*>>|</?[a-zA-Z][^<>\n]{0,80}>|\*\*(?![0-9])|(?<![0-9])\*\*|(?:US)?[$€£¥₹]|[`{}]|\\\\"
                     r"|(?<=\s)to (?:the nearest [0-9.]+|(?:[0-9]+|\w+) (?:decimal|significant)\b)")
_ABOUT = re.compile(r",? or (?:about|approximately|roughly|around) ")
_MINUS = re.compile(r"(?<![0-9)%] )\b(?:minus|negative)\s+(?=[0-9.])", re.I)
_DIGITS = (r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])(?:[.,][0-9]+)?|[0-9](?:[0-9]|[.,'](?=[0-9]))*"
           r"|(?<![0-9])\.[0-9]+")
_NUMBER = re.compile(
    rf"(?P<sign>[-+±]\s?)?(?P<digits>{_DIGITS})"
    r"(?:[eE](?P<e>[-+]?[0-9]{1,5})(?!\w)|\s?[*xX]\s?10\s?\^\s?\(?(?P<ten>[-+]?[0-9]{1,5})\)?"
    r"|\s?\^\s?\(?(?P<power>[-+]?[0-9]{1,5})\)?(?!\w))?"
    r"(?:\s?/\s?(?P<under>-?[0-9]+)|(?:\s?(?:and|&)?\s|-)(?P<part>[0-9]{1,9}\s?/\s?[0-9]{1,9}))?(?![0-9])"
    rf"(?:\s?(?P<scale>{'|'.join(_SCALES)}|per cent)(?![A-Za-z]))?", re.I)
_GROUPED = re.compile(r"([0-9]{1,3}(?:[, '][0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]*)(?:\.([0-9]+))?")
_CONTINENTAL = re.compile(r"([0-9]{1,3}(?:[. ][0-9]{3})+|[0-9]+)(?:,([0-9]+))?")
_OPERAND = re.compile(r"\s?[*/^]\s?[(0-9.√\\A-Za-z]|\s?[√π±]|\s?[-+]\s?[0-9(.√\\]|\s[-+]\s|:[0-9]|\s?\\[A-Za-z]|\("
                      r"|\s?[xX]\s?[0-9]|[xyzabcijnpqruvwXYZ](?![A-Za-z])")
_GLUED, _JOINED = re.compile(r"[A-Za-z\\]$|[_^]\s*$"), re.compile(r"[*/√<>≤≥]\s*$|[0-9]:$|[A-Za-z]\($")
_WORD = re.compile(r"[A-Za-z]{2,}")
_UNITS = re.compile(r"[\s.()\[\]°%:]*(?:[^\W\d]+(?![^\W\d])(?:\^[0-9]|[/ .,'()°\-]|$)*){0,6}[\s.()\[\]°]*")
_NEGATED = re.compile(r"(?:\bnot|n't|\bnever|rather than|instead of)\s+(?:be |equal to |equal )?$", re.I)
_LIST = re.compile(r"[ \t]+|\s*[,;&|/]\s*(?:(?:and|or)\s+)?|[,\s]+(?:[A-Za-z]+\s+)?(?:and|or)\s+(?:maybe\s+)?"
                   r"|\s*(?:,|and|or)\s*[a-z]\s*=\s*", re.I)
_OF = re.compile(r"\s*(?:[A-Za-z]+\s+)?(?:out of|of|per|for every)\s+(?:the |a total of |all )?", re.I)


class Number(NamedTuple):
    shown: str
    value: Fraction | None  # None: only part of a larger term
    scale: str | None  # a percent sign or "million" behind it, which is not in its value
    start: int
    end: int
    joined: bool  # the term began before it


def numbers(text: str) -> tuple[str, list[Number]]:
    """(`text` in plain characters, every number there). Negated numbers ("not 5") and exponents are left out."""
    text, found = _MINUS.sub("-", _ABOUT.sub(" ≈ ", _BEFORE.sub("", unwrap(text)))), []
    for m in _NUMBER.finditer(text):
        before = text[max(0, m.start() - 40):m.start()]
        if not ((not m["sign"] and _GLUED.search(before)) or _NEGATED.search(before)):
            sign = _sign(m["sign"] or "", before)
            joined = sign == "operator" or bool(_JOINED.search(before))
            value = None if joined or _OPERAND.match(text, m.end()) else _value(m)
            start = m.start() if sign == "-" else m.start("digits")
            scale = m["scale"] and m["scale"].lower().replace("per cent", "percent")
            value = -value if value and sign == "-" else value
            found.append(Number(text[start:m.end()].strip(), value, scale, start, m.end(), joined))
    return text, found


def _sign(sign: str, before: str) -> str:
    """What a "-" or "+" behind `before` is: "-", "operator", or "" for a plus, a dash or none."""
    near, spaced = before.rstrip()[-1:], len(sign) > 1
    if not sign or (spaced and before.endswith("\n")):
        return ""
    if sign[0] == "±" or re.match(r"[0-9)%\]}°]", near):
        return "operator"
    if near.isalpha() and not re.search(r"\b(?:is|be|equals)\s+$", before) and (spaced or before.endswith(near)):
        return "" if spaced and re.search(r"[^\W\d]{2}\s*$", before) else "operator"
    return sign[0].strip("+") if not spaced or not near or near in "=(:[<>≈" or near.isalpha() else ""


def _value(m: re.Match) -> Fraction | None:
    digits, power = m["digits"], int(m["e"] or m["ten"] or m["power"] or 0)
    parts = (not re.match(r"0,[0-9]", digits) and _GROUPED.fullmatch(digits)) or _CONTINENTAL.fullmatch(digits)
    if not parts or len(digits) > 300 or abs(power) > 300 or len(m["under"] or "") > 300:
        return None
    whole, decimals = parts.groups()
    value = Fraction(f"{re.sub('[^0-9]', '', whole) or 0}.{decimals or 0}")
    if m["power"]:
        value = value**power if value else None
    elif power:
        value *= Fraction(10) ** power
    if m["part"] and value is not None:
        part = Fraction(*map(int, m["part"].split("/"))) if int(m["part"].split("/")[1]) else 1
        return value + part if part < 1 and value.denominator == 1 else None
    if m["under"] and value is not None:
        under = int(m["under"])
        whole = not under or value.denominator > 1 or (abs(under) > 1 and value % under == 0)
        return None if whole else value / under  # 10/2 is a problem, no answer
    return value


def truth(answer: str) -> Number | None:
    """The number that `answer` is, all of it: units, a currency and "x =" may stand beside it, no other term."""
    text, found = numbers(next((final.text for final in finals(answer) if final.marked), answer))
    if len(found) != 1 or found[0].value is None:
        return None
    around = re.sub(r"^\s*[A-Za-z]\w?\s*=", "", text[:found[0].start]) + " " + text[found[0].end:]
    return found[0] if _UNITS.fullmatch(around) else None


def answered(completion: str) -> list[Number]:
    """The number that `completion` gives as its answer, with its rounded form behind a "≈"; [] if there is none."""
    for final in finals(completion):
        for text in [final.text] if final.marked else sentences(final.text):
            short = re.sub(r"(?<=[\w%}$*])\s+\([^()]*\)", "", text)  # a remark in brackets
            text = short if re.search(r"[0-9½-¾]", short) else text
            bold = re.findall(r"\*\*([^*\n]*[0-9][^*\n]*(?<![:\s]))\*\*(?!:)", text)
            text, found = numbers(bold[-1] if bold and not final.marked else text)
            if found:
                return _pick(text, found, final.marked and len(_WORD.findall(text[:found[0].start])) < 3)
    return []


def _pick(text: str, found: list[Number], first: bool) -> list[Number]:
    """The first or the last of the numbers, or the end of its chain of equations; [] if it is one of a list."""
    gaps, i, j = [text[a.end:b.start] for a, b in pairwise(found)], 0, 0 if first else len(found) - 1
    if first:
        while j < len(gaps) and (found[j + 1].joined or re.search(r"=|[-+*/]\s*$", gaps[j])):
            j += 1
    else:
        i = j
        while i and (found[i].joined or "=" in gaps[i - 1]) and not _WORD.search(gaps[i - 1]):
            i -= 1
        if i and i == j and found[i - 1].value is not None and _OF.fullmatch(gaps[i - 1]):
            i = j = i - 1  # 20 of the 30
    k = next((k for k in range(j, i - 1, -1) if found[k].value is not None), None)
    if k is None or any(0 <= gap < len(gaps) and _LIST.fullmatch(gaps[gap]) and found[other].value != found[k].value
                        for gap, other in ((k - 1, k - 1), (j, j + 1))):
        return []
    near = [n for n in (k - 1, k + 1) if 0 <= n < len(found) and "≈" in gaps[min(n, k)] and found[n].value is not None]
    return [found[n] for n in (k, *near)]


def same(said: Number, true: Number, tolerance: Fraction = Fraction(0)) -> bool:
    """True if both are one number. 50% is 0.5, and also 50 where the truth has no percent sign; so is "2 million" 2."""
    one, other = (n.value * _SCALES.get(n.scale, 1) for n in (said, true))
    bare = true if said.scale else said
    return abs(one - other) <= tolerance or (bool(said.scale) != bool(true.scale) and abs(bare.value) >= 1
                                             and abs(said.value - true.value) <= tolerance)
