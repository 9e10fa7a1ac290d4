"""Scoring a completion against the true answer: number, exact, choice, regex, math, reasoning_gym
and instructions.

A completion is judged by its one final answer (see answers.py), so listing several earns nothing. A completion never
raises and never hangs; what cannot be read scores 0. Code of libraries and patterns run in a child process only.
"""

import difflib
import importlib.util
import logging
import math
import re
import warnings
from fractions import Fraction

from strop.trainer.errors import UserError
from strop.trainer.scoring import instructions, numbers
from strop.trainer.scoring.answers import MAX_CHARS, finals, plain, readings, sentences, spoken, unwrap
from strop.trainer.scoring.base import Item, Scored
from strop.trainer.scoring.choice import chosen, options
from strop.trainer.scoring.sandbox import Child

# of CPU time
REGEX_SECONDS, MATH_SECONDS, GYM_SECONDS, CHECK_SECONDS = 2.0, 5.0, 5.0, 0.5
ARGUMENTS = {"reasoning_gym": {"dataset"}, "number": {"tolerance"}, "exact": set(), "choice": {"choices"},
             "regex": {"pattern"}, "math": set(), "instructions": {"loose", "all"}}
SLOW = r"\\(sum|prod|int|lim|binom|Gamma)|!|\^|\*\*"  # what an evaluation that never ends is written with
_child = Child()


class RuleScorer:
    """A built-in rule; see base.Scorer."""

    by_item = True

    def __init__(self, rule: str, args: dict):
        self.rule, self.args = rule, args

    def score(self, items: list[Item], advance) -> list[Scored]:
        found = []
        for item in items:
            found.append(Scored(*verify(self.rule, item.completion, item.answer, self.args, item.row)))
            advance(1)
        return found

    def close(self) -> None:
        pass


def verify(verifier: str, completion: str, answer: str | None, args: dict, metadata: dict) -> tuple[float, str | None]:
    """(score in [0, 1], what was extracted). `metadata` is the row's: a reasoning-gym entry, or extra columns.

    Raises UserError only for what the recipe or its data got wrong (see `check`), never for a completion.
    """
    if verifier == "number":
        said, true = numbers.answered(completion), numbers.truth(answer or "")
        score = any(numbers.same(one, true, Fraction(args.get("tolerance", 0))) for one in said) if true else False
        return float(score), said[0].shown if said else None
    if verifier == "exact":
        found, equal = _reading(completion, answer or "")
        return float(equal), found or None
    if verifier == "choice":
        choices = options(args.get("choices") or metadata.get("choices"))
        found = chosen(completion, choices) if choices else None
        return float(found is not None and found == chosen(answer or "", choices)), found
    if verifier == "regex":
        task = {"pattern": args["pattern"], "text": spoken(completion)[-MAX_CHARS:], "answer": answer}
        return _judged("regex", task, REGEX_SECONDS)
    if verifier == "math":
        return _math(completion, answer or "")
    if verifier == "instructions":
        task = {"text": spoken(completion).strip(), "row": metadata, "loose": bool(args.get("loose")),
                "all": bool(args.get("all"))}
        return _judged("instructions", task, REGEX_SECONDS)
    if verifier == "reasoning_gym":
        return _reasoning_gym(completion, answer, args.get("dataset"), metadata)
    raise UserError(f"verifier={verifier} is unknown; there are {', '.join(ARGUMENTS)}")


def check(verifier: str, args: dict) -> None:
    """Raises UserError if `verifier_args` are wrong or what the verifier needs is not installed."""
    if unknown := sorted(args.keys() - ARGUMENTS[verifier]):
        known = ", ".join(sorted(ARGUMENTS[verifier])) or "none"
        raise UserError(f"verifier_args.{unknown[0]}: verifier {verifier} does not know it; it takes: {known}")
    for flag in ("loose", "all"):
        if not isinstance(args.get(flag, False), bool):
            raise UserError(f"verifier_args.{flag}={args[flag]!r} must be true or false")
    tolerance = args.get("tolerance", 0.0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise UserError(f"verifier_args.tolerance={tolerance!r} must be a number, 0 or more")
    if verifier == "choice" and "choices" in args and not options(args["choices"]):
        raise UserError(f"verifier_args.choices={args['choices']!r} must be a list of at least two different texts")
    if verifier == "regex":
        pattern = args.get("pattern")
        if not isinstance(pattern, str) or not pattern:
            raise UserError("verifier_args.pattern is missing: verifier regex needs a regular expression")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError, MemoryError) as e:
            why = "it nests too deeply" if isinstance(e, RecursionError) else e
            short = pattern if len(pattern) < 100 else f"{pattern[:80]}..."
            raise UserError(f"verifier_args.pattern={short!r} cannot be compiled as a regular expression: {why}") from e
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
    if verifier == "instructions":
        try:
            instructions.given(metadata)
        except ValueError as e:
            return str(e)
    if verifier in ("regex", "instructions"):
        return None
    if answer is None or not answer.strip():
        return f"verifier {verifier} needs an answer, and there is none"
    short = answer if len(answer) < 80 else f"{answer[:77]}..."
    if verifier == "number" and numbers.truth(answer) is None:
        return f"verifier number finds no number in the answer {short!r}, or more than one: use verifier math or exact"
    if verifier == "choice" and not options(args.get("choices") or metadata.get("choices")):
        return "verifier choice needs verifier_args.choices or a column choices with at least two different texts"
    if verifier == "math":
        # another term, too, for an answer that takes long to evaluate would cost every completion all of MATH_SECONDS
        for other in (["1"] if re.search(SLOW, answer) else []) + [answer]:
            judged = _child.judge("math", {"text": other, "answer": answer}, CHECK_SECONDS)
            if judged is None:
                return (f"the answer {short!r} takes more than {CHECK_SECONDS:g} s of CPU time to compare: simplify "
                        "it, or use verifier exact")
        score = judged["score"]
    else:
        score, _ = verify(verifier, answer, answer, args, metadata)
    return None if score >= 0.99 else f"the answer {short!r} fails its own verifier {verifier} ({score:g})"


def why_not(rules: list[tuple[str, dict]], answer: str | None, metadata: dict) -> str | None:
    """Why no completion could satisfy one of the rules (see check_answer), or None. rules: (name, args)."""
    return next(filter(None, (check_answer(rule, args, answer, metadata) for rule, args in rules)), None)


def needs_answer(rule: str, args: dict) -> bool:
    """Whether the rule compares with the true answer."""
    if rule == "regex":  # without an answer its group would match anything
        return re.compile(args["pattern"]).groups > 0
    return rule in ("number", "exact", "choice", "math")


def _whole(answer: str) -> str:
    """A true answer, or the part of it that a mark (a box, a tag, ####) says is it."""
    return next((final.text for final in finals(answer) if final.marked), answer)


def _reading(completion: str, answer: str) -> tuple[str, bool]:
    """(the reading of `completion` that is `answer`, else the likeliest one; whether it is the answer)"""
    said, true = readings(completion, answer), plain(_whole(answer))
    equal = next((text for text in said if plain(text) == true), None) if true else None
    return (said[0] if said else "", False) if equal is None else (equal, True)


def _math(completion: str, answer: str) -> tuple[float, str | None]:
    true, said = _whole(answer), _term(completion)
    equal = _reading(completion, true)[1] or plain(said) == plain(true)
    if equal or not said.strip(" .") or not true.strip():
        return float(equal), said or None
    letter, option = re.fullmatch(r"\(?([a-z])\)?", plain(true)), re.match(r"\(?([a-z])\)?(?=[).: ]|$)", plain(said))
    if letter and option and "(" in plain(said) + plain(true):  # \textbf{(B)}\ 12
        return float(letter[1] == option[1]), said
    one, other = numbers.truth(said), numbers.truth(true)
    if one and other and not re.search(r"\.[0-9]{6}", one.shown):
        return float(numbers.same(one, other)), said
    return _judged("math", {"text": said, "answer": true}, MATH_SECONDS, said)


def _term(completion: str) -> str:
    """The term that `completion` gives as its answer."""
    for final in finals(completion):
        for text in [final.text] if final.marked else (all_said := sentences(final.text)):
            terms = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text)
            if terms and not re.search(r"[0-9]", re.split(r"\$|\\\)|\\\]", text)[-1]):
                return "".join(terms[-1])
            if final.marked:
                return text.strip(" *.$")
            if re.search(r"[0-9\\]", unwrap(text)) or len(all_said) == 1:
                found = numbers.answered(text) if re.search(r"(?<!\\)\b[A-Za-z]{3}", text) else []
                return found[0].shown if found else re.split(r"\b(?:is|are|was|be|equals) ", text)[-1].strip(" *.")
    return ""


def _reasoning_gym(completion: str, answer: str | None, dataset: str | None, row: dict) -> tuple[float, str | None]:
    """The generator's own score, less two leniencies: a wrong number earns nothing (the library gives "10" half a point
    where the truth is "1"), and neither does a text that merely contains the truth."""
    entry = dict(row) if str(row.get("answer")) == answer else row | {"answer": answer}
    entry["metadata"] = entry["metadata"] if isinstance(entry.get("metadata"), dict) else {}
    dataset = dataset or entry["metadata"].get("source_dataset")
    if not isinstance(dataset, str):
        raise UserError("verifier reasoning_gym: the row names no source_dataset; set verifier_args.dataset")
    true = numbers.truth(answer) if answer and re.fullmatch(r"[-+0-9.,eE/$%\s]+", answer) else None
    if true:
        found = numbers.answered(completion)
        if not found:
            return 0.0, None
        said, equal = found[0].shown.replace(",", ""), numbers.same(found[0], true)
        if "/" in answer:  # a fraction is to be in the terms that the question asks for
            equal = equal and re.findall("[0-9]+", said) == re.findall("[0-9]+", answer)
    else:
        said, equal = _reading(completion, answer or "")
    task = {"dataset": dataset, "text": answer if equal else said, "entry": entry, "strict": bool(true)}
    return _judged("reasoning_gym", task, GYM_SECONDS, said)


def gym_scorer(dataset: str):
    """The scorer of a dataset of reasoning-gym. Raises UserError if there is none of that name."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, 1)
        raise UserError(f"reasoning_gym has no dataset {dataset!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return reasoning_gym.get_score_answer_fn(dataset)


# ---- what runs in the child process, where a judge is loaded by the task None

def _judged(kind: str, task: dict, seconds: float, extracted: str | None = None) -> tuple[float, str | None]:
    judged = _child.judge(kind, task, seconds) or {"score": 0.0}  # None: out of time or memory
    return float(judged["score"]), judged.get("extracted", extracted)


def _judge_regex(task: dict | None) -> dict:
    """1 if the pattern is found. With a group and an answer, the last match's first group must equal the answer."""
    last, answer = None, task and task["answer"]
    for last in re.finditer(task["pattern"], task["text"]) if task else ():  # noqa: B007 - the last match counts
        pass
    if last is None:
        return {"score": 0.0, "extracted": None}
    if not last.re.groups or answer is None:
        return {"score": 1.0, "extracted": last[0]}
    said = last[1] or ""
    one, other = numbers.truth(said), numbers.truth(answer)
    equal = plain(said) == plain(answer) or bool(one and other and numbers.same(one, other))
    return {"score": float(equal), "extracted": said}


def _judge_math(task: dict | None) -> dict:
    """1 if math-verify finds the two terms equal, and they also are relative to their size."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    task = task or {"answer": "x^2+2x+1", "text": "(x+1)^2"}
    gold, said = (parse(text if re.search(r"\\boxed|(?<!\\)\$|\\\(|\\\[", text) else f"${text}$", parsing_timeout=None)
                  for text in (task["answer"], task["text"]))
    equal = bool(gold and said) and verify(gold, said, timeout_seconds=None)
    if equal and all(getattr(terms[0], "is_number", False) for terms in (gold, said)):
        one, other = (terms[0].evalf(30) for terms in (gold, said))
        near = one.is_finite and any(abs(one - factor * other) <= 1e-5 * abs(one) for factor in (1, 100))
        equal = bool(near) or plain(task["answer"]) == plain(task["text"])
    return {"score": float(equal), "extracted": str(said[-1])[:500] if said else None}


def _judge_gym(task: dict | None) -> dict:
    """The dataset's own score. For a number, or with the library's own lenient scorer, only 1 counts."""
    from reasoning_gym.dataset import ProceduralDataset

    scorer = gym_scorer(task["dataset"] if task else "chain_sum")
    score = float(scorer(task["text"], task["entry"])) if task else 0.0
    strict = task is None or task["strict"] or getattr(scorer, "__func__", None) is ProceduralDataset.score_answer
    if not math.isfinite(score) or (strict and score < 0.99):
        score = 0.0
    return {"score": min(1.0, max(0.0, score)), "extracted": task and task["text"]}


def _judge_instructions(task: dict | None) -> dict:
    """The share of the row's instructions that are followed, or whether all are."""
    wanted = instructions.given(task["row"]) if task else []
    followed = instructions.followed(task["text"], wanted, task["loose"]) if task else [True]
    missed = ", ".join(name for (name, _), right in zip(wanted, followed, strict=False) if not right)
    share = sum(followed) / len(followed)
    score = float(share == 1) if task and task["all"] else share
    return {"score": score, "extracted": f"not followed: {missed}" if missed else "all followed"}


JUDGES = {"instructions": _judge_instructions, "regex": _judge_regex, "math": _judge_math, "reasoning_gym": _judge_gym}
