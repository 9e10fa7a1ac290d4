"""Ready-made SFT and preference data in TRL's columns, as rows of the tables that select writes.

Conversational rows (lists of messages) go through the chat template, with the columns `tools` and
`chat_template_kwargs`. Plain strings are tokenized without a template, with an end-of-sequence token. A column that is
not read is refused unless the recipe ignores it.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from strop.trainer.config import Filter, ReadyData
from strop.trainer.data import chat
from strop.trainer.data.chat import Encoded
from strop.trainer.data.columns import TEMPLATE, from_text, refuse_unread, template_kwargs, to_messages
from strop.trainer.data.contamination import HeldOut
from strop.trainer.data.dedup import near_duplicates
from strop.trainer.data.quality import truncation, unfit_tokens
from strop.trainer.data.rows import Quarantine, kind, read_rows
from strop.trainer.errors import UserError
from strop.trainer.run.tables import Drops

WANTED = {"pairs": "prompt, chosen and rejected", "labels": "prompt, completion and label, or pairs",
          "lists": "prompt, completions and scores or ranks, or pairs"}


class Unfit(Exception):
    """A well-formed row that cannot be trained on; args are (reason, detail)."""


@dataclass(frozen=True)
class Ready:
    """An encoded row. completions: one for SFT, chosen and rejected, or several that are rated, best first; user_text:
    the user's turns; replies: the last assistant message of each completion; margin: how much better chosen is, if the
    row says; scores: of rated completions, of labeled ones 1 for a desirable one and 0."""

    where: str
    n: int
    prompt: list[int]
    completions: tuple[Encoded, ...]
    user_text: str
    replies: tuple[str, ...]
    margin: float | None = None
    scores: tuple[float, ...] = ()

    @property
    def learned(self) -> Encoded | None:
        """The completion that is worth learning; None if the only one is undesirable."""
        return None if self.scores == (0.0,) else self.completions[0]


def ready_sft(tokenizer, data: ReadyData, filters: Filter, held: HeldOut | None, drops: Drops,
              quarantine: Quarantine) -> list[dict]:
    """Rows of sft.parquet from `messages`, or `prompt` + `completion`, and their `text`.

    Duplicates, rows that repeat a held-out prompt and rows that fail `filters` are dropped. Raises UserError if the
    file cannot be read or has more malformed rows than the quarantine allows.
    """
    return [{"row_id": f"{data.name}/{row.n}", "source": data.name, "prompt_id": None, "sample_index": None,
             "prompt_tokens": row.prompt, "completion_tokens": row.completions[0].tokens,
             "loss_mask": row.completions[0].loss_mask, "score": None, "weight": data.weight, "origin": data.name,
             "text": "\n".join([row.user_text, *row.replies])}
            for row in _ready(_sft_row, tokenizer, data, filters, held, drops, quarantine)]


def ready_pairs(tokenizer, data: ReadyData, filters: Filter, held: HeldOut | None, drops: Drops,
                quarantine: Quarantine) -> list[dict]:
    """Rows of pairs.parquet from `prompt` + `chosen` + `rejected`, or from `chosen` and `rejected` that both begin with
    the prompt. A column `margin` says how much better chosen is.

    Drops rows as `ready_sft` does, and pairs of equal completions. Quality filters look at chosen only: a bad rejected
    completion may be the point of the pair. Raises UserError as `ready_sft` does.
    """
    rows = []
    for row in _ready(_pair_row, tokenizer, data, filters, held, drops, quarantine):
        chosen, rejected = row.completions
        rows.append({"row_id": f"{data.name}/{row.n}", "source": data.name, "prompt_id": None,
                     "prompt_tokens": row.prompt, "chosen_tokens": chosen.tokens, "rejected_tokens": rejected.tokens,
                     "chosen_mask": chosen.loss_mask, "rejected_mask": rejected.loss_mask,
                     "chosen_template": chosen.template_mask, "rejected_template": rejected.template_mask,
                     "chosen_score": None, "rejected_score": None, "margin": row.margin, "decided_by": None,
                     "weight": data.weight, "origin": data.name})
    return rows


def ready_rated(tokenizer, data: ReadyData, rows: str, filters: Filter, held: HeldOut | None, drops: Drops,
                quarantine: Quarantine) -> list[dict]:
    """Rows of rated.parquet, one per completion. rows: labels, from `prompt` + `completion` + `label`; or lists, from
    `prompt` + `completions` + `scores` or `ranks`, where 1 is best. Rows of preference pairs are either: chosen is
    desirable and the best.

    Drops rows as `ready_sft` does. Quality filters look at desirable completions and the best of a list. Raises
    UserError as `ready_sft` does.
    """
    found = []
    for row in _ready(_labeled_row if rows == "labels" else _list_row, tokenizer, data, filters, held, drops,
                      quarantine):
        for i, (completion, score) in enumerate(zip(row.completions, row.scores, strict=True)):
            found.append({"row_id": f"{data.name}/{row.n}/{i}", "list_id": f"{data.name}/{row.n}", "source": data.name,
                          "prompt_tokens": row.prompt, "completion_tokens": completion.tokens,
                          "loss_mask": completion.loss_mask, "template": completion.template_mask, "score": score,
                          "desirable": score > 0 if rows == "labels" else None, "weight": data.weight,
                          "origin": data.name})
    return found


def check_ready(data: ReadyData, rows: str, who: str) -> None:
    """Raises UserError if the columns of the first row are not what `who` ("dpo.loss=kto", ...) learns from (pairs,
    labels or lists), or lack the margin that rpo needs. Malformed rows are left to the stage that reads them."""
    columns = next((row.data for row in read_rows(data.path) if row.data is not None), {})
    there = {c for c, value in columns.items() if value is not None and c not in data.ignore_columns}
    found = {"labels": "label" in there, "lists": "completions" in there, "pairs": {"chosen", "rejected"} <= there}
    if any(found.values()) and not found[rows] and not found["pairs"]:
        other = f", or set dpo.loss={'kto or bco' if found['labels'] else 'listwise'}" * who.startswith("dpo.loss")
        raise UserError(f"{data.path}: data.preferences {data.name} has the columns {', '.join(sorted(there))}, but "
                        f"{who} learns from {WANTED[rows]}; give such data{other}")
    if who == "dpo.loss=rpo" and found["pairs"] and "margin" not in there:
        raise UserError(f"{data.path}: data.preferences {data.name} has no column margin (how much better chosen is), "
                        "which dpo.loss=rpo needs; add it, or set another dpo.loss")


def _ready(encode: Callable, tokenizer, data: ReadyData, filters: Filter, held: HeldOut | None, drops: Drops,
           quarantine: Quarantine) -> list[Ready]:
    """The rows of a file that can be trained on; the others are dropped with the first reason that applies."""
    rows: dict[tuple, Ready] = {}  # by tokens
    for row in _encoded(encode, tokenizer, data, drops, quarantine):
        if rows.setdefault((tuple(row.prompt), *(tuple(c.tokens) for c in row.completions)), row) is not row:
            drops.add("duplicate", source=data.name, detail=row.where)
    if held is not None:
        held.survey(row.user_text for row in rows.values())
    fit = []
    for row in rows.values():
        reason, detail = _unfit(row, filters, held)
        if reason:
            drops.add(reason, source=data.name, detail=f"{row.where}: {detail}")
        else:
            fit.append(row)
    if not data.near_duplicates or not filters.near_duplicates:
        return fit
    gone = set()
    for scores in dict.fromkeys(row.scores if len(row.scores) == 1 else () for row in fit):  # labels are apart
        like = [row for row in fit if (row.scores if len(row.scores) == 1 else ()) == scores]
        texts = [(row.user_text, "\n\n".join(row.replies)) if row.scores else (row.user_text, *row.replies)
                 for row in like]
        for i, j, similarity in near_duplicates(texts, filters.near_duplicates):
            gone.add(like[i].n)
            drops.add("near_duplicate", source=data.name,
                      detail=f"{like[i].where}: {similarity:.2f} like {like[j].where}")
    return [row for row in fit if row.n not in gone]


def _unfit(row: Ready, filters: Filter, held: HeldOut | None) -> tuple[str, str]:
    """(reason, detail) why the row must be dropped, or empty strings."""
    if held is not None and (found := held.match(row.user_text)):
        return "contaminated", f"shares {found[1]!r} with held-out prompt {found[0]}"
    learned = row.learned
    if learned is None:
        return "", ""
    reason, detail = unfit_tokens([t for t, on in zip(learned.tokens, learned.loss_mask, strict=True) if on], filters)
    if reason:
        return reason, detail
    why = "" if filters.keep_truncated else truncation(row.replies[0])
    return ("truncated", why) if why else ("", "")


def _encoded(encode: Callable, tokenizer, data: ReadyData, drops: Drops, quarantine: Quarantine) -> Iterator[Ready]:
    missing = set(data.ignore_columns)
    for n, row in enumerate(read_rows(data.path), 1):
        try:
            if row.data is None:
                raise UserError(row.error)
            missing -= row.data.keys()
            columns = {k: v for k, v in row.data.items() if k not in data.ignore_columns}
            yield Ready(row.where, n, *encode(tokenizer, columns, data.name))
        except Unfit as e:
            reason, detail = e.args
            drops.add(reason, source=data.name, detail=f"{row.where}: {detail}")
        except UserError as e:
            quarantine.add(data.path, row.where, str(e), row.text or json.dumps(row.data, default=str)[:500])
            drops.add("malformed", source=data.name, detail=f"{row.where}: {e}")
    if missing:
        raise UserError(f"{data.path}: no row has the column {min(missing)!r} that ignore_columns of {data.name} "
                        "names; correct it")


def _sft_row(tokenizer, row: dict, name: str) -> tuple[list[int], tuple[Encoded], str, tuple[str]]:
    if row.get("messages") is not None:
        refuse_unread(row, ("messages", *TEMPLATE), name)
        kwargs, messages = template_kwargs(row), to_messages(row["messages"], "messages")
        _not_empty(messages, "messages")
        prompt, learned = chat.encode_conversation(tokenizer, messages, **kwargs)
        return prompt, (learned,), _user_text(messages), (_last(messages),)
    return _completion_row(tokenizer, row, name, "messages, or prompt and completion")


def _completion_row(tokenizer, row: dict, name: str, wanted: str) -> tuple[list[int], tuple[Encoded], str, tuple[str]]:
    prompt, completion = _columns(row, ("prompt", "completion"), wanted, name)
    if isinstance(prompt, str):
        if not completion.strip():
            raise Unfit("empty", "completion is empty")
        ids, learned = chat.encode_text(tokenizer, prompt, completion)
        return ids, (learned,), prompt, (completion,)
    kwargs = template_kwargs(row)
    _not_empty(completion, "completion")
    ids = chat.encode_prompt(tokenizer, prompt, **kwargs)
    learned = chat.encode_completion(tokenizer, prompt, completion, **kwargs)
    return ids, (learned,), _user_text([*prompt, *completion]), (_last(completion),)


def _pair_row(tokenizer, row: dict,
              name: str) -> tuple[list[int], tuple[Encoded, Encoded], str, tuple[str, str], float | None]:
    margin, row = _margin(row), {column: value for column, value in row.items() if column != "margin"}
    implicit = row.get("prompt") is None
    names = ("chosen", "rejected") if implicit else ("prompt", "chosen", "rejected")
    values = _columns(row, names, "prompt, chosen and rejected, or chosen and rejected that begin with the prompt",
                      name)
    prompt, chosen, rejected = _split_prompt(*values) if implicit else values
    if isinstance(prompt, str):
        if not chosen.strip() or not rejected.strip():
            raise Unfit("empty", f"{'rejected' if chosen.strip() else 'chosen'} is empty")
        ids, one = chat.encode_text(tokenizer, prompt, chosen)
        other = chat.encode_text(tokenizer, prompt, rejected)[1]
        user_text, replies = prompt, (chosen, rejected)
    else:
        kwargs = template_kwargs(row)
        _not_empty(chosen, "chosen")
        _not_empty(rejected, "rejected")
        ids = chat.encode_prompt(tokenizer, prompt, **kwargs)
        one, other = (chat.encode_completion(tokenizer, prompt, c, **kwargs) for c in (chosen, rejected))
        user_text, replies = _user_text([*prompt, *chosen]), (_last(chosen), _last(rejected))
    if one.tokens == other.tokens:
        raise Unfit("identical", "chosen equals rejected")
    return ids, (one, other), user_text, replies, margin


def _labeled_row(tokenizer, row: dict, name: str) -> tuple:
    if row.get("chosen") is not None:
        return *_pair_row(tokenizer, row, name)[:4], None, (1.0, 0.0)
    label = row.get("label")
    if not isinstance(label, bool) and label not in (0, 1):
        raise UserError(f"column 'label' must hold true (desirable) or false, is {label!r}"[:200])
    rest = {column: value for column, value in row.items() if column != "label"}
    return *_completion_row(tokenizer, rest, name, WANTED["labels"]), None, (float(label),)


def _list_row(tokenizer, row: dict, name: str) -> tuple:
    if row.get("chosen") is not None:
        return *_pair_row(tokenizer, row, name)[:4], None, (1.0, 0.0)
    completions, given = row.get("completions"), [c for c in ("scores", "ranks") if row.get(c) is not None]
    if len(given) != 1:
        raise UserError(f"give one of the columns 'scores' and 'ranks' (there are: {', '.join(row)})"[:200])
    values = row[given[0]]
    if not isinstance(completions, list) or not isinstance(values, list) or len(values) != len(completions):
        raise UserError(f"columns 'completions' and {given[0]!r} must hold lists of the same length")
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values):
        raise UserError(f"column {given[0]!r} must hold finite numbers, is {values!r}"[:200])
    if len(set(values)) < 2:
        raise Unfit("tie", f"{len(values)} completions with equal {given[0]}")
    scores = [float(v if given[0] == "scores" else -v) for v in values]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    rest = {column: value for column, value in row.items() if column not in ("completions", *given)}
    found = [_completion_row(tokenizer, rest | {"completion": completions[i]}, name, WANTED["lists"]) for i in order]
    return (found[0][0], tuple(one[1][0] for one in found), found[0][2], tuple(one[3][0] for one in found), None,
            tuple(scores[i] for i in order))


def _margin(row: dict) -> float | None:
    """How much better chosen is, if the row says."""
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f"column 'margin' must hold a finite number, is {margin!r}"[:200])
    return float(margin)


def _user_text(messages: list[dict]) -> str:
    return "\n".join(m["content"] for m in messages if m["role"] == "user")


def _last(messages: list[dict]) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")


def _columns(row: dict, names: tuple[str, ...], wanted: str, name: str) -> list:
    """Values of the named columns: all strings or all lists of messages. Other columns are refused."""
    missing = [column for column in names if row.get(column) is None]
    if missing:
        there = ", ".join(k for k, v in row.items() if v is not None) or "none"
        raise UserError(f"column {missing[0]!r} is missing (there are: {there}); give {wanted}")
    values = [row[column] for column in names]
    decoded = [from_text(value) for value in values]
    if all(isinstance(v, list) for v in decoded):
        values = decoded  # messages that are stored as text
    if all(isinstance(v, str) for v in values):
        refuse_unread(row, names, name)
        return values
    for column, value in zip(names, values, strict=True):
        if not isinstance(value, list):
            wanted = "a list of messages like the others" if isinstance(value, str) else "a string or messages"
            raise UserError(f"column {column!r} must hold {wanted}, is {kind(value)}")
    refuse_unread(row, (*names, *TEMPLATE), name)
    return [to_messages(value, column) for column, value in zip(names, values, strict=True)]


def _split_prompt(chosen: Any, rejected: Any) -> tuple:
    """(prompt, chosen, rejected): split after the common messages; strings at the last common white space, which goes
    to the completions."""
    if chosen == rejected:
        raise Unfit("identical", "chosen equals rejected")
    n = chat.common_prefix(chosen, rejected)
    if isinstance(chosen, list):
        if n == min(len(chosen), len(rejected)):
            raise Unfit("empty", "one of chosen and rejected is the beginning of the other")
        if n == 0:
            raise UserError("columns 'chosen' and 'rejected' do not begin with the same messages; add a column "
                             "'prompt'")
    else:
        while n and not (chosen[n:n + 1].isspace() and rejected[n:n + 1].isspace()):
            n -= 1
    return chosen[:n], chosen[n:], rejected[n:]


def _not_empty(messages: list[dict], name: str) -> None:
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and not m["content"].strip() and not m.get("tool_calls"):
            raise Unfit("empty", f"{name}[{i}].content is empty")
