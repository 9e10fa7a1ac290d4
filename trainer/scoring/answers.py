r"""What a completion gives as its final answer: thinking off, marks found, corrections followed.

Marks, all of one rank; the last one in the text counts: `<answer>...</answer>`, `\boxed{...}`, a line `#### ...`, a
heading or label "Answer", and "the answer is ...". Boxes or tags side by side are one answer that lists several.
What follows a mark replaces it only if it takes the answer back ("wait, no, it is 7"). Without a mark, the last
statement that says anything counts; notes, checks and explanations behind it do not.
"""

import re
import unicodedata
from typing import NamedTuple

MAX_CHARS = 20_000  # the end of an answer that is looked at

_NAMES = "think(?:ing)?|thoughts?|reasoning|reflection|scratchpad|analysis|seed:think"
_THINKING = re.compile(rf"(?P<open><(?:{_NAMES})>|\[THINK\]|<\|begin_of_thought\|>|◁think▷)|</(?:{_NAMES})>"
                       r"|\[/THINK\]|<\|end_of_thought\|>|◁/think▷|<\|channel\|>final<\|message\|>", re.I)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[\w+-]*[ \t]*$", re.M)
_TAG = re.compile(r"<((?:final[_ ]?)?answer)>(.*?)(?:</\1>|\Z)", re.I | re.S)
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<brace>[{}])")
_HASHES = re.compile(r"^[ \t]*####[ \t]*([-+−$€£¥(]*[0-9.][^\n]*|[^\n]+\Z)", re.M)
_ASIDE = r"(?:,? (?:to|for|of|in|on|as) [^.:;!?\n=\\]{1,60}?|,? (?:then|therefore|thus|hence|here|now|clearly),?)?"
_VERB = r"\b(?:is|are|was|equals|comes? to|(?:must|would|should|will|has to|can only) be)\b"
_SAYS = re.compile(
    r"(?:\banswers?\b|\bans\b\.?|\bfinal (?:result|value|total|amount|count|number|price|cost|solution)\b|\b(?:correct|"
    rf"right|best) (?:option|choice|letter|one)\b|^[ \t#>*_]*result(?=[*_]*:)){_ASIDE}"
    rf"(?:[\s*_]*{_VERB}(?:[\s*_]*[:：=])*|(?:[\s*_]*[:：=])+)"
    r"|^[ \t#>*_✅]*(?:the |my )?(?:final |correct )?answer[ \t*_]*$", re.I | re.M)
_END = re.compile(r"\n|;|[.!?。](?=\s+[^\s0-9]|\s*$)|,? (?:because|since|as) |, (?:which|where)\b")
_OUTER, _BESIDE = re.compile(r"[ *_`\n\t:]*"), re.compile(r"[\s,;&$]*(?:and|or)?[\s,;&$]*")
_INITIALS = re.compile(r"(?:\b\w|\b(?:St|Dr|Mrs?|Ms|Jr|Sr|Mt|Prof|vs))$")
_BACK = re.compile(r"(?:^|[.!?;,:\n(—–…-])[\s*_]{0,9}(?:oh|but|ah|no|hmm+|oops|ok(?:ay)?)?[,.\s]{0,9}(?:wait|"
                   r"actually|hold on|hmm+|oops|sorry|correction|scratch that|no[,!:]|no\.(?=\s+\D)|my mistake|"
                   r"i meant|on second thought|i (?:made|see) (?:an?|my) (?:mistake|error)|"
                   r"let me (?:re|correct|fix)[-\w]*)", re.I)
_CONFIRMED = re.compile(r"(?:(?:\bis|\bwas|'s|\blooks?)\s(?:\w+\s)?(?:correct|right|fine|good|ok(?:ay)?|the same)|"
                        r"checks? out|confirm\w*|verified|match(?:es)?|holds|\byes)[\s.!✓✅*)]{0,9}$", re.I)
_NOTES = re.compile(r"(?:\n|(?<=[.!?])[ \t])[ \t*_#>(]*(?:note|check|verif\w+|explanation|reason(?:ing)?|remark|p\.?s\b"
                    r"|let me know|i hope|feel free|if you|this (?:works|assumes|is because))\b", re.I)
_LEAD = re.compile(r"^(?:(?:so|thus|therefore|hence|then|well|no|but|i (?:think|believe|say)|it(?: is|'s)|(?:this|that)"
                   r" is|that's|they are)[,:]?\s+(?:an?\s+)?)+", re.I)


class Final(NamedTuple):
    text: str  # the statement: up to the end of a sentence or line, or the whole inside of a tag or box
    block: str  # everything from its start on, for answers over several lines
    marked: bool


def spoken(text: str) -> str:
    """`text` without its thinking, closed or not; a closing mark alone ends thinking that the prompt began."""
    kept, start, inside = [], 0, False
    for m in _THINKING.finditer(text):
        if m["open"]:
            kept += [] if inside else [text[start:m.start()]]
        elif not inside:
            kept = []
        inside, start = bool(m["open"]), m.end()
    return "\n".join(kept if inside else [*kept, text[start:]])


def finals(text: str) -> list[Final]:
    """The final answer of `text`, then what to look at if it says nothing: earlier marks, then the end."""
    text = _FENCE.sub("", spoken(text)[-MAX_CHARS:])
    text = re.sub(r"\s{50,}", lambda m: m[0][:50], text)
    marks, last = _marks(text)[-9:], []
    if marks:
        end, final = marks[-1][1:]
        back = _BACK.search(text, end)
        if (back and not _CONFIRMED.search(text)) or re.search(r"\beither\b|\bor\b", final.text):
            rest = text[back.end() if back else end:].strip(" .,!?\n*")
            last = [Final(rest, rest, False)] if rest else []  # the answer is A or B. B.
    return [*last, *(final for *_, final in marks[::-1]), Final(text, text, False)]


def _marks(text: str) -> list[tuple[int, int, Final]]:
    """(start, end, what it says) of each mark, in order."""
    found, opened, marks = [(m.start(), m.end(), m[2].rpartition("answer>")[2]) for m in _TAG.finditer(text)], [], []
    for m in _BRACE.finditer(text):
        if m["box"] or m["brace"] == "{":
            opened.append(m)
        elif m["brace"] and opened and (start := opened.pop())["box"]:
            found.append((start.start(), m.end(), text[start.end():m.start()]))
    for start, end, inside in sorted(found):
        if marks and start < marks[-1][1]:  # of nested ones the inner one says it
            marks.pop()
        if marks and inside != marks[-1][2].text and _BESIDE.fullmatch(text[marks[-1][1]:start][:40]):
            start, inside = marks[-1][0], f"{marks.pop()[2].text}, {inside}"
        marks.append((start, end, Final(inside.strip(), inside.strip("\n"), True)))
    marks += [(m.start(), m.end(), Final(m[1].strip(), m[1], True)) for m in _HASHES.finditer(text)]
    for m in _SAYS.finditer(text):
        begin, limit = _OUTER.match(text, m.end()).end(), m.end() + 2000
        end = next((e.start() for e in _END.finditer(text, begin, limit)), min(limit, len(text)))
        if text[begin:end].strip(" *_`$"):
            marks.append((m.start(), end, Final(text[begin:end], text[begin:limit], True)))
    return sorted(marks, key=lambda mark: mark[0])


def sentences(text: str) -> list[str]:
    """The statements of `text`, the last one first, without notes and checks behind them."""
    text = next((text[:m.start()] for m in _NOTES.finditer(text) if text[:m.start()].strip()), text)
    return [s for s in reversed(re.split(r"\n+|(?<=[.!?;。])(?<!\b[A-Z]\.)\s+", text)) if s.strip(" *_#`-")]


# ---- text as people read it

_RAISED, _LOWERED, _VULGAR = re.compile("[⁰¹²³⁴-⁹⁻ⁿ]+"), re.compile("[₀-₉]+"), re.compile("[¼-¾⅐-⅞]")
_LATEX = [(re.compile(pattern), by) for pattern, by in (
    (r"\\(?:text\w*|math(?:rm|bf|it|sf|tt)|mbox|operatorname\*?|emph|underline)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|displaystyle|[Bb]igg?[lr]?)(?![a-zA-Z])|\\[()\[\]]|\\!", ""), (r"\\[,;: ]|~|\\q?quad\b", " "),
    (r"(?<=-)\\[dtc]?frac\s*([0-9])\s*([0-9])", r"\1/\2"), (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r" \1/\2"),
    (r"\\[dtc]?frac\s*\{\s*([^{}]{1,80}?)\s*\}\s*\{\s*([^{}]{1,80}?)\s*\}",
     lambda m: " " * (m.string[m.start() - 1:m.start()] != "-") + "/".join(
         p if re.fullmatch(r"-?\w+", p) else f"({p})" for p in m.groups())),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree\b", "°"), (r"\^\{([^{}]{1,40})\}", r"^\1"), (r"\\([%$&#_])", r"\1"),
    (r"\\(?:times|cdot)(?![a-zA-Z])|[×·⋅]", "*"), (r"\\(?:approx|simeq)\b", "≈"), (r"\\pm\b", "±"), (r"\\div\b|÷", "/"),
    (r"(?<=[0-9])\{,\}(?=[0-9])", ","))]


def unwrap(text: str) -> str:
    """`text` with full-width characters, superscripts and the wrappers of LaTeX as plain characters."""
    if not text.isascii():
        for pattern, before in ((_RAISED, "^"), (_LOWERED, "_"), (_VULGAR, " ")):
            text = pattern.sub(lambda m, before=before: before + unicodedata.normalize("NFKC", m[0]), text)
        text = unicodedata.normalize("NFKC", text).replace("⁄", "/")
        text = re.sub("[\u2010-\u2015\u2212]", "-", text)
    if not text.isascii() or re.search(r"\\|\^\{|\{,\}", text):
        for pattern, by in (*_LATEX, _LATEX[0]):
            text = pattern.sub(by, text)
    return text


def plain(text: str) -> str:
    """`text` as exact and choice compare it: unwrapped, case folded, white space and outer marks and quotes off."""
    text = re.sub(r"\$([^$]+)\$", r"\1", unwrap(text).replace("**", ""))
    text = " ".join(text.casefold().split())
    text = re.sub(r"\s*([-+*/=<>^,])\s*", r"\1", text)
    return text.strip(" *_`\"'“”‘’«»#").rstrip(".!,;: ").strip(" *_`\"'“”‘’«»")


def readings(completion: str, answer: str) -> list[str]:
    """What `completion` may be taken to say if the true answer has the lines of `answer`; the likeliest first."""
    final, lines = finals(completion)[0], answer.strip("\n").splitlines()
    block, gaps = final.block.strip("\n"), not all(map(str.strip, lines))
    rows = [row for row in block.splitlines() if gaps or row.strip()] or [""]
    if (n := len(lines)) > 1:
        blocks = [b for b in re.split(r"\n[ \t]*\n", block) if b.strip().count("\n") == n - 1]
        return [*blocks[:1], "\n".join(rows[:n])] if final.marked else [*blocks[-1:], "\n".join(rows[-n:])]
    pieces = [final.text, _upto(rows[0])] if final.marked else [final.text, rows[-1], *sentences(final.text)[:1]]
    found = []
    for piece in dict.fromkeys(pieces):
        for back in list(_BACK.finditer(piece))[-1:]:
            piece = piece[back.end():].lstrip(" ,.:")
        said = _LEAD.sub("", piece.strip())
        found += [piece.strip(), said, re.sub(r"\s\([^()]*\)[.\s]*$", "", said),
                  *re.findall(r"\*\*([^*]+)\*\*", said)[-1:], re.split(r",? (?:not|rather than|instead of)\s", said)[0],
                  *(re.split(rf"\s(?:is|are|was|be)\s{article}|:\s", said)[-1] for article in ("", "(?:an?|the)\\s"))]
    return [text for text in dict.fromkeys(found) if text]


def _upto(text: str) -> str:
    """`text` up to the end of its sentence, where "J. R. R. Tolkien" is none."""
    return next((text[:m.start()] for m in _END.finditer(text) if not _INITIALS.search(text[:m.start()])), text)
