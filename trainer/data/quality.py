"""Repetitive and truncated text."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from strop.trainer.config import Filter, Part

_FENCE = re.compile(r"(?:\s|>|[-*+] |\d+[.)] )*(`*)(.*)")
_CODE = re.compile(r"(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)", re.DOTALL)
_TAG = re.compile(r"(?:^|(?<=[\n.!?:>])) *<(think|thinking|thought|reasoning|reflection|answer|solution|tool_call)>")
_BEGIN, _END = (re.compile(rf"\\{name}\{{([^{{}}]*)\}}") for name in ("begin", "end"))
_DISPLAY = re.compile(r"^[ \t]*\\\[(?:\s|$)", re.MULTILINE)
_JSON = re.compile(r"[\[{]\s*[\"{]")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_OPEN = re.compile(r":[\w+-]+:$|::$|(?:^|\s)\W*D:$")  # :smile:, std::, D:
_CLOSED = re.compile(r"[:;=][-'’^~]*[(\[{]$|\S\[$")  # :( and the interval [0, 1[
_OPERATOR = re.compile(r"(?:\d|[)\]}]|\b[A-Za-z])\s[=+×÷]$")  # not "the sign is +"
# English words that hardly end a text, unless the text speaks of them; "turn it on" may end one
_OPEN_WORDS = {"the", "an", "and", "or", "but", "because", "although", "whose", "your", "their", "our"}
_NAMING = {"is", "are", "was", "and", "or", "word", "article", "conjunction", "operator", "with", "by"}
_ENGLISH = {"the", "is", "of", "to", "in", "are", "was", "it"}


def repetition(items: Sequence, n: int = 4, least: int = 32) -> float:
    """The share of n-grams that repeat an earlier one (seq-rep-n, Welleck et al. 2020, arXiv 1908.04319); 0 if there
    are fewer than `least` n-grams, since short texts repeat themselves for good reasons."""
    grams = [tuple(items[i:i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= least else 0.0


def unfit_tokens(tokens: Sequence[int], filters: Filter | Part) -> tuple[str, str]:
    """(reason, detail) why not to learn from a completion, or two empty strings."""
    if len(tokens) < filters.min_tokens:
        return "too_short", f"{len(tokens)} tokens"
    if filters.max_tokens is not None and len(tokens) > filters.max_tokens:
        return "too_long", f"{len(tokens)} tokens"
    share = repetition(tokens)
    return ("repetitive", f"{share:.2f} of 4-grams repeat earlier ones") if share > filters.max_repetition else ("", "")


def truncation(text: str) -> str:
    """Why `text` is truncated, or an empty string.

    Evidence: something that must be closed and is not (a code block, a tag of reasoning, LaTeX, JSON), or an end that
    something must follow (a comma, a colon, an opening bracket, an operator, an English article or conjunction). A
    missing full stop is no evidence: answers, lists, code, signatures and other scripts do without. So a text that is
    cut between two other words is not detected.
    """
    text = text.strip()
    if not text:
        return ""
    if _open_fence(text):
        return "a code block is not closed"
    prose = _CODE.sub("`code`", text)
    return _open_environment(prose) or _open_end(prose)


def _open_fence(text: str) -> bool:
    """Whether the text ends in a fenced code block (CommonMark 4.5), which may stand in a list or a quote."""
    fence = ""
    for line in text.splitlines():
        ticks, rest = _FENCE.match(line).groups()
        if fence:
            if len(ticks) >= len(fence) and not rest.strip():
                fence = ""
        elif len(ticks) >= 3 and "`" not in rest:
            fence = ticks
    return bool(fence)


def _open_environment(prose: str) -> str:
    for tag in dict.fromkeys(m[1] for m in _TAG.finditer(prose)):
        opened = max(m.end() for m in _TAG.finditer(prose) if m[1] == tag)
        if f"</{tag}>" not in prose[opened:]:
            return f"<{tag}> is not closed"
    if prose.rfind("[THINK]") > prose.rfind("[/THINK]"):  # of Mistral's models
        return "[THINK] is not closed"
    begun = Counter(_BEGIN.findall(prose))
    begun.subtract(_END.findall(prose))
    if left := [name for name, n in begun.items() if n > 0]:
        return f"\\begin{{{left[0]}}} is not closed"
    if (display := list(_DISPLAY.finditer(prose))) and "\\]" not in prose[display[-1].end():]:
        return "\\[ is not closed"
    if prose.count("$$") % 2 and "\n" in f"\n{prose}"[prose.rfind("$$")]:
        return "$$ is not closed"
    boxed = prose[prose.rfind("\\boxed{"):] if "\\boxed{" in prose else ""
    if boxed and not any(depth == 0 for depth in _depths(boxed.removeprefix("\\boxed"), "{", "}")):
        return "\\boxed{ is not closed"
    if _JSON.match(prose):
        bare = _STRING.sub("", prose)
        if '"' in bare or [*_depths(bare, "{[", "}]")][-1] > 0:
            return "its JSON is not closed"
    return ""


def _depths(text: str, opening: str, closing: str) -> Iterator[int]:
    """The depth of nesting behind each character."""
    return accumulate((c in opening) - (c in closing) for c in text)


def _open_end(prose: str) -> str:
    *before, last = prose.splitlines()
    end, in_csv = last[-1], any(line.rstrip().endswith(",") for line in before)
    if (end in ",\u060c、，；：" and not in_csv) or (
            end == ":" and not last[0].isspace() and not _NOT_OPEN.search(last)) or (
            unicodedata.category(end) == "Ps" and not _CLOSED.search(last)) or _OPERATOR.search(last):
        return f"it ends in {end!r}"
    *own, word = last.split()
    if (word in _OPEN_WORDS and len(own) >= 3 and own[-1][-1].isalpha() and own[-1].lower() not in _NAMING
            and len(_ENGLISH.intersection(prose.lower().split()[:-1])) >= 2):
        return f"it ends in {word!r}"
    return ""
