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

from strop.trainer.errors import UserError
from strop.trainer.run.bounds import bounded
from strop.trainer.run.files import reason_of

RENDERING = 3.0  # seconds of CPU time that a chat template may take; a usual one takes a millisecond


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
    spelled out in a message are encoded as text. Raises UserError if the template rejects the messages."""
    return _ids(tokenizer, _mark(tokenizer, messages), True, template_kwargs)


def encode_completion(tokenizer, messages_prefix: Sequence[dict], completion_messages: Sequence[dict],
                      **template_kwargs) -> Encoded:
    """`completion_messages` as they follow `encode_prompt(tokenizer, messages_prefix)`.

    Ends with the end-of-turn token of the last assistant message. Raises UserError if the template rejects the messages
    or drops part of the last assistant message, or if the completion does not begin with an assistant message.
    """
    return _encode(tokenizer, [*messages_prefix, *completion_messages], len(messages_prefix), template_kwargs)[1]


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
    prompt = _ids(tokenizer, user, True, {})
    one, two = (_extend(tokenizer, prompt, user, True, [*user, {"role": "assistant", "content": text}], False, {})
                [len(prompt):] for text in ("7", "x"))
    opening = common_prefix(one, two)
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
    for i, after in zip_longest(turns, turns[1:]):
        begin, is_open = len(ids), after is not None
        upto = messages[:after] if is_open else messages[:i + 1]
        whole = _extend(tokenizer, ids, messages[:i], True, upto, is_open, kwargs)
        end = next((n + 1 for n in range(begin, len(whole)) if whole[n] in turn.ends), None)
        if end is None:  # a template without an end of turn: the turn ends where its rendering ends
            ids = _extend(tokenizer, ids, messages[:i], True, messages[:i + 1], False, kwargs)
            end = len(ids)
            if is_open:
                whole = _extend(tokenizer, ids, messages[:i + 1], False, upto, True, kwargs)
            elif tokenizer.eos_token_id is not None:
                whole, end = [*ids, tokenizer.eos_token_id], end + 1
        kept = _keeps(_text(tokenizer, upto, is_open, kwargs), messages[i].get("content"))
        if not kept and not is_open:
            raise UserError("the chat template drops part of the assistant's text (reasoning?); set "
                             "model.chat_template to a Jinja file that keeps it")
        spans.append((begin, end, kept))
        ids = whole
    ids = ids[:spans[-1][1]]  # nothing is ever generated after the last end of turn
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
    """The loss mask from the template's `{% generation %}` blocks, with loss on the end of turn after a block.

    None if the template has no such block, or if the tokens differ from those of one joint rendering."""
    if "generation %}" not in tokenizer.get_chat_template().replace("generation -%}", "generation %}"):
        return None
    out = _apply(tokenizer, messages, kwargs, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                 tokenizer_kwargs={"return_offsets_mapping": True})
    inside = {c for span, on in zip(out["offset_mapping"], out["assistant_masks"], strict=True) if on
              for c in range(*span)}
    # compare characters, since special tokens spelled out in a message are tokenized differently there
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
    """Token ids of `after` that begin with `ids`, the token ids of `before`."""
    new = _ids(tokenizer, after, after_open, kwargs)
    if new[:len(ids)] == ids:
        return new
    old_text = _text(tokenizer, before, before_open, kwargs) if before else ""
    new_text = _text(tokenizer, after, after_open, kwargs)
    if new_text.startswith(old_text):  # the tokenizer merged over the boundary: encode the rest separately
        return ids + _piece(tokenizer, new_text[len(old_text):])
    common = common_prefix(ids, new)
    if common < len(_ids(tokenizer, before, False, kwargs)):
        raise UserError("the chat template renders earlier messages differently once an answer follows; set "
                         "model.chat_template to a Jinja file that does not")
    return ids + new[common:]  # only the generation prompt differs (a thinking block): keep it as sampling sees it


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


def _ids(tokenizer, messages: Sequence[dict], is_open: bool, kwargs: dict) -> list[int]:
    if not messages:
        raise UserError("a prompt needs at least one message")
    ids = _one_bos(tokenizer, _tokens(tokenizer, _text(tokenizer, messages, is_open, kwargs)))
    if not ids:
        raise UserError(f"the chat template renders nothing (roles: {_roles(messages)}); set model.chat_template")
    return ids


def _text(tokenizer, messages: Sequence[dict], is_open: bool, kwargs: dict) -> str:
    how = {"add_generation_prompt": is_open}
    if is_open and messages[-1]["role"] == "assistant":
        how = {"continue_final_message": True}
    return _apply(tokenizer, messages, kwargs, tokenize=False, **how)


def _apply(tokenizer, messages: Sequence[dict], kwargs: dict, **how):
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    try:
        with bounded("the chat template", seconds=RENDERING):
            return tokenizer.apply_chat_template(messages, **kwargs, **how)
    except UserError as e:  # out of bounds
        raise UserError(f"{e}; set model.chat_template to another Jinja file") from e
    except Exception as e:  # a template can raise anything, e.g. ZeroDivisionError
        raise UserError(f"the chat template refuses the messages (roles: {_roles(messages)}): {reason_of(e)}; change "
                        "the messages or set model.chat_template") from e


def _roles(messages: Sequence[dict]) -> str:
    return ", ".join(str(m.get("role")) for m in messages)


# Special tokens spelled out in a message must not become control tokens, or a user's text could end a turn. During
# rendering each of them is one private-use character, starting here, which is then encoded as ordinary text.
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


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def prompt_tokens(tokenizer, row: dict) -> list[int]:
    """Token ids of a row of prompts.parquet. Raises UserError, naming the prompt, if the template rejects it."""
    try:
        return encode_prompt(tokenizer, row["messages"])
    except UserError as e:
        raise UserError(f"prompt {row['prompt_id']} of source {row['source']}: {e}") from e
