"""Repetitive and truncated text, by token ids and punctuation; no rule depends on a language."""

import re
import unicodedata
from collections.abc import Sequence

from strop.trainer.config import Filter, Part
from strop.trainer.data.text import words

_SENTENCE_END = re.compile(r"[.!?…。！？؟।][\"'”’»」』)\]*_]*(?=\s|$)|[。！？]")


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
    """Why `text` looks truncated, or an empty string.

    Evidence: an open code block or tag; a final mark that something must follow; or a last sentence that ends in a
    letter after at least two sentences with full stops, if no other line lacks its full stop. Truncation within the
    first two sentences, or after a number, is not detected.
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
