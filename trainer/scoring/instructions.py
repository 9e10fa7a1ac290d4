"""Instructions whose following can be checked, as IFEval has them (Zhou et al. 2023, arXiv 2311.07911): the columns
instruction_id_list and kwargs of its data name them, and IFBench (ifbench.py). Plus detectable_format:json_schema with
`schema`.

The language of a text is checked only by language:response_language, which needs the package langdetect.
"""

import importlib.util
import json
import re

from strop.trainer.scoring.ifbench import IFBENCH
from strop.trainer.scoring.prose import sentences

CHANGED = ("```json", "```Json", "```JSON", "```")


def compared(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def capital_words(text: str) -> int:
    words = re.findall(r"(?:[A-Za-z]\.){2,}|[^\W_]+(?:[-./&][^\W_]+)*|'[^\W_]+", text)
    return sum(word.isupper() for word in words)


def parts(text: str, mark: str) -> list[str] | None:
    """The texts between marks, without an empty one at either end; None if there is one in between."""
    found = text.split(mark) if len(mark) > 3 else re.split(r"\s?\*\*\*\s?", text)
    kept = [p for i, p in enumerate(found) if p.strip() or 0 < i < len(found) - 1]
    return kept if all(p.strip() for p in kept) else None


def first_word(paragraph: str) -> str:
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    return re.split(r"""[.,?!'"]""", word)[0].lower()


def nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word_: str) -> bool:
    found = text.split("\n\n")
    count = sum(bool(p.strip()) for p in found)
    if nth_paragraph > count or not found[nth_paragraph - 1].strip():
        return False
    return count == num_paragraphs and first_word(found[nth_paragraph - 1]) == first_word_.lower()


def highlights(text: str) -> int:
    return sum(bool(h.strip("*").strip()) for h in re.findall(r"\*[^\n*]*\*", text)) + sum(
        bool(h[2:-2].strip()) for h in re.findall(r"\*\*[^\n*]*\*\*", text))


def postscript(text: str, marker: str) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, marker.lower()), text.lower()))


def as_json(text: str):
    """Raises ValueError if the text is no JSON, in a fence or not."""
    text = text.strip()
    for fence in CHANGED:
        text = text.removeprefix(fence)
    return json.loads(text.removesuffix("```").strip())


def is_json(text: str, schema: dict | None = None) -> bool:
    try:
        value = as_json(text)
        if schema is not None:
            import jsonschema

            jsonschema.validate(value, schema)
    except (ValueError, RecursionError):
        return False
    except Exception as e:
        if type(e).__name__ in ("ValidationError", "_WrappedReferencingError"):
            return False
        raise
    return True


def language(text: str, wanted: str) -> bool:
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == wanted
    except langdetect.LangDetectException:
        return True


OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# id: (the arguments that it needs, check(text, arguments))
INSTRUCTIONS = {
    "keywords:existence": (("keywords",), lambda t, a: all(re.search(k, t, re.I) for k in a["keywords"])),
    "keywords:frequency": (("keyword", "relation", "frequency"), lambda t, a: compared(
        len(re.findall(a["keyword"], t, re.I)), a["relation"], a["frequency"])),
    "keywords:forbidden_words": (("forbidden_words",), lambda t, a: not any(
        re.search(rf"\b{word}\b", t, re.I) for word in a["forbidden_words"])),
    "keywords:letter_frequency": (("letter", "let_relation", "let_frequency"), lambda t, a: compared(
        t.lower().count(a["letter"].lower()), a["let_relation"], a["let_frequency"])),
    "language:response_language": (("language",), lambda t, a: language(t, a["language"])),
    "length_constraints:number_sentences": (("num_sentences", "relation"), lambda t, a: compared(
        len(sentences(t)), a["relation"], a["num_sentences"])),
    "length_constraints:number_paragraphs": (("num_paragraphs",), lambda t, a: len(
        parts(t, "***") or ()) == a["num_paragraphs"]),
    "length_constraints:number_words": (("num_words", "relation"), lambda t, a: compared(
        len(re.findall(r"\w+", t)), a["relation"], a["num_words"])),
    "length_constraints:nth_paragraph_first_word": (("num_paragraphs", "nth_paragraph", "first_word"),
        lambda t, a: nth_paragraph(t, a["num_paragraphs"], a["nth_paragraph"], a["first_word"])),
    "detectable_content:number_placeholders": (("num_placeholders",), lambda t, a: len(
        re.findall(r"\[.*?\]", t)) >= a["num_placeholders"]),
    "detectable_content:postscript": (("postscript_marker",), lambda t, a: postscript(t, a["postscript_marker"])),
    "detectable_format:number_bullet_lists": (("num_bullets",), lambda t, a: len(
        re.findall(r"^\s*\*[^*].*$|^\s*-.*$", t, re.M)) == a["num_bullets"]),
    "detectable_format:constrained_response": ((), lambda t, a: any(option in t for option in OPTIONS)),
    "detectable_format:number_highlighted_sections": (("num_highlights",), lambda t, a: highlights(
        t) >= a["num_highlights"]),
    "detectable_format:multiple_sections": (("section_spliter", "num_sections"), lambda t, a: len(
        re.findall(rf"\s?{a['section_spliter']}\s?\d+\s?", t)) >= a["num_sections"]),
    "detectable_format:json_format": ((), lambda t, a: is_json(t)),
    "detectable_format:json_schema": (("schema",), lambda t, a: is_json(t, a["schema"])),
    "detectable_format:title": ((), lambda t, a: any(
        title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", t))),
    "combination:two_responses": ((), lambda t, a: len(found := parts(t, "******") or ()) == 2
                                  and found[0].strip() != found[1].strip()),
    "combination:repeat_prompt": (("prompt_to_repeat",), lambda t, a: t.strip().lower().startswith(
        a["prompt_to_repeat"].strip().lower())),
    "startend:end_checker": (("end_phrase",), lambda t, a: t.strip().strip('"').lower().endswith(
        a["end_phrase"].strip().lower())),
    "startend:quotation": ((), lambda t, a: len(t.strip()) > 1 and t.strip()[0] == '"' == t.strip()[-1]),
    "change_case:capital_word_frequency": (("capital_relation", "capital_frequency"), lambda t, a: compared(
        capital_words(t), a["capital_relation"], a["capital_frequency"])),
    "change_case:english_capital": ((), lambda t, a: t.isupper()),
    "change_case:english_lowercase": ((), lambda t, a: t.islower()),
    "punctuation:no_comma": ((), lambda t, a: "," not in t),
    **IFBENCH,
}
# those that need a package
PACKAGES = {"language:response_language": "langdetect", "detectable_format:json_schema": "jsonschema",
            "words:odd_even_syllables": "syllapy"}


def given(row: dict) -> list[tuple[str, dict]]:
    """(id, arguments) of a row's instructions. Raises ValueError, which says what is wrong with the row."""
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not ids:
        raise ValueError("rule instructions needs a column instruction_id_list, a list of names")
    kwargs = [{}] * len(ids) if kwargs is None else kwargs
    if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(k, dict | None) for k in kwargs):
        raise ValueError(f"column kwargs must be a list of {len(ids)} objects, one per instruction")
    found = []
    for name, arguments in zip(ids, kwargs, strict=True):
        if name not in INSTRUCTIONS:
            raise ValueError(f"there is no instruction {name}; there are {', '.join(INSTRUCTIONS)}")
        arguments = {k: v for k, v in (arguments or {}).items() if v is not None}
        if missing := [k for k in INSTRUCTIONS[name][0] if k not in arguments]:
            raise ValueError(f"instruction {name} lacks {', '.join(missing)} in column kwargs")
        package = PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"instruction {name} needs the package {package}: pip install {package}")
        for pattern in (arguments.get("keyword"), arguments.get("section_spliter"), *arguments.get("keywords", ()),
                        *arguments.get("forbidden_words", ())):
            try:
                re.compile(pattern or "")
            except (re.error, TypeError) as e:
                raise ValueError(f"instruction {name}: {pattern!r} in column kwargs is no regular expression") from e
        try:
            if not package:
                INSTRUCTIONS[name][1]("One is a text. Another one?", arguments)
        except Exception as e:
            raise ValueError(f"instruction {name}: {arguments} in column kwargs cannot be used ({e})") from e
        found.append((name, arguments))
    return found


def versions(text: str) -> list[str]:
    """The text, and without its first line, its last line, both and asterisks: what IFEval's loose verdict tries."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(t.replace("*", "") for t in cut)]


def followed(text: str, instructions: list[tuple[str, dict]], loose: bool) -> list[bool]:
    """Whether each instruction is followed; none is by an empty text."""
    tries = versions(text) if loose else [text]
    return [any(t.strip() and INSTRUCTIONS[name][1](t, arguments) for t in tries)
            for name, arguments in instructions]
