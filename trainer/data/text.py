"""Text as the filters compare it: normalized characters, and words (single characters in scripts without spaces)."""

import re
import unicodedata

_EDGES = ".,;:!?…\"'()[]{}«»“”‘’、。，；：！？（）「」『』"
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
                   r"|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")


def normalize(text: str) -> str:
    """`text` as prompts are compared: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of the normalized text without the punctuation around them; of kana and Chinese characters each."""
    return [word for found in _WORD.findall(normalize(text)) if (word := found.strip(_EDGES))]
