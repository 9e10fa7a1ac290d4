"""Degenerate and truncated text, told by token ids and punctuation; no rule depends on a language."""

import re
import unicodedata
from collections.abc import Sequence

from strop.trainer.config import Filter, Part
from strop.trainer.data.text import words

_SENTENCE_END = re.compile(r"[.!?…。！？؟।][\"'”’»」』)\]*_]*(?=\s|$)|[。！？]")


def repetition(items: Sequence, n: int = 4, least: int = 32) -> float:
    """The share of n-grams that stood there before (seq-rep-n of Welleck et al. 2020, 1908.04319); 0 where there are
    fewer than `least` of them, since a short text may well say something twice."""
    grams = [tuple(items[i:i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= least else 0.0


def unfit_tokens(tokens: Sequence[int], filters: Filter | Part) -> tuple[str, str]:
    """(reason, detail) why a completion's tokens are none to learn from, or empty."""
    if len(tokens) < filters.min_tokens:
        return "too_short", f"{len(tokens)} tokens"
    if filters.max_tokens is not None and len(tokens) > filters.max_tokens:
        return "too_long", f"{len(tokens)} tokens"
    share = repetition(tokens)
    return ("repetitive", f"{share:.2f} of its 4-grams stood before") if share > filters.max_repetition else ("", "")


def truncation(text: str) -> str:
    """Why `text` seems to break off in the middle, or nothing.

    Its last code block or tag stays open; it ends in a mark that something must follow; or its last sentence ends in a
    letter, where two sentences or more before it have their full stop and no other line does without. A text that
    breaks off in its first two sentences, or behind a number, is not told from one that ends there.
    """
    text = text.rstrip()
    if text.count("```") % 2:
        return "a code block is not closed"
    for tag in ("think", "answer", "tool_call"):
        if text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>"):
            return f"<{tag}> is not closed"
    if not text:
        return ""
    smiles = len(text) > 1 and text[-2] in ":;-="
    if text[-1] in ",;:、，；：" or (unicodedata.category(text[-1]) == "Ps" and not smiles):
        return f"it ends in {text[-1]!r}"
    if not unicodedata.category(text[-1]).startswith("L"):
        return ""
    *before, last = [line.strip() for line in text.splitlines() if line.strip()]
    ends = [m.end() for m in _SENTENCE_END.finditer(text)]
    rest = last[max((m.end() for m in _SENTENCE_END.finditer(last)), default=0):]
    style = any(line[-1].isalpha() and len(words(line)) >= 2 for line in before)
    signature = "," in rest and len(words(rest)) < 3
    begun = len(words(rest)) >= 2 and not signature
    return "its last sentence has no end" if len(ends) >= 2 and begun and not style else ""
