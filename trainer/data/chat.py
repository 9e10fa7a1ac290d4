"""Chat templates, tokenization and loss masks: messages or plain text in, token ids and masks out.

Masks are computed on token ids: an assistant turn begins where the prompt's tokens end and ends at its end-of-turn
token. A prompt's tokens never depend on what follows, so chosen and rejected share the boundary, and sampling starts
from the same tokens.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile, zip_longest
from pathlib import Path

from strop.trainer.data.rendering import (
    CONTINUED,
    OPEN,
    PRIVATE,
    REASONING,
    REMEDY,
    WHOLE,
    apply_template,
    check_kwargs,
    check_rendered,
    mark,
    reasoning_ids,
    render,
    roles,
    special_texts,
)
from strop.trainer.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """A completion, with masks of one entry per token.

    loss_mask: True on tokens with loss: the assistant's text and its end-of-turn tokens. template_mask: True on tokens
    that are not the assistant's text: end-of-turn tokens, headers from the template, and other roles' turns.
    """

    tokens: list[int]
    loss_mask: list[bool]
    template_mask: list[bool]


def encode_prompt(tokenizer, messages: Sequence[dict], **template_kwargs) -> list[int]:
    """Token ids of `messages` with the generation prompt; a final assistant message is continued. Special tokens
    spelled out in a message are encoded as text. Raises UserError if the template rejects the messages or leaves a
    part of them out."""
    check_kwargs(tokenizer, template_kwargs)
    messages, kwargs = mark(tokenizer, messages), mark(tokenizer, template_kwargs)
    how = CONTINUED if messages and messages[-1]["role"] == "assistant" else OPEN
    ids = _ids(tokenizer, messages, how, kwargs)
    check_rendered(tokenizer, messages, WHOLE if how == CONTINUED else OPEN, kwargs)
    return ids


def encode_messages(tokenizer, messages: Sequence[dict]) -> list[int]:
    """Token ids of a whole conversation as the template renders it. Special tokens spelled out in a message are encoded
    as text. Raises UserError if the template rejects the messages."""
    return _ids(tokenizer, mark(tokenizer, messages), WHOLE, {})


def encode_completion(tokenizer, messages_prefix: Sequence[dict], completion_messages: Sequence[dict],
                      **template_kwargs) -> Encoded:
    """`completion_messages` as they follow `encode_prompt(tokenizer, messages_prefix)`. If that ends with an assistant
    message, the first of them goes on with it.

    Ends with the end-of-turn token of the last assistant message. Raises UserError if the template rejects the messages
    or drops part of them, or if the completion does not begin with an assistant message.
    """
    *before, last = messages_prefix
    first, *rest = completion_messages
    if last["role"] != "assistant" or first["role"] != "assistant":
        prompt, found = _encode(tokenizer, [*messages_prefix, *completion_messages], len(messages_prefix),
                                template_kwargs)
    else:
        if more := sorted((last.keys() | first.keys()) - {"role", "content"}):
            raise UserError(f"the prompt ends with the beginning of an answer, which cannot have {more[0]}; remove it")
        joined = first | {"content": last["content"] + first["content"]}
        prompt, found = _encode(tokenizer, [*before, joined, *rest], len(before), template_kwargs, messages_prefix)
    if len(prompt) < len(encode_prompt(tokenizer, messages_prefix, **template_kwargs)):
        raise UserError("the chat template opens an answer with more than it keeps of one that others follow, so the "
                        "completion must be one answer; write the row as messages instead")
    return found


def encode_conversation(tokenizer, messages: Sequence[dict], **template_kwargs) -> tuple[list[int], Encoded]:
    """(prompt tokens, completion), split before the first assistant message, with loss on assistant turns only.
    Messages after the last assistant message are dropped. Raises UserError if there is no assistant message."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
    if first is None:
        raise UserError("the conversation has no assistant message to learn from")
    return _encode(tokenizer, messages, first, template_kwargs)


def encode_text(tokenizer, prompt: str, completion: str) -> tuple[list[int], Encoded]:
    """(prompt tokens, completion) of plain text without a template, with loss on the end-of-sequence token."""
    eos = tokenizer.eos_token
    if eos and not completion.endswith(eos):
        completion += eos
    ids, full = _plain(tokenizer, prompt), _plain(tokenizer, prompt + completion)
    if eos and full[-1:] != [tokenizer.eos_token_id]:  # _plain removes an end token that is not in the text
        full.append(tokenizer.eos_token_id)
    tokens = full[len(ids):] if full[:len(ids)] == ids else _piece(tokenizer, completion)
    ends = [i == len(tokens) - 1 and t == tokenizer.eos_token_id for i, t in enumerate(tokens)]
    return ids, Encoded(tokens, [True] * len(tokens), ends)


def stop_ids(tokenizer, model_dir: str | Path) -> set[int]:
    """Tokens that end a completion: eos_token_id of generation_config.json (else config.json) and of the tokenizer, and
    the template's end of turn. Raises UserError if there are none."""
    found = {tokenizer.eos_token_id, *_turn(tokenizer).ends}
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        if path.exists():
            try:
                ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as e:
                raise UserError(f"{path}: not readable as a JSON object ({e})") from e
            if ids is not None:
                found |= set(ids) if isinstance(ids, list) else {ids}
                break
    found.discard(None)
    if not found:
        raise UserError(f"{model_dir}: neither its tokenizer nor its generation_config.json names an end token "
                         "(eos_token_id), so no completion would ever stop")
    return found


@dataclass(frozen=True)
class _Turn:
    opening: tuple[int, ...]  # template tokens between the generation prompt and the assistant's text
    ends: frozenset[int]  # end-of-turn tokens of the template and the tokenizer


def _turn(tokenizer) -> _Turn:
    return _find_turn(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=16)
def _find_turn(tokenizer, template: str) -> _Turn:
    """Renders two answers: their common prefix belongs to the template, and the first control token after it is the end
    of turn."""
    user = [{"role": "user", "content": "?"}]
    prompt = _ids(tokenizer, user, OPEN, {})
    one, two = (_extend(tokenizer, prompt, user, OPEN, [*user, {"role": "assistant", "content": text}], WHOLE, {})
                [len(prompt):] for text in ("7", "x"))
    opening = common_prefix(one, two)
    control = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    end = next((t for t in one[opening:] if t in control), None)
    ends = {t for t in (end, tokenizer.eos_token_id) if t is not None}
    return _Turn(tuple(one[:opening]), frozenset(ends))


def _encode(tokenizer, messages: Sequence[dict], first: int, kwargs: dict,
            begun: Sequence[dict] | None = None) -> tuple[list[int], Encoded]:
    """begun: messages that end with the beginning of the first answer, messages[first], where the prompt has it."""
    turns = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
    if not turns or turns[0] != first:
        raise UserError("a completion must begin with an assistant message")
    check_kwargs(tokenizer, kwargs)
    turn, messages, kwargs = _turn(tokenizer), mark(tokenizer, messages[:turns[-1] + 1]), mark(tokenizer, kwargs)
    opening = (mark(tokenizer, begun), CONTINUED) if begun else (messages[:first], OPEN)
    ids = prompt = _ids(tokenizer, *opening, kwargs) if first or begun else []
    check_rendered(tokenizer, messages, WHOLE, kwargs)
    spans = []  # (begin, end, has loss): the assistant's turns in `ids`
    for i, after in zip_longest(turns, turns[1:]):
        before = opening if i == first else (messages[:i], OPEN)
        upto, how = (messages[:i + 1], WHOLE) if after is None else (messages[:after], OPEN)
        whole = _extend(tokenizer, ids, *before, upto, how, kwargs)
        begin = common_prefix(ids, whole)  # less than all of `ids` where the finished turn's header differs
        end = next((n + 1 for n in range(begin, len(whole)) if whole[n] in turn.ends), None)
        if end is None:  # a template without an end of turn: the turn ends where its rendering ends
            ids = _extend(tokenizer, ids, *before, messages[:i + 1], WHOLE, kwargs)
            end = len(ids)
            if after is not None:
                whole = _extend(tokenizer, ids, messages[:i + 1], WHOLE, upto, OPEN, kwargs)
            elif tokenizer.eos_token_id is not None:
                whole, end = [*ids, tokenizer.eos_token_id], end + 1
        text = render(tokenizer, upto, how, kwargs)
        kept = all(_keeps(text, messages[i].get(field)) for field in ("content", *REASONING))
        if not kept and after is None:
            raise UserError(f"the chat template drops part of the assistant's text (reasoning?); {REMEDY}")
        spans.append((begin, end, kept))
        prompt, ids = prompt[:begin], whole
    ids = ids[:spans[-1][1]]  # nothing is ever generated after the last end of turn
    loss, template = [False] * len(ids), [True] * len(ids)
    for begin, end, kept in spans:
        head = len(turn.opening) if tuple(ids[begin:begin + len(turn.opening)]) == turn.opening else 0
        tail = 1 if ids[end - 1] in turn.ends else 0
        loss[begin:end] = [kept] * (end - begin)
        template[begin + head:end - tail] = [False] * (end - tail - begin - head)
    loss = _generation_mask(tokenizer, messages, ids, spans, kwargs) or loss
    n = len(prompt)
    return prompt, Encoded(ids[n:], loss[n:], template[n:])


def _generation_mask(tokenizer, messages, ids, spans, kwargs) -> list[bool] | None:
    """The loss mask from the template's `{% generation %}` blocks, with loss on the end of turn after a block.

    None if the template has no such block, or if the tokens differ from those of one joint rendering."""
    if "generation %}" not in tokenizer.get_chat_template().replace("generation -%}", "generation %}"):
        return None
    out = apply_template(tokenizer, messages, kwargs, tokenize=True, return_dict=True,
                         return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True})
    inside = {c for span, on in zip(out["offset_mapping"], out["assistant_masks"], strict=True) if on
              for c in range(*span)}
    # compare characters, since special tokens spelled out in a message are tokenized differently there
    tokens, spots = _located(tokenizer, render(tokenizer, messages, WHOLE, kwargs))
    skipped = len(tokens) - len(_one_bos(tokenizer, tokens))
    if tokens[skipped:skipped + len(ids)] != ids:
        return None
    mask = [not inside.isdisjoint(range(*span)) for span in spots[skipped:skipped + len(ids)]]
    for begin, end, _ in spans:
        if end - 2 >= begin and mask[end - 2]:
            mask[end - 1] = True
    return mask if any(mask[spans[0][0]:]) else None


def _extend(tokenizer, ids: list[int], before, how_before: str, after, how: str, kwargs: dict) -> list[int]:
    """Token ids of `after` that begin with `ids`, the token ids of `before`; but for the header of an answer if other
    turns follow that one, and the template opens it otherwise then."""
    new = _ids(tokenizer, after, how, kwargs)
    if new[:len(ids)] == ids:
        return new
    old_text = render(tokenizer, before, how_before, kwargs) if before else ""
    new_text = render(tokenizer, after, how, kwargs)
    if new_text.startswith(old_text):  # the tokenizer merged over the boundary: encode the rest separately
        return ids + _piece(tokenizer, new_text[len(old_text):])
    common = common_prefix(ids, new)
    if not before or how_before == CONTINUED or common < len(_ids(tokenizer, before, WHOLE, kwargs)):
        raise UserError("the chat template renders earlier messages differently once an answer follows; set "
                         "model.chat_template to a Jinja file that does not")
    # only the generation prompt differs (a thinking block): the last answer follows it as in sampling
    return new if how == OPEN else ids + new[common:]


def _piece(tokenizer, text: str) -> list[int]:
    """Token ids of text that continues other tokens: no special tokens, no prefix space."""
    for anchor, i in ((tokenizer.eos_token, tokenizer.eos_token_id), (tokenizer.bos_token, tokenizer.bos_token_id)):
        added = tokenizer.added_tokens_decoder.get(i)
        if anchor and added is not None and not added.rstrip:
            ids = _tokens(tokenizer, anchor + text)
            if ids[:1] == [i]:
                return ids[1:]
    return _tokens(tokenizer, text)


def _plain(tokenizer, text: str) -> list[int]:
    """Token ids of plain text with the tokenizer's leading special tokens, once, and no trailing ones."""
    ids = tokenizer(text)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return _one_bos(tokenizer, ids)


def _one_bos(tokenizer, ids: list[int]) -> list[int]:
    while len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def _ids(tokenizer, messages: Sequence[dict], how: str, kwargs: dict) -> list[int]:
    if not messages:
        raise UserError("a prompt needs at least one message")
    ids = _one_bos(tokenizer, _tokens(tokenizer, render(tokenizer, messages, how, kwargs)))
    if not ids:
        raise UserError(f"the chat template renders nothing (roles: {roles(messages)}); set model.chat_template")
    return ids


def _tokens(tokenizer, text: str) -> list[int]:
    """Token ids of rendered text; a private character stands for the text of its special token."""
    return [i for part, kwargs, _ in _parts(tokenizer, text)
            for i in tokenizer(part, add_special_tokens=False, **kwargs)["input_ids"]]


def _located(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """`_tokens` with each token's character span in `text`."""
    ids, spots = [], []
    for part, kwargs, at in _parts(tokenizer, text):
        out = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, **kwargs)
        ids += out["input_ids"]
        spots += [(at, at + 1) if kwargs else (at + a, at + b) for a, b in out["offset_mapping"]]
    return ids, spots


def _parts(tokenizer, text: str) -> list[tuple[str, dict, int]]:
    """(text to encode, tokenizer keywords if it is a spelled-out special token, position)"""
    texts, parts, at = special_texts(tokenizer), [], 0
    for part in re.split(f"([{chr(PRIVATE)}-{chr(PRIVATE + len(texts))}])", text):
        if len(part) == 1 and PRIVATE <= ord(part) < PRIVATE + len(texts):
            parts.append((texts[ord(part) - PRIVATE], {"split_special_tokens": True}, at))
        elif part:
            parts.append((part, {}, at))
        at += len(part)
    return parts


def _keeps(text: str, content) -> bool:
    return not isinstance(content, str) or "".join(content.split()) in "".join(text.split())


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def prompt_tokens(tokenizer, row: dict) -> list[int]:
    """Token ids of a row of prompts.parquet. Raises UserError, naming the prompt, if the template rejects it."""
    try:
        return encode_prompt(tokenizer, row["messages"], **json.loads(row.get("template_kwargs") or "{}"))
    except UserError as e:
        raise UserError(f"prompt {row['prompt_id']} of source {row['source']}: {e}") from e


def completion_text(tokenizer, tokens: Sequence[int]) -> str:
    """The text of a completion without special tokens, other than those around its reasoning, which is no answer."""
    kept = reasoning_ids(tokenizer)
    if kept.isdisjoint(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True)
    special = set(tokenizer.convert_tokens_to_ids(list(special_texts(tokenizer)))) - kept
    return tokenizer.decode([t for t in tokens if t not in special])
