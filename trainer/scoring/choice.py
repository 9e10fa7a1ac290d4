"""Multiple choice: which one option a completion names, by its label, its text or both."""

import re

from strop.trainer.scoring.answers import finals, plain, sentences, unwrap

_NOT = (r"(?:\bnot|n['’]t(?: be)?|\brather than|\binstead of|\bneither|\bnone of|\bnor|\bexcept|\bunlike|"
        r"\brul(?:es?|ed) out|\beliminat\w+|\bexclud\w+|\breject\w*|\bdiscard\w*)")
_WRONG = (r"(?:\s+\w+){0,2}?(?:\s+(?:is|are|was|were|can|could|would|does|do|seems?|looks?)(?:n['’]t)?)(?:\s+\w+){0,2}?"
          r"\s*(?:\bnot\b|n['’]t\b|\bwrong|\bincorrect|\bfalse|\binvalid|\bimpossible|\beliminated|\bexcluded|\bout\b)"
          r"|\s+(?:can|could|would|is|are|does|do)(?:not|n['’]t)\b")
_KIND = r"(?:the\s+|an?\s+)?(?:options?|answers?|choices?|letters?)\s+"
_ARTICLE = re.compile(r"\s+(?!(?:is|was|because|since|as|and|or|nor|would|must|seems|looks|are|has|gives)\b)[a-z]")
_LABELED = re.compile(rf"^{_KIND}|[).:]$", re.I)
_SO = re.compile(r"\b(?:so|but|thus|therefore|hence|i(?:'ll| will| would)? (?:say|choose|pick|go with))\b,?\s*", re.I)


def options(choices) -> dict[str, str]:
    """`labeled`, with the texts as completions are compared with them."""
    return {label: plain(text) for label, text in labeled(choices).items()}


def labeled(choices) -> dict[str, str]:
    """{label: text}, labels upper case; from a list of texts or from {"label": [...], "text": [...]}; {} unless there
    are two at least, all different."""
    labels, texts = None, choices
    if isinstance(choices, dict):
        labels, texts = choices.get("label"), choices.get("text")
    if not isinstance(texts, list) or not 2 <= len(texts) <= 26 or not all(isinstance(t, str) for t in texts):
        return {}
    if not isinstance(labels, list):
        labels = [chr(ord("A") + i) for i in range(len(texts))]
    found = {str(label).strip().upper(): text for label, text in zip(labels, texts, strict=False)}
    different = set(map(plain, found.values()))
    return found if len(found) == len(texts) == len(different) and all(different) else {}


def chosen(completion: str, choices: dict[str, str]) -> str | None:
    """The label of the one option that `completion` ends on; None if it names none or several."""
    ruled_out = set()
    for final in finals(completion):
        for text in [final.text] if final.marked else sentences(final.text):
            named, negated = _named(text, choices)
            if len(named) == 1 and (label := named.pop()) not in ruled_out:
                return label
            if named:
                return None
            ruled_out |= negated
    return None


def _named(text: str, choices: dict[str, str]) -> tuple[set[str], set[str]]:
    """(labels of the options that `text` names, labels of those that it rules out)"""
    if plain(text) in choices.values():
        return {next(label for label, option in choices.items() if option == plain(text))}, set()
    text = " ".join(re.sub(r"\$([^$]+)\$", r"\1", unwrap(text)).replace("*", "").split())
    lone = re.fullmatch(rf"(?:{_KIND})?[(\[]?\s*(\w{{1,2}})\s*[)\].:]*", text.strip(" \"'`_"), re.I)
    if lone and lone[1].upper() in choices:
        return {lone[1].upper()}, set()
    labels = "|".join(map(re.escape, sorted(choices, key=len, reverse=True)))
    texts = "|".join(map(re.escape, sorted(choices.values(), key=len, reverse=True)))
    mention = (rf"(?:(?i:{_KIND})?(?:[(\[](?P<in>(?i:{labels}))[)\]]|(?<![\w'’.])(?P<by>{labels})(?![\w'’^/=])[).:]*)"
               rf"|(?<![\w/.^-])(?i:(?P<text>{texts}))(?![\w/^]|\.\d))")
    nameless = re.sub(r"\?P<\w+>", "?:", mention)
    several = rf"{nameless}(?:\s*(?:,|and|or|nor|&|,\s*(?:and|or))\s*{nameless}){{0,9}}"
    negated = re.compile(rf"(?i:{_NOT})\s+(?:\w+\s+)?{several}|{several}(?i:{_WRONG})")
    gone = " ".join(m[0] for m in negated.finditer(text))
    text = negated.sub(" ", text)
    return _mentions(mention, text, choices), _mentions(mention, gone, choices) if gone else set()


def _mentions(mention: str, text: str, choices: dict[str, str]) -> set[str]:
    by_label, by_text, ends = set(), set(), [0]
    for m in re.finditer(mention, text):
        if m["text"]:
            by_text |= {label for label, option in choices.items() if option == m["text"].casefold()}
        elif m["by"] not in ("A", "I") or _LABELED.search(m[0]) or not _ARTICLE.match(text, m.end()):
            by_label.add((m["in"] or m["by"]).upper())
            ends.append(m.end())
    if len(by_label) > 1 and (so := list(_SO.finditer(text))) and so[-1].end() < len(text):
        return _mentions(mention, text[so[-1].end():], choices)
    if len(by_label) == 1:  # the text beside the label must be its own; what an explanation names does not matter
        rest = text[ends[1]:]
        long = len(rest) > len(choices[min(by_label)]) + 2
        return by_label | {t for t in by_text if not long or re.match(rf"\W*{re.escape(choices[t])}", rest, re.I)}
    # an option whose text lies inside a longer one that is named too is not meant
    return by_label or {a for a in by_text if not any(a != b and choices[a] in choices[b] for b in by_text)}
