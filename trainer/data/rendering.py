"""Messages to text through a chat template, and the check that the template leaves no part of them out."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError

from strop.trainer.data.columns import LINKS, blank
from strop.trainer.errors import UserError
from strop.trainer.run.bounds import bounded
from strop.trainer.run.files import reason_of

RENDERING = 3.0  # seconds of CPU time that a chat template may take; a usual one takes a millisecond
REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a message
REMEDY = "set model.chat_template to a Jinja file that keeps it"
# how messages end: complete, with the header of the next answer, or in an assistant message that goes on
WHOLE, OPEN, CONTINUED = "whole", "open", "continued"
_HOW = {WHOLE: {}, OPEN: {"add_generation_prompt": True}, CONTINUED: {"continue_final_message": True}}
_OWN = {"messages", "tools", "add_generation_prompt", "chat_template", "tokenize"}  # not for chat_template_kwargs


def render(tokenizer, messages: Sequence[dict], how: str, kwargs: dict) -> str:
    """The text of `messages`. Raises UserError if the template rejects them."""
    return apply_template(tokenizer, messages, kwargs, tokenize=False, **_HOW[how])


def apply_template(tokenizer, messages: Sequence[dict], kwargs: dict, **how):
    """tokenizer.apply_chat_template; tools' arguments are objects, or JSON text where the template wants text."""
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    try:
        return _bounded(tokenizer, messages, kwargs, how)
    except UserError:
        raise
    except Exception as e:  # a template can raise anything, e.g. ZeroDivisionError
        spelled = [_spell_arguments(m) for m in messages]
        if spelled != messages:
            with suppress(Exception):  # then the first error says what is wrong
                return _bounded(tokenizer, spelled, kwargs, how)
        raise UserError(f"the chat template refuses the messages (roles: {roles(messages)}): {reason_of(e)}; change "
                        "the messages or set model.chat_template") from e


def _bounded(tokenizer, messages: list[dict], kwargs: dict, how: dict):
    try:
        with bounded("the chat template", seconds=RENDERING):
            return tokenizer.apply_chat_template(messages, **kwargs, **how)
    except UserError as e:  # out of bounds
        raise UserError(f"{e}; set model.chat_template to another Jinja file") from e


def roles(messages: Sequence[dict]) -> str:
    return ", ".join(str(m.get("role")) for m in messages)


def _spell_arguments(message: dict) -> dict:
    def spell(call: dict) -> dict:
        found = {"arguments": json.dumps(call["arguments"], ensure_ascii=False)} if "arguments" in call else {}
        return call | found | ({"function": spell(call["function"])} if isinstance(call.get("function"), dict) else {})

    return message | {"tool_calls": [spell(call) for call in message["tool_calls"]]} if "tool_calls" in message \
        else message


def check_rendered(tokenizer, messages: Sequence[dict], how: str, kwargs: dict) -> None:
    """Raises UserError if the rendering is the same without the tools or a part of the messages, so that nobody would
    read it. Parts: contents, every other field, each tool call and its arguments."""
    without = {k: v for k, v in kwargs.items() if k != "tools"}
    if without != kwargs and render(tokenizer, messages, how, kwargs) == render(tokenizer, messages, how, without):
        raise UserError(f"the chat template leaves out the tools; remove the column 'tools', or {REMEDY}")
    plain = all(m.keys() <= {"role", "content"} for m in messages)
    if plain:
        shape = tuple((m["role"], bool(m["content"].strip())) for m in messages)
        lost = _unread_of_shape(tokenizer, tokenizer.get_chat_template(), shape, how, json.dumps(kwargs))
    else:
        lost = _unread_content(tokenizer, messages, how, kwargs)
    if lost is not None:
        raise _left_out("content", messages, lost)
    for i, name, without in () if plain else _variants(messages):
        if all(_same(tokenizer, messages[:n], without[:n], kwargs) for n in sorted({i + 1, len(messages)})):
            raise _left_out(name, messages, i)


def _left_out(part: str, messages: Sequence[dict], i: int) -> UserError:
    return UserError(f"the chat template leaves out {part} of message {i} ({messages[i]['role']}); remove it, or "
                     f"{REMEDY}")


def check_kwargs(tokenizer, kwargs: dict) -> None:
    """Raises UserError if the template does not read one of the keywords, before any of them is used."""
    names = _names(tokenizer.get_chat_template()) if kwargs else frozenset()
    for name in kwargs.keys() - {"tools"}:
        if name in _OWN or name not in names:
            raise UserError(f"chat_template_kwargs.{name}: the chat template reads no variable of this name; remove it")


@lru_cache(maxsize=16)
def _names(template: str) -> frozenset[str]:
    """The variables of a template: its names that are no attributes."""
    found, before = set(), ""
    try:
        for _, kind, text in Environment().lex(template):
            if kind == "name" and before != ".":
                found.add(text)
            before = before if kind == "whitespace" else text
    except TemplateSyntaxError:
        pass  # rendering says what is wrong
    return frozenset(found)


@lru_cache(maxsize=4096)
def _unread_of_shape(tokenizer, template: str, shape: tuple, how: str, kwargs: str) -> int | None:
    messages = [{"role": role, "content": "x" if says else ""} for role, says in shape]
    return _unread_content(tokenizer, messages, how, json.loads(kwargs))


def _unread_content(tokenizer, messages: Sequence[dict], how: str, kwargs: dict) -> int | None:
    """Index of the first message whose content is not in the rendering, seen by a word in its place."""
    words = {i: f"zq{i}qz" for i, m in enumerate(messages) if m["content"].strip()}
    text = render(tokenizer, [m | {"content": words[i]} if i in words else m for i, m in enumerate(messages)], how,
                  kwargs)
    return next((i for i, word in words.items() if word not in text), None)


def _variants(messages: Sequence[dict]) -> Iterator[tuple[int, str, list[dict]]]:
    """(index, name of a part, all messages without it)"""
    for i, m in enumerate(messages):
        parts = {key: {k: v for k, v in m.items() if k != key} for key in m
                 if key not in ("role", "content", *LINKS) and (key, m["role"]) != ("name", "tool")}
        calls = m.get("tool_calls", [])
        for j, call in enumerate(calls):
            if len(calls) > 1:
                parts[f"tool_calls[{j}]"] = m | {"tool_calls": calls[:j] + calls[j + 1:]}
            for path, inner in (("", call), (".function", call.get("function"))):
                if isinstance(inner, dict) and not blank(inner.get("arguments")):
                    changed = inner | {"arguments": {}}
                    other = changed if inner is call else call | {"function": changed}
                    parts[f"tool_calls[{j}]{path}.arguments"] = m | {"tool_calls": [*calls[:j], other, *calls[j + 1:]]}
        for name, without in parts.items():
            yield i, name, [*messages[:i], without, *messages[i + 1:]]


def _same(tokenizer, messages: Sequence[dict], without: Sequence[dict], kwargs: dict) -> bool:
    try:
        whole = render(tokenizer, messages, WHOLE, kwargs)
    except UserError:
        return True  # the messages up to a part may be no conversation; all of them are looked at too
    try:
        return whole == render(tokenizer, without, WHOLE, kwargs)
    except UserError:
        return False


# ---- special tokens that a text spells

# Special tokens spelled out in a message must not become control tokens, or a user's text could end a turn. During
# rendering each of them is one private-use character, starting here, which is then encoded as ordinary text.
PRIVATE = 0xF0000
_THOUGHT = re.compile(r"(?:<\|?|\[|◁)/?(?:begin_of_|end_of_|seed:)?(?:think(?:ing)?|thoughts?|reasoning|reflection)"
                      r"(?:\|?>|\]|▷)", re.I)


@lru_cache(maxsize=16)
def special_texts(tokenizer) -> tuple[str, ...]:
    """The special tokens of a tokenizer, the longest first."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return tuple(sorted(filter(str.strip, added | set(tokenizer.all_special_tokens)), key=lambda t: (-len(t), t)))


@lru_cache(maxsize=16)
def reasoning_ids(tokenizer) -> frozenset[int]:
    """Special tokens that begin or end reasoning: a part of what an assistant says."""
    return frozenset(tokenizer.convert_tokens_to_ids(t) for t in special_texts(tokenizer) if _THOUGHT.fullmatch(t))


@lru_cache(maxsize=16)
def _pattern(tokenizer) -> re.Pattern | None:
    texts = special_texts(tokenizer)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def mark(tokenizer, value, keep_reasoning: bool = False):
    """`value` (text, or messages and keywords of a template) with a private character in place of every special token
    that a text in it spells. What begins and ends reasoning stays in an assistant's message."""
    if isinstance(value, dict):
        keep = keep_reasoning or value.get("role") == "assistant"
        return {mark(tokenizer, k): mark(tokenizer, v, keep) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mark(tokenizer, v, keep_reasoning) for v in value]
    if not isinstance(value, str) or not (pattern := _pattern(tokenizer)) or not pattern.search(value):
        return value
    texts = special_texts(tokenizer)
    return pattern.sub(lambda found: found[0] if keep_reasoning and _THOUGHT.fullmatch(found[0])
                       else chr(PRIVATE + texts.index(found[0])), value)
