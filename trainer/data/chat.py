"""Chat templates, tokenisation and loss masks: messages or plain text in, token ids and masks out.

Masks are decided on token ids: a turn of the assistant begins where the tokens of the prompt end and ends at its
end-of-turn token. The tokens of a prompt never depend on what follows it, so chosen and rejected share the boundary,
and they are the tokens that sampling starts from.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from strop.trainer.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """A completion. The masks have one entry a token.

    `loss_mask` is True where the model learns: what the assistant writes, its end-of-turn token included.
    `template_mask` is True on tokens that are not the assistant's own text: end-of-turn tokens, headers that the
    template puts into the completion, and the turns of others in between.
    """

    tokens: list[int]
    loss_mask: list[bool]
    template_mask: list[bool]


def encode_prompt(tokenizer, messages: Sequence[dict], **template_kwargs) -> list[int]:
    """Token ids of `messages` with the header of the assistant's turn open; a final assistant message is continued.

    Special tokens spelt out in a message are encoded as text. Raises UserError if the template refuses the messages.
    """
    return _ids(tokenizer, _mark(tokenizer, messages), True, template_kwargs)


def encode_completion(tokenizer, messages_prefix: Sequence[dict], completion_messages: Sequence[dict],
                      **template_kwargs) -> Encoded:
    """What follows `encode_prompt(tokenizer, messages_prefix)` when the assistant says `completion_messages`.

    Ends with the end-of-turn token of the last assistant message. Raises UserError if the template refuses the
    messages or leaves out part of the last assistant message, or if the completion does not begin with the assistant.
    """
    return _encode(tokenizer, [*messages_prefix, *completion_messages], len(messages_prefix), template_kwargs)[1]


def encode_conversation(tokenizer, messages: Sequence[dict], **template_kwargs) -> tuple[list[int], Encoded]:
    """Splits before the first assistant message: (prompt tokens, the rest), with loss on assistant turns only.

    Messages after the last assistant message are left out. Raises UserError if there is no assistant message.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), None)
    if first is None:
        raise UserError("the conversation has no assistant message to learn from")
    return _encode(tokenizer, messages, first, template_kwargs)


def encode_text(tokenizer, prompt: str, completion: str) -> tuple[list[int], Encoded]:
    """Plain text, without a template: (prompt tokens, completion), the end-of-sequence token learned."""
    eos = tokenizer.eos_token
    if eos and not completion.endswith(eos):
        completion += eos
    ids, full = _plain(tokenizer, prompt), _plain(tokenizer, prompt + completion)
    if eos and full[-1:] != [tokenizer.eos_token_id]:  # _plain takes an end token off that the text does not hold
        full.append(tokenizer.eos_token_id)
    tokens = full[len(ids):] if full[:len(ids)] == ids else _piece(tokenizer, completion)
    ends = [i == len(tokens) - 1 and t == tokenizer.eos_token_id for i, t in enumerate(tokens)]
    return ids, Encoded(tokens, [True] * len(tokens), ends)


def stop_ids(tokenizer, model_dir: str | Path) -> set[int]:
    """Tokens that end a completion: those of generation_config.json (else config.json), the template's end of turn."""
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
    opening: tuple[int, ...]  # what the template puts before the assistant's text and after the generation prompt
    ends: frozenset[int]  # the end-of-turn tokens that the template and the tokenizer know


def _turn(tokenizer) -> _Turn:
    return _find_turn(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=16)
def _find_turn(tokenizer, template: str) -> _Turn:
    """Renders two answers and compares: what they share at the front is the template's, the first control token behind
    the text is the end of turn."""
    user = [{"role": "user", "content": "?"}]
    prompt = _ids(tokenizer, user, True, {})
    one, two = (_extend(tokenizer, prompt, user, True, [*user, {"role": "assistant", "content": text}], False, {})
                [len(prompt):] for text in ("7", "x"))
    opening = _common(one, two)
    control = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    end = next((t for t in one[opening:] if t in control), None)
    ends = {t for t in (end, tokenizer.eos_token_id) if t is not None}
    return _Turn(tuple(one[:opening]), frozenset(ends))


def _encode(tokenizer, messages: Sequence[dict], first: int, kwargs: dict) -> tuple[list[int], Encoded]:
    turns = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
    if not turns or turns[0] != first:
        raise UserError("a completion must begin with an assistant message")
    turn, messages = _turn(tokenizer), _mark(tokenizer, messages)
    ids = prompt = _ids(tokenizer, messages[:first], True, kwargs) if first else []
    spans = []  # (begin, end, has loss): the assistant's turns in `ids`
    for i, after in zip(turns, [*turns[1:], None], strict=True):
        begin, is_open = len(ids), after is not None
        upto = messages[:after] if is_open else messages[:i + 1]
        whole = _extend(tokenizer, ids, messages[:i], True, upto, is_open, kwargs)
        end = next((n + 1 for n in range(begin, len(whole)) if whole[n] in turn.ends), None)
        if end is None:  # a template without an end of turn: the turn ends where its own rendering ends
            ids = _extend(tokenizer, ids, messages[:i], True, messages[:i + 1], False, kwargs)
            end = len(ids)
            if is_open:
                whole = _extend(tokenizer, ids, messages[:i + 1], False, upto, True, kwargs)
            elif tokenizer.eos_token_id is not None:
                whole, end = [*ids, tokenizer.eos_token_id], end + 1
        kept = _keeps(_text(tokenizer, upto, is_open, kwargs), messages[i].get("content"))
        if not kept and not is_open:
            raise UserError("the chat template leaves out part of the assistant's text (reasoning?); set "
                             "model.chat_template to a Jinja file that keeps it")
        spans.append((begin, end, kept))
        ids = whole
    ids = ids[:spans[-1][1]]  # nothing behind the last end of turn is ever generated
    loss, template = [False] * len(ids), [True] * len(ids)
    for begin, end, kept in spans:
        head = len(turn.opening) if tuple(ids[begin:begin + len(turn.opening)]) == turn.opening else 0
        tail = 1 if ids[end - 1] in turn.ends else 0
        loss[begin:end] = [kept] * (end - begin)
        template[begin + head:end - tail] = [False] * (end - tail - begin - head)
    loss = _generation_mask(tokenizer, messages[:turns[-1] + 1], ids, spans, kwargs) or loss
    n = len(prompt)
    return prompt, Encoded(ids[n:], loss[n:], template[n:])


def _generation_mask(tokenizer, messages, ids, spans, kwargs) -> list[bool] | None:
    """The loss mask that the template's `{% generation %}` blocks give, with the end of turn behind a block learned.

    None where the template has no such block, or where the tokens are not those of one joint rendering."""
    if "generation %}" not in tokenizer.get_chat_template().replace("generation -%}", "generation %}"):
        return None
    out = _apply(tokenizer, messages, kwargs, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                 tokenizer_kwargs={"return_offsets_mapping": True})
    inside = {c for span, on in zip(out["offset_mapping"], out["assistant_masks"], strict=True) if on
              for c in range(*span)}
    # by characters, since special tokens that a message spells out are other tokens there than here
    tokens, spots = _located(tokenizer, _text(tokenizer, messages, False, kwargs))
    skipped = len(tokens) - len(_one_bos(tokenizer, tokens))
    if tokens[skipped:skipped + len(ids)] != ids:
        return None
    mask = [not inside.isdisjoint(range(*span)) for span in spots[skipped:skipped + len(ids)]]
    for begin, end, _ in spans:
        if end - 2 >= begin and mask[end - 2]:
            mask[end - 1] = True
    return mask if any(mask[spans[0][0]:]) else None


def _extend(tokenizer, ids: list[int], before, before_open: bool, after, after_open: bool, kwargs: dict) -> list[int]:
    """Token ids of `after` such that `ids`, those of `before`, are their prefix."""
    new = _ids(tokenizer, after, after_open, kwargs)
    if new[:len(ids)] == ids:
        return new
    old_text = _text(tokenizer, before, before_open, kwargs) if before else ""
    new_text = _text(tokenizer, after, after_open, kwargs)
    if new_text.startswith(old_text):  # the tokenizer merged over the boundary: encode what follows on its own
        return ids + _piece(tokenizer, new_text[len(old_text):])
    common = _common(ids, new)
    if common < len(_ids(tokenizer, before, False, kwargs)):
        raise UserError("the chat template renders earlier messages differently once an answer follows; set "
                         "model.chat_template to a Jinja file that does not")
    return ids + new[common:]  # only the open header differs (a thinking block): it stays as sampling sees it


def _piece(tokenizer, text: str) -> list[int]:
    """Token ids of text that continues other tokens: no special tokens, no space put before it."""
    for anchor, i in ((tokenizer.eos_token, tokenizer.eos_token_id), (tokenizer.bos_token, tokenizer.bos_token_id)):
        added = tokenizer.added_tokens_decoder.get(i)
        if anchor and added is not None and not added.rstrip:
            ids = _tokens(tokenizer, anchor + text)
            if ids[:1] == [i]:
                return ids[1:]
    return _tokens(tokenizer, text)


def _plain(tokenizer, text: str) -> list[int]:
    """Token ids of plain text with the special tokens the tokenizer puts in front, once, and none behind."""
    ids = tokenizer(text)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return _one_bos(tokenizer, ids)


def _one_bos(tokenizer, ids: list[int]) -> list[int]:
    while len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def _ids(tokenizer, messages: Sequence[dict], is_open: bool, kwargs: dict) -> list[int]:
    if not messages:
        raise UserError("a prompt needs at least one message")
    return _one_bos(tokenizer, _tokens(tokenizer, _text(tokenizer, messages, is_open, kwargs)))


def _text(tokenizer, messages: Sequence[dict], is_open: bool, kwargs: dict) -> str:
    how = {"add_generation_prompt": is_open}
    if is_open and messages[-1]["role"] == "assistant":
        how = {"continue_final_message": True}
    return _apply(tokenizer, messages, kwargs, tokenize=False, **how)


def _apply(tokenizer, messages: Sequence[dict], kwargs: dict, **how):
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    try:
        return tokenizer.apply_chat_template(messages, **kwargs, **how)
    except Exception as e:  # a template is a program: it may divide by zero
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        roles = ", ".join(str(m.get("role")) for m in messages)
        raise UserError(f"the chat template refuses the messages (roles: {roles}): {reason}; change the messages or "
                         "set model.chat_template") from e


# Special tokens that a message spells out must not become control tokens, or a user's text could end a turn. While a
# chat is rendered each of them is one private character, which no template writes and every tokenizer can be kept from.

PRIVATE = 0xF0000


@lru_cache(maxsize=16)
def _special(tokenizer) -> tuple[tuple[str, ...], re.Pattern | None]:
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    texts = added | set(tokenizer.all_special_tokens)
    ordered = tuple(sorted(filter(str.strip, texts), key=lambda t: (-len(t), t)))
    return ordered, re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _mark(tokenizer, messages: Sequence[dict]) -> Sequence[dict]:
    texts, pattern = _special(tokenizer)
    if pattern is None or not any(isinstance(m.get("content"), str) and pattern.search(m["content"]) for m in messages):
        return messages
    return [{**m, "content": pattern.sub(lambda found: chr(PRIVATE + texts.index(found[0])), m["content"])}
            if isinstance(m.get("content"), str) else m for m in messages]


def _tokens(tokenizer, text: str) -> list[int]:
    """Token ids of rendered text; a private character is the spelling of its special token, as ordinary text."""
    return [i for part, spelt, _ in _parts(tokenizer, text)
            for i in tokenizer(part, add_special_tokens=False, **spelt)["input_ids"]]


def _located(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """`_tokens` with each token's characters in `text`; those of a spelt special token are its private character."""
    ids, spots = [], []
    for part, spelt, at in _parts(tokenizer, text):
        out = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, **spelt)
        ids += out["input_ids"]
        spots += [(at, at + 1) if spelt else (at + a, at + b) for a, b in out["offset_mapping"]]
    return ids, spots


def _parts(tokenizer, text: str) -> list[tuple[str, dict, int]]:
    """(text to encode, how if it is a spelt special token, where it stands)"""
    texts, parts, at = _special(tokenizer)[0], [], 0
    for part in re.split(f"([{chr(PRIVATE)}-{chr(PRIVATE + len(texts))}])", text):
        if len(part) == 1 and PRIVATE <= ord(part) < PRIVATE + len(texts):
            parts.append((texts[ord(part) - PRIVATE], {"split_special_tokens": True}, at))
        elif part:
            parts.append((part, {}, at))
        at += len(part)
    return parts


def _keeps(text: str, content) -> bool:
    return not isinstance(content, str) or "".join(content.split()) in "".join(text.split())


def _common(a: Iterable[int], b: Iterable[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def prompt_tokens(tokenizer, row: dict) -> list[int]:
    """Token ids of a row of prompts.parquet. Raises UserError, naming the prompt, if the chat template refuses it."""
    try:
        return encode_prompt(tokenizer, row["messages"])
    except UserError as e:
        raise UserError(f"prompt {row['prompt_id']} of source {row['source']}: {e}") from e
