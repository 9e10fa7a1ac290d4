"""The columns and message fields of a user's rows: which are read, and in which forms they are stored."""

import json
import re
from collections.abc import Collection
from typing import Any

from strop.trainer.data.rows import kind
from strop.trainer.errors import UserError

TEMPLATE = ("tools", "chat_template_kwargs")  # what a chat template takes beside the messages
# columns of prompts that trainers give a meaning, so that they are no metadata
MEANT = ("messages", "conversations", "conversation", "completion", "chosen", "rejected", "system", "system_prompt",
         "documents", "image", "images", "video", "videos", "audio", "audios", "weight", "train", "loss", "loss_mask")
LINKS = ("tool_call_id", "id", "type")  # they say what belongs together; many templates go by the order instead
_ROLE = re.compile(r"[A-Za-z][\w-]*")


def blank(value: Any) -> bool:
    """Whether a value says nothing, as stored rows have it where a field is absent."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def refuse_unread(row: dict, known: Collection[str], name: str) -> None:
    """Raises UserError if a column of `row` holds something and is not among the known ones. name: of the data."""
    for column, value in row.items():
        if column not in known and not blank(value):
            raise UserError(f"column {column!r} is not read (columns that are: {', '.join(known)}); remove it, or add "
                            f"it to ignore_columns of {name}")


def template_kwargs(row: dict) -> dict:
    """Template keywords from TRL's columns `tools` and `chat_template_kwargs`, objects or JSON text."""
    tools, extra = (_parsed(row.get(column), f"column {column!r}") for column in TEMPLATE)
    if not isinstance(extra, dict | None):
        raise UserError(f"column 'chat_template_kwargs' must hold an object, is {kind(extra)}")
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise UserError(f"column 'tools' must hold a list of objects, is {kind(tools)}")
    return ({"tools": tools} if tools else {}) | {k: v for k, v in (extra or {}).items() if v is not None}


def from_text(value: Any) -> Any:
    """The list of messages that a string spells as JSON; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if found and isinstance(found, list) and all(isinstance(m, dict) and "role" in m for m in found):
            return found
    return value


def to_messages(value: Any, column: str) -> list[dict]:
    """Cleans a list of messages: JSON text decoded, text blocks joined, blank fields removed, a tool call's arguments
    as an object. Raises UserError, naming the column, if it is not a list of messages, or not only text."""
    value = from_text(value)
    if not isinstance(value, list) or not value:
        raise UserError(f"column {column!r} must hold a list of messages, is {kind(value) if value else 'empty'}")
    return [_message(m, f"{column}[{i}]") for i, m in enumerate(value)]


def _message(message: Any, name: str) -> dict:
    if isinstance(message, str) and message.lstrip()[:1] == "{":
        message = _parsed(message, name)
    if not isinstance(message, dict):
        raise UserError(f"{name} must be a message with role and content, is {kind(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise UserError(f"{name}.role must be a string, is {kind(role)}")
    if not _ROLE.fullmatch(role):
        raise UserError(f"{name}.role={role[:60]!r} is no role; write one word, such as system, user, assistant, tool")
    found = {k: v for k, v in message.items() if k not in ("role", "content") and not blank(v)}
    if "tool_calls" in found:
        found["tool_calls"] = _calls(found["tool_calls"], f"{name}.tool_calls")
    if isinstance(content, list):
        content = "".join(_block(block, f"{name}.content[{i}]") for i, block in enumerate(content))
    if content is None and "tool_calls" in found:
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{name}.content must be a string, is {kind(content)}")
    return {"role": role, "content": content} | found


def _block(block: Any, name: str) -> str:
    if not isinstance(block, dict):
        raise UserError(f"{name} must be a block of text, is {kind(block)}")
    type, text = block.get("type") or "text", block.get("text")
    if type != "text" or not isinstance(text, str):
        raise UserError(f"{name} is of type {type!r}: models are trained on text only; remove the row")
    if more := [key for key, value in block.items() if key not in ("type", "text") and not blank(value)]:
        raise UserError(f"{name}.{more[0]} is not read; remove it")
    return text


def _calls(calls: Any, name: str) -> list[dict]:
    calls = _parsed(calls, name)
    if not isinstance(calls, list):
        raise UserError(f"{name} must be a list of tool calls, is {kind(calls)}")
    found = []
    for i, call in enumerate(calls):
        call = _parsed(call, f"{name}[{i}]")
        if not isinstance(call, dict):
            raise UserError(f"{name}[{i}] must be an object, is {kind(call)}")
        inner = _parsed(call.get("function"), f"{name}[{i}].function")
        if isinstance(inner, dict):
            call = call | {"function": inner | _arguments(inner, f"{name}[{i}].function")}
        found.append(call | _arguments(call, f"{name}[{i}]"))
    return found


def _arguments(function: dict, name: str) -> dict:
    """{"arguments": the arguments as an object}, which APIs spell as JSON text; {} if there are none."""
    if "arguments" not in function:
        return {}
    found = _parsed(function["arguments"] or {}, f"{name}.arguments")
    if not isinstance(found, dict):
        raise UserError(f"{name}.arguments must be an object, is {kind(found)}")
    return {"arguments": found}


def _parsed(value: Any, name: str) -> Any:
    """A value that may be stored as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{name} is not JSON ({e})") from e
