"""Sentences of a text."""

import re

NAMES = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|e\.g|i\.e|Inc|Ltd|Co|No|Fig|approx|U\.S|U\.K|a\.m|p\.m"
                   r"|Ph\.D|[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """Sentences end with . ! ? (also in quotes) before white space, unless the dot belongs to an abbreviation."""
    found, start = [], 0
    for end in re.finditer(r"""[.!?]+["'”’)\]*_]*(?=\s|$)""", text):
        after = text[end.end():].lstrip()[:1]
        dots = end[0].rstrip("\"'”’)]*_")
        if dots == "." and (NAMES.search(text[start:end.start() + 1]) or after.islower()):
            continue
        if set(dots) == {"."} and len(dots) > 1 and after.islower():
            continue
        if text[start:end.end()].strip():
            found.append(text[start:end.end()].strip())
        start = end.end()
    return [*found, text[start:].strip()] if text[start:].strip() else found
