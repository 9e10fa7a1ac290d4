r"""Numbers as people write them, exactly: 1,234  -5  .5  1.5e3  2 x 10^6  3/4  2 1/2  \frac{3}{4}  3,14  50%  2 million.

A number that is only part of a larger term (12\sqrt{3}, 2x, 10/2, 3:4, the exponent of a unit) is no answer.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from strop.trainer.scoring.answers import Final, finals, sentences, unwrap

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
_GROUPED = re.compile(r"([0-9]{1,3}(?:[, '][0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]+)(?:\.([0-9]+))?|\.([0-9]+)")
_CONTINENTAL = re.compile(r"([0-9]{1,3}(?:[. ][0-9]{3})+|[0-9]+)(?:,([0-9]+))?")
_OPERAND = re.compile(r"\s?[*/^]\s?[(0-9.√\\A-Za-z]|\s?[√π±]|\s?[-+]\s?[0-9(.√\\]|\s[-+]\s|:[0-9]|\s?\\[A-Za-z]|\(|\s?[xX]\s?[0-9]"
                      r"|[xyzabcijnpqruvwXYZ](?![A-Za-z])")
_NEGATED = re.compile(r"(?:\bnot|n't|\bnever|rather than|instead of)\s+(?:be |equal to |equal )?$", re.I)
_LIST = re.compile(r"[ \t]+|\s*[,;&|/]\s*(?:(?:and|or)\s+)?|[,\s]+(?:[A-Za-z]+\s+)?(?:and|or)\s+(?:maybe\s+|perhaps\s+)?"
                   r"|\s*(?:,|and|or)\s*[a-z]\s*=\s*", re.I)
_OF = re.compile(r"\s*(?:[A-Za-z]+\s+)?(?:out of|of|per|for every)\s+(?:the |a total of |all )?", re.I)


class Number(NamedTuple):
    shown: str
    value: Fraction | None  # None: only part of a larger term
    scaled: Fraction | None  # with its percent sign or its "million" reckoned in
    start: int
    end: int
    joined: bool  # the term began before it


def numbers(text: str) -> tuple[str, list[Number]]:
    """(`text` in plain characters, every number there). Negated numbers ("not 5") and exponents are left out."""
    text = _MINUS.sub("-", _ABOUT.sub(" ≈ ", _BEFORE.sub("", unwrap(text))))
    found = []
    for m in _NUMBER.finditer(text):
        start, before = m.start("digits"), text[max(0, m.start() - 40):m.start()]
        near = before.rstrip()[-1:]
        glued = before[-1:] if not m["sign"] else ""
        if (glued.isascii() and glued.isalpha()) or glued in ("_", "^", "\\") or near in ("^", "_") or _NEGATED.search(before):
            continue
        sign = _sign(m["sign"] or "", before)
        joined = sign == "operator" or near in tuple("*/√<>≤≥") or bool(re.search(r"[0-9]:$|[A-Za-z]\($", before))
        value, scaled = None, None
        if not joined and not _OPERAND.match(text, m.end()):
            value = _value(m)
        if value is not None:
            start = m.start() if sign == "-" else start
            value = -value if sign == "-" else value
            scaled = value * _SCALES[m["scale"].lower().replace("per cent", "percent")] if m["scale"] else None
        found.append(Number(text[start:m.end()].strip(), value, scaled, start, m.end(), joined))
    return text, found


def _sign(sign: str, before: str) -> str:
    """What a "-" or "+" behind `before` is: "-", "operator", or "" for a plus, a dash or none."""
    near, spaced = before.rstrip()[-1:], sign[1:] != ""
    if not sign or (spaced and before[-1:] == "\n"):
        return ""
    if sign[0] == "±" or near in tuple("0123456789)%]}°"):
        return "operator" if near or sign[0] == "±" else sign[0].strip("+")
    if near.isalpha() and not re.search(r"\b(?:is|be|equals)\s+$", before) and (spaced or before[-1:] == near):
        return "" if spaced and re.search(r"[^\W\d]{2}\s*$", before) else "operator"
    return sign[0].strip("+") if not spaced or near in tuple("=(:[<>≈") or near.isalpha() else ""


def _value(m: re.Match) -> Fraction | None:
    digits, power = m["digits"], int(m["e"] or m["ten"] or m["power"] or 0)
    whole = _GROUPED.fullmatch(digits) if not re.fullmatch(r"0,[0-9]+", digits) else None
    if len(digits) > 300 or abs(power) > 999:
        return None
    if whole:
        value = Fraction(f"{re.sub('[^0-9]', '', whole[1] or '0')}.{whole[2] or whole[3] or 0}")
    elif whole := _CONTINENTAL.fullmatch(digits):
        value = Fraction(f"{re.sub('[^0-9]', '', whole[1])}.{whole[2] or 0}")
    else:
        return None
    if m["power"]:
        if (abs(power) > 300 and value > 10) or (not value and power < 0):
            return None
        value **= power
    else:
        value *= Fraction(10) ** power
    if m["part"]:
        over, under = map(int, m["part"].split("/"))
        return value + Fraction(over, under) if over < under and value.denominator == 1 else None
    if m["under"]:
        under = int(m["under"]) if len(m["under"]) < 300 else 0
        if not under or value.denominator > 1 or (abs(under) > 1 and value % under == 0):
            return None  # 10/2 is a problem, no answer
        value /= under
    return value


def truth(answer: str) -> Number | None:
    """The number that `answer` is, all of it: units, a currency and "x =" may stand beside it, no other term."""
    marked = [final.text for final in finals(answer) if final.marked]
    text, found = numbers(marked[0] if marked else answer)
    if len(found) != 1 or found[0].value is None:
        return None
    number = found[0]
    around = re.sub(r"^\s*[A-Za-z]\w?\s*=", "", text[:number.start]) + " " + text[number.end:]
    plain = re.fullmatch(r"[\s.()\[\]°%:]*(?:[^\W\d]+(?:[/^²³ .,'()\-]*(?<=\^)[0-9]|[/ .,'()°\-]|$)*){0,6}[\s.()\[\]°]*", around)
    return number if plain else None


def answered(completion: str) -> list[Number]:
    """The number that `completion` gives as its answer, with its rounded form behind a "≈"; [] if there is none."""
    for final in finals(completion):
        for text in [final.text] if final.marked else sentences(final.text):
            text = _alone(text, final)
            text, found = numbers(text)
            if found:
                first = final.marked and len(re.findall(r"[A-Za-z]{2,}", text[:found[0].start])) < 3
                return _pick(text, found, first)
    return []


def _alone(text: str, final: Final) -> str:
    """A statement without remarks in brackets; what it has in bold, if that is a number."""
    short = re.sub(r"(?<=[\w%}$*])\s+\([^()]*\)", "", text)
    text = short if re.search(r"[0-9½-¾]", short) else text
    if not final.marked:
        bold = [b for b in re.findall(r"\*\*([^*\n]+)\*\*(?!:)", text) if not b.rstrip().endswith(":")]
        bold = [b for b in bold if numbers(b)[1]]
        return bold[-1] if bold else text
    return text


def _pick(text: str, found: list[Number], first: bool) -> list[Number]:
    def gap(i):  # between a number and the next
        return text[found[i].end:found[i + 1].start]

    i = j = 0 if first else len(found) - 1
    while first and j + 1 < len(found) and (found[j + 1].joined or re.search(r"=|[-+*/]\s*$", gap(j))):
        j += 1
    if not first:
        while i and (found[i].joined or "=" in gap(i - 1)) and not re.search(r"[A-Za-z]{2}", gap(i - 1)):
            i -= 1
        if i and i == j and found[i - 1].value is not None and _OF.fullmatch(gap(i - 1)):
            i = j = i - 1  # 20 of the 30
    good = [k for k in range(i, j + 1) if found[k].value is not None]
    if not good:
        return []
    k = good[-1]
    if any(part.value != found[k].value and _LIST.fullmatch(between) for part, between in
           [*((found[k - 1], gap(k - 1)) for _ in range(k > 0)), *((found[j + 1], gap(j)) for _ in range(j + 1 < len(found)))]):
        return []
    near = [found[n] for n in (k - 1, k + 1) if 0 <= n < len(found) and "≈" in gap(min(n, k)) and found[n].value is not None]
    return [found[k], *near]


def same(said: Number, true: Number, tolerance: Fraction = Fraction(0)) -> bool:
    """True if both are one number. 50% is 0.5, and also 50 where the truth has no percent sign; so is "2 million" 2."""
    pairs = [(said.value, true.value)]
    if (said.scaled is None) != (true.scaled is None):
        scaled, bare = (said, true) if said.scaled is not None else (true, said)
        pairs = [(scaled.scaled, bare.value)]
        if abs(bare.value) >= 1:
            pairs.append((scaled.value, bare.value))
    elif said.scaled is not None:
        pairs = [(said.scaled, true.scaled)]
    return any(abs(a - b) <= tolerance for a, b in pairs)
