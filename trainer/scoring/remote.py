"""Objects of one process used from another over a pipe, where neither believes the other.

Plain data (numbers, texts, lists, dicts, ..., arrays) crosses by value, and mutable arguments come back changed. All
else is a handle: a `Remote` forwards calls, attributes and operators to the process of its object. A Remote equals or
orders itself with nothing but other Remotes, so that an object cannot pass for a number by what it says of itself.
The side that does not `serve` attributes answers calls of functions that it passed as arguments, and nothing else.
"""

from __future__ import annotations

import asyncio
import builtins
import inspect
import json
import operator
import os
import struct
from decimal import Decimal
from fractions import Fraction

DEEPEST, LONGEST = 200, 64 << 20
FORWARDED = ("len", "iter", "next", "getitem", "setitem", "delitem", "contains", "bool", "str", "repr", "int", "float",
             "index", "neg", "pos", "abs", "invert", "round", "enter", "exit", "reversed",
             *(f"{r}{name}" for r in ("", "r") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow",
                                                            "and", "or", "xor", "lshift", "rshift", "matmul")),
             "iadd", "isub", "imul", "ior", "iand")
COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
TEXTS = {"fraction": Fraction, "decimal": Decimal}


class Gone(Exception):
    """The other process ended, or sent what is no answer."""


class Peer:
    """One end. serve: whether the other end may read attributes and use operators of objects here."""

    def __init__(self, read: int, write: int, serve: bool, names: dict | None = None):
        self.read, self.write = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self.serves, self.names = serve, names
        self.objects: dict[int, object] = {}
        self.classes: dict[int, type] = {}  # exception classes of the other end, by handle

    # ---- data

    def encode(self, value, depth: int = 0):
        """`value` as JSON values. Raises ValueError if it is nested too deeply, e.g. holds itself."""
        if depth > DEEPEST:
            raise ValueError("a value nests too deeply")
        if value is None or isinstance(value, bool | str) or type(value) in (int, float):
            return value if not isinstance(value, str) else str(value)
        if isinstance(value, int | float):  # of a subclass
            return int(value) if isinstance(value, int) else float(value)
        for tag, kind in (("l", list), ("t", tuple), ("s", set), ("f", frozenset)):
            if isinstance(value, kind):
                return {tag: [self.encode(v, depth + 1) for v in value]}
        if isinstance(value, dict):
            return {"d": [[self.encode(k, depth + 1), self.encode(v, depth + 1)] for k, v in value.items()]}
        if isinstance(value, bytes | bytearray):
            return {"b": value.hex()}
        if isinstance(value, complex):
            return {"c": [value.real, value.imag]}
        for tag, kind in TEXTS.items():
            if isinstance(value, kind):
                return {tag: str(value)}
        if type(value).__module__ == "numpy" and hasattr(value, "dtype") and not value.dtype.hasobject:
            if not hasattr(value, "shape") or value.shape == ():
                return self.encode(value.tolist(), depth + 1)
            return {"n": [value.dtype.str, list(value.shape), value.tobytes().hex()]}
        if isinstance(value, Remote):
            return {"h": object.__getattribute__(value, "_id")}
        self.objects[id(value)] = value
        kind = {"o": id(value), "name": type(value).__name__}
        if isinstance(value, type) and issubclass(value, Exception):
            kind |= {"raises": [c.__name__ for c in value.__mro__]}
        return kind | ({"waits": True} if inspect.iscoroutine(value) else {})

    def decode(self, value):
        """Raises Gone if `value` is nothing that `encode` writes."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        try:
            (tag, inner), *_ = value.items()
            if tag in ("l", "t", "s", "f"):
                return {"l": list, "t": tuple, "s": set, "f": frozenset}[tag](map(self.decode, inner))
            if tag == "d":
                return {self.decode(k): self.decode(v) for k, v in inner}
            if tag in TEXTS:
                return TEXTS[tag](inner)
            if tag in ("b", "c"):
                return bytes.fromhex(inner) if tag == "b" else complex(*inner)
            if tag == "n":
                import numpy

                return numpy.frombuffer(bytes.fromhex(inner[2]), numpy.dtype(inner[0])).reshape(inner[1]).copy()
            if tag == "h":
                return self.objects[inner]
            if value.get("raises"):
                return self._exception(inner, value["raises"])
            remote = Remote(self, inner, str(value["name"]))
            return self._wait(remote) if value.get("waits") else remote
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ImportError) as e:
            raise Gone(f"sent no value ({type(e).__name__})") from e

    def _exception(self, handle: int, names: list[str]) -> type:
        if handle not in self.classes:
            self.classes[handle] = type(str(names[0]), (builtin(names),), {})
        return self.classes[handle]

    async def _wait(self, remote: Remote):
        return self.ask("await", remote, ())

    # ---- messages

    def _send(self, message) -> None:
        text = json.dumps(message).encode()
        try:
            self.write.write(struct.pack("<I", len(text)) + text)
            self.write.flush()
        except OSError as e:
            raise Gone("ended") from e

    def _receive(self):
        try:
            head = self.read.read(4)
            size = struct.unpack("<I", head)[0]
            text = self.read.read(size) if size <= LONGEST else b""
            return json.loads(text)
        except (OSError, struct.error, ValueError, RecursionError) as e:
            raise Gone("ended") from e

    def ask(self, what: str, target, arguments: tuple, keywords: dict | None = None):
        """What `target` (a Remote or a name) answers. Raises what it raises, or Gone."""
        sent = self.encode(list(arguments))
        self._send(["ask", what, self.encode(target), sent, self.encode(keywords or {})])
        while True:
            message = self._receive()
            if isinstance(message, list) and message[:1] == ["ask"]:
                self._answer(message)
                continue
            try:
                kind, value, changed = message
                names, handle = (value["names"], value["class"]) if kind == "raise" else ([], None)
            except (ValueError, TypeError, KeyError) as e:
                raise Gone("sent no answer") from e
            if kind == "raise":
                error = self.classes.get(handle) or builtin(names)
                raise error(*self._arguments(value))
            try:
                for i, new in changed:
                    change(arguments[i], self.decode(new))
            except (ValueError, TypeError, IndexError) as e:
                raise Gone("sent no answer") from e
            return self.decode(value)

    def _arguments(self, value: dict) -> list:
        found = self.decode(value.get("args"))
        return found if isinstance(found, list) else []

    def _answer(self, message) -> None:
        try:
            _, what, target, arguments, keywords = message
            target, given, keywords = self.decode(target), self.decode(arguments), self.decode(keywords)
            if not self.serves and what != "call":
                raise PermissionError("only calls are answered here")
            answer = self.perform(what, target, given, keywords)
            after = [self.encode(v) for v in given]
            changed = [[i, new] for i, (old, new) in enumerate(zip(arguments["l"], after, strict=True))
                       if isinstance(old, dict) and old.keys() & {"l", "d", "s"} and old != new]
            reply = ["value", self.encode(answer), changed]
        except Gone:
            raise
        except BaseException as e:
            kinds = [c.__name__ for c in type(e).__mro__]
            try:
                said = self.encode(list(e.args))
            except Exception:
                said = {"l": []}
            reply = ["raise", {"names": kinds, "class": id(type(e)), "args": said}, []]
        self._send(reply)

    def perform(self, what: str, target, arguments: list, keywords: dict):
        if what == "call":
            return target(*arguments, **keywords)
        if what == "name":
            return self.names[target]
        if what == "names":
            return [n for n, v in self.names.items() if not n.startswith("__") and not inspect.ismodule(v)]
        if what == "modules":
            return [[n, v.__name__] for n, v in self.names.items() if inspect.ismodule(v)]
        if what == "get":
            return getattr(target, *arguments)
        if what == "set":
            return setattr(target, *arguments)
        if what == "await":
            return asyncio.run(target)
        if what in COMPARED:
            return getattr(operator, what)(target, *arguments)
        plain = {"iter": iter, "next": next, "bool": bool, "len": len, "str": str, "repr": repr, "reversed": reversed}
        return plain[what](target) if what in plain else getattr(target, f"__{what}__")(*arguments)

    def serve(self) -> None:
        """Answers until the other end is gone."""
        try:
            while True:
                self._answer(self._receive())
        except Gone:
            return


def builtin(names: list[str]) -> type[Exception]:
    """The first built-in exception of a class's bases by their names."""
    for name in names:
        found = getattr(builtins, str(name), None)
        if isinstance(found, type) and issubclass(found, Exception):
            return found
    return RuntimeError


def change(value, new) -> None:
    """Makes a list, dict or set equal to `new`."""
    if isinstance(value, list) and isinstance(new, list):
        value[:] = new
    elif isinstance(value, dict | set) and type(new) is type(value):
        value.clear()
        value.update(new)


class Remote:
    """An object of the other process."""

    def __init__(self, peer: Peer, handle: int, name: str):
        for key, value in (("_peer", peer), ("_id", handle), ("_name", name)):
            object.__setattr__(self, key, value)

    def __call__(self, *arguments, **keywords):
        return self._peer.ask("call", self, arguments, keywords)

    def __getattr__(self, name):
        if name.startswith("__") and name != "__name__":  # Python and its libraries probe for these
            raise AttributeError(name)
        return self._peer.ask("get", self, (name,))

    def __setattr__(self, name, value):
        self._peer.ask("set", self, (name, value))

    def __hash__(self):
        return hash(object.__getattribute__(self, "_id"))


def _forward(name: str):
    def method(self, *arguments):
        return self._peer.ask(name, self, arguments)

    return method


def _compare(name: str):
    def method(self, other):
        return self._peer.ask(name, self, (other,)) if isinstance(other, Remote) else NotImplemented

    return method


for _name in FORWARDED:
    setattr(Remote, f"__{_name}__", _forward(_name))
for _name in COMPARED:
    setattr(Remote, f"__{_name}__", _compare(_name))
