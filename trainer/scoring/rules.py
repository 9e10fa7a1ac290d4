"""Scoring a completion against the truth: reasoning_gym, number, exact, choice, regex and math.

Exactly one candidate is ever taken from a completion and compared, so listing many answers earns nothing: the content
of the last `<answer>` tag, else of the last `\\boxed{}`, else what follows the last "answer is", else the end of the
text. A completion never raises and never hangs; whatever cannot be read scores 0.
"""

import importlib.util
import math
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from strop.trainer.errors import UserError
from strop.trainer.scoring.sandbox import Child

REGEX_SECONDS, MATH_SECONDS, GYM_SECONDS = 2.0, 10.0, 5.0
MAX_CHARS = 20_000  # the end of a completion that is looked at
ARGUMENTS = {"reasoning_gym": {"dataset"}, "number": {"tolerance"}, "exact": set(), "choice": {"choices"},
             "regex": {"pattern"}, "math": set()}
_child = Child()


def verify(verifier: str, completion: str, answer: str | None, args: dict, metadata: dict) -> tuple[float, str | None]:
    """(score in [0, 1], what was extracted). `metadata` is the row's: a reasoning-gym entry, or extra columns.

    Raises UserError only for what the recipe or its data got wrong (see `check`), never for a completion.
    """
    text = completion[-MAX_CHARS:]
    if verifier == "number":
        return _number(text, answer, float(args.get("tolerance", 0.0)))
    if verifier == "exact":
        found = candidate(text)
        return float(bool(found) and plain(found) == plain(answer or "")), found or None
    if verifier == "choice":
        return _choice(text, answer, args.get("choices") or metadata.get("choices"))
    if verifier == "regex":
        return _judged("regex", {"pattern": args["pattern"], "text": text, "answer": answer}, REGEX_SECONDS)
    if verifier == "math":
        return _judged("math", {"text": text, "answer": answer}, MATH_SECONDS)
    if verifier == "reasoning_gym":
        return _reasoning_gym(text, answer, args.get("dataset"), metadata)
    raise UserError(f"verifier={verifier} is unknown; there are {', '.join(ARGUMENTS)}")


def check(verifier: str, args: dict) -> None:
    """Raises UserError if `verifier_args` are wrong or what the verifier needs is not installed."""
    if unknown := sorted(args.keys() - ARGUMENTS[verifier]):
        known = ", ".join(sorted(ARGUMENTS[verifier])) or "none"
        raise UserError(f"verifier_args.{unknown[0]}: verifier {verifier} does not know it; it takes: {known}")
    tolerance = args.get("tolerance", 0.0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise UserError(f"verifier_args.tolerance={tolerance!r} must be a number, 0 or more")
    if verifier == "choice" and "choices" in args and not _options(args["choices"]):
        raise UserError(f"verifier_args.choices={args['choices']!r} must be a list of at least two different texts")
    if verifier == "regex":
        pattern = args.get("pattern")
        if not isinstance(pattern, str) or not pattern:
            raise UserError("verifier_args.pattern is missing: verifier regex needs a regular expression")
        try:
            re.compile(pattern)
        except re.error as e:
            raise UserError(f"verifier_args.pattern={pattern!r} is no regular expression: {e}") from e
    for name, module, extra in (("math", "math_verify", "math"), ("reasoning_gym", "reasoning_gym", "quickstart")):
        if verifier == name and importlib.util.find_spec(module) is None:
            raise UserError(f"verifier {name} needs the package {module.replace('_', '-')}: pip install "
                             f"'strop[{extra}]'")
    if verifier == "reasoning_gym" and "dataset" in args:
        gym_scorer(args["dataset"])


def check_answer(verifier: str, args: dict, answer: str | None, metadata: dict) -> str | None:
    """Why this row can never be solved, or None: an answer that is missing or fails its own verifier."""
    if verifier == "reasoning_gym" and answer is None:
        return None  # some generators accept many answers and name none
    if answer is None or not answer.strip():
        return None if verifier == "regex" else f"verifier {verifier} needs an answer, and there is none"
    if verifier == "regex":
        return None
    if verifier == "number" and parse_number(answer) is None:
        return f"verifier number finds no number in the answer {answer[:80]!r}"
    if verifier == "choice" and not _options(args.get("choices") or metadata.get("choices")):
        return "verifier choice needs verifier_args.choices or a column choices with at least two different texts"
    if verifier == "math":
        answer = answer if re.search(r"\\boxed|\$|\\\(|\\\[", answer) else f"${answer}$"
    score, _ = verify(verifier, answer, answer, args, metadata)
    return None if score >= 0.99 else f"the answer {answer[:80]!r} fails its own verifier {verifier} ({score:g})"


# ---- what a completion says

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.S | re.I)
_MARK = re.compile(r"\b(?:answer|result|solution)\b(?:\s+(?:is|are|equals|would be|will be|=)|\s*[:=])+\s*:?", re.I)
_END = re.compile(r"\n|[.!?;](?=\s|$)|,? (?:because|since|as)\s")


def candidate(text: str) -> str:
    """The one piece of `text` that is taken as the answer, stripped; the whole text where nothing marks one."""
    marked = _marked(text)
    return (text if marked is None else marked).strip()


def _marked(text: str) -> str | None:
    if tags := _TAG.findall(text):
        return tags[-1]
    if (box := _last_box(text)) is not None:
        return box
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    rest = text[marks[-1].end():].lstrip(" *_`\n\t")
    end = _END.search(rest)
    return (rest[:end.start()] if end else rest).strip(" *_`\t") or None


def _last_box(text: str) -> str | None:
    for start in reversed([m.end() for m in _BOX.finditer(text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start:i]
        return None  # cut inside the box
    return None


def plain(text: str) -> str:
    """`text` as exact and choice compare it: NFKC, case folded, white space collapsed, outer marks and quotes off."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" *_`\"'“”‘’«»").rstrip(".!,;: ").strip(" *_`\"'“”‘’«»")


# ---- numbers

_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}.%])[-+](?=[$€£]?[0-9.]))?[$€£]?(?<![A-Za-z_0-9])(?<![0-9]\.)"
    rf"(?P<value>(?:{_DIGITS})(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    rf"(?:[eE](?P<e>[-+]?[0-9]{{1,4}})(?!\w)"
    rf"|\s{{0,3}}(?:\\times|\\cdot|×|\*)\s{{0,3}}10\s?\^\s?\{{?(?P<ten>[-+]?[0-9]{{1,4}})\}}?)?"
    rf"(?:\s?/\s?(?P<under>[0-9]{{1,20}})(?![0-9.,]*[0-9/]))?")
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9]{1,40})\s*\}\s*\{\s*([0-9]{1,40})\s*\}")
_SPACED = re.compile(r"(?<=[0-9])(?:\\[,!;]|\{,\}|[\u00a0\u2009\u202f'](?=[0-9]{3}(?![0-9])))(?=[0-9])")


def numbers(text: str) -> list[tuple[str, Fraction]]:
    """Every number in `text`, as (text, exact value): 1,234  -5  .5  1.5e3  3/4  \\frac{3}{4}; 5% is 5.

    A minus counts as a sign only where it cannot be a subtraction (not in 10-5). A quotient counts as one number only
    in lowest terms: a problem repeated (10/2) is not its answer.
    """
    text = re.sub("[\u2212\u2013\ufe63\uff0d]", "-", text)
    text = _SPACED.sub(lambda m: "," if m[0] == "{,}" else "", text)
    text = _FRAC.sub(r" \1/\2 ", text)
    found = []
    for m in _NUMBER.finditer(text):
        power = int(m["e"] or m["ten"] or 0)
        if len(m[0]) > 300 or abs(power) > 300:
            continue
        value = Fraction(m["value"].replace(",", ""))
        value *= Fraction(10) ** power * (-1 if m["sign"] == "-" else 1)
        under = int(m["under"]) if m["under"] else None
        if under is None:
            found.append((m[0].strip(), value))
        elif under > 1 and value.denominator == 1 and math.gcd(value.numerator, under) == 1:
            found.append((m[0].strip(), value / under))
        else:
            found += [(m[0].split("/")[0].strip(), value), (m["under"], Fraction(under))]
    return found


def parse_number(text: str) -> tuple[str, Fraction] | None:
    """The number that `text` gives as its answer: the last one of what is marked as the answer, else of all of it.

    A box or answer tag that lists several numbers names none.
    """
    for inside in (_TAG.findall(text)[-1:] or [_last_box(text)]):
        if inside is not None:
            found = numbers(inside)
            if len({v for _, v in found}) > 1 and "=" not in inside:
                return None
            if found:
                return found[-1]
    for part in (_marked(text), text):
        if part is not None and (found := numbers(part)):
            return found[-1]
    return None


def _number(text: str, answer: str | None, tolerance: float) -> tuple[float, str | None]:
    truth, found = parse_number(answer or ""), parse_number(text)
    if found is None or truth is None:
        return 0.0, None
    return float(abs(found[1] - truth[1]) <= Fraction(tolerance)), found[0]


# ---- choices

def _options(choices) -> dict[str, str]:
    """{label: text}, labels upper case; from a list of texts or from {"label": [...], "text": [...]}; else {}."""
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):
        labels, texts = choices.get("label"), choices["text"]
    else:
        labels, texts = None, choices
    if not isinstance(texts, list) or not 2 <= len(texts) <= 26 or not all(isinstance(t, str) for t in texts):
        return {}
    labels = labels or [chr(ord("A") + i) for i in range(len(texts))]
    found = {str(label).strip().upper(): plain(text) for label, text in zip(labels, texts, strict=False)}
    return found if len(found) == len(texts) == len(set(found.values())) else {}


def _choice(text: str, answer: str | None, choices) -> tuple[float, str | None]:
    options = _options(choices)
    truth = _which(answer or "", options)
    part = _marked(text)
    if part is None:
        lines = [line for line in text.splitlines() if line.strip()]
        part = lines[-1] if lines else ""
    found = _which(part, options)
    return float(found is not None and found == truth), found


def _which(text: str, options: dict[str, str]) -> str | None:
    """The label of the one option that `text` names, by its text or its label; None if it names none or several."""
    words = plain(text)
    by_text = [label for label, option in options.items() if option == words]
    if by_text:
        return by_text[0]
    label = re.fullmatch(r"[(\[]?\s*([a-z0-9]{1,2})\s*[)\].:]*(?:\s+.*|)", words)
    rest = words[label.end(1):].lstrip(" )].:-") if label else ""
    if label and label[1].upper() in options and rest in ("", options[label[1].upper()]):
        return label[1].upper()
    named = "|".join(map(re.escape, sorted(options, key=len, reverse=True)))
    labels = set(re.findall(rf"(?<![\w'])(?:[(\[]({named})[)\]]|({named})(?=\s*(?:[).:,]|$|or\b|and\b)))", text))
    labels = {a or b for a, b in labels}
    texts = {label for label, option in options.items() if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", words)}
    # an option whose text lies inside a longer one that is named too is not meant
    texts = {a for a in texts if not any(a != b and options[a] in options[b] for b in texts)}
    named = labels | texts
    return named.pop() if len(named) == 1 else None


# ---- reasoning-gym

# generators whose scorer evaluates text: only arithmetic may reach them
EVALUATES = {"binary_matrix", "bitwise_arithmetic", "countdown", "intermediate_integration", "n_queens",
             "number_sorting", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
             "string_insertion"}
_CALLS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln",
          "sqrt", "Abs", "abs"}


def _reasoning_gym(text: str, answer: str | None, dataset: str | None, metadata: dict) -> tuple[float, str | None]:
    """The generator's own score, with two of its leniencies taken away: a wrong number earns nothing (it would give
    "10" half a point where the truth is "1"), and neither does a text that merely contains the truth."""
    entry = {"answer": answer, **metadata}
    entry.setdefault("metadata", {})
    dataset = dataset or (entry["metadata"] or {}).get("source_dataset")
    if not dataset:
        raise UserError("verifier reasoning_gym: the row names no source_dataset; set verifier_args.dataset")
    truth = numbers(answer) if isinstance(answer, str) else []
    if len(truth) == 1 and re.fullmatch(r"[-+0-9.,eE/$%\s]+", answer):
        found = parse_number(text)
        if found is None:
            return 0.0, None
        said = answer if found[1] == truth[0][1] else found[0].replace(",", "")
        try:
            score = float(gym_scorer(dataset)(said, entry))
        except Exception:  # a scorer of the library that fails on what a model wrote
            score = 0.0
        return (1.0 if score >= 0.99 else 0.0), found[0]
    said = candidate(text)
    return _judged("reasoning_gym", {"dataset": dataset, "text": said, "entry": entry}, GYM_SECONDS, said)


@lru_cache(maxsize=64)
def gym_scorer(dataset: str):
    import difflib

    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, 1)
        raise UserError(f"reasoning_gym has no dataset {dataset!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return reasoning_gym.get_score_answer_fn(dataset)


def _harmless(text) -> bool:
    """True if evaluating `text` can only compute: no attribute, no dunder, no call but of a mathematical function."""
    if not isinstance(text, str):
        return True
    calls = re.findall(r"([^\W\d]\w*)\s*\(|[)\]\"']\s*\(", text)
    return ("__" not in text and not re.search(r"\.\s*[^\W\d]|\blambda\b|\bfor\b|:=", text)
            and all(name in _CALLS for name in calls))


# ---- what runs in the child process

def _judged(kind: str, task: dict, seconds: float, extracted: str | None = None) -> tuple[float, str | None]:
    judged = _child.ask(kind, task, seconds)
    if judged is None:  # out of time or memory
        return 0.0, extracted
    return float(judged["score"]), judged.get("extracted", extracted)


def _judge_regex(task: dict | None) -> dict:
    """1 if the pattern is found. With a group and an answer, the last match's first group must equal the answer."""
    if task is None:
        return {}
    pattern = re.compile(task["pattern"])
    last = None
    for last in pattern.finditer(task["text"]):  # noqa: B007 - the last match counts
        pass
    if last is None:
        return {"score": 0.0, "extracted": None}
    if pattern.groups and task["answer"]:
        said = last[1] or ""
        return {"score": float(plain(said) == plain(task["answer"])), "extracted": said}
    return {"score": 1.0, "extracted": last[0]}


def _judge_math(task: dict | None) -> dict:
    import logging

    from math_verify import parse, verify

    if task is None:
        logging.disable(logging.CRITICAL)
        return {}
    answer = task["answer"]
    gold = parse(answer if re.search(r"\\boxed|\$|\\\(|\\\[", answer) else f"${answer}$")
    said = parse(task["text"])
    score = float(bool(gold and said) and bool(verify(gold, said)))
    return {"score": score, "extracted": str(said[-1])[:500] if said else None}


def _judge_gym(task: dict | None) -> dict:
    from reasoning_gym.dataset import ProceduralDataset

    if task is None:
        return {}
    dataset, text, entry = task["dataset"], task["text"], task["entry"]
    scorer, answer = gym_scorer(dataset), entry.get("answer")
    if dataset in EVALUATES:
        inner = entry.get("metadata") or {}
        if not all(map(_harmless, (text, answer, inner.get("problem"), inner.get("integrand")))):
            return {"score": 0.0, "extracted": text}
    score = float(scorer(text, entry))
    lenient = getattr(scorer, "__func__", None) is ProceduralDataset.score_answer
    if not math.isfinite(score) or (lenient and score < 1.0):
        score = 0.0
    return {"score": min(1.0, max(0.0, score)), "extracted": text}


ISOLATED = {"regex": _judge_regex, "math": _judge_math, "reasoning_gym": _judge_gym}
