"""The sizes of a dense decoder, from its config.json or the header of its GGUF file; no weights are read."""

import json
import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from strop.trainer.errors import UserError

# what a model type adds to Llama's parameters; a config.json leaves out the defaults of its type
QKV_BIAS = {"qwen2"}
TIED = {"gemma", "gemma2", "gemma3_text"}
HEAD_NORMS = {"qwen3", "gemma3_text"}  # an RMSNorm of a head's size on queries and one on keys
NORMS = {"gemma2": 4, "gemma3_text": 4}  # norms of a layer, otherwise 2
HEAD_SIZE = {"gemma": 256, "gemma2": 256, "gemma3_text": 256}  # where head_dim is left out
KNOWN_TYPES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3"}


@dataclass(frozen=True)
class Shape:
    """A dense decoder: gated MLP, grouped heads, RMSNorm.

    parameters: all of them, a tied head once. linear: those of the layers' matrices. matrices: (inputs, outputs) of a
    layer's linear layers. context: positions."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    context: int
    extra: int = 0  # biases and norms of a layer

    @property
    def matrices(self) -> list[tuple[int, int]]:
        d, q, kv = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size
        return [(d, q), (d, kv), (d, kv), (q, d), (d, self.ffn), (d, self.ffn), (self.ffn, d)]

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return sum(map(prod, self.matrices)) + self.extra

    @property
    def linear(self) -> int:
        return self.layers * sum(map(prod, self.matrices))

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.hidden + self.embedding * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of that rank on every linear layer but the head."""
        return self.layers * rank * sum(map(sum, self.matrices))


def shape_of(config: dict, where: str = "config.json") -> Shape:
    """The shape that a config.json describes. Raises UserError if it lacks a size or is not a dense decoder."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    kind = str(text.get("model_type", config.get("model_type", "")))
    if kind not in KNOWN_TYPES:
        raise UserError(f"{where}: model_type={kind or 'missing'}: there is no memory formula for it (known: "
                        f"{', '.join(sorted(KNOWN_TYPES))})")

    def number(key: str, default: int | None = None) -> int:
        value = text.get(key) if text.get(key) is not None else default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key}={value}: must be a whole number above 0 to know the model's size")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    kv_heads, size = number("num_key_value_heads", heads), number("head_dim", HEAD_SIZE.get(kind, hidden // heads))
    q, kv, ffn = heads * size, kv_heads * size, number("intermediate_size")
    extra = NORMS.get(kind, 2) * hidden + (2 * size if kind in HEAD_NORMS else 0)
    if kind in QKV_BIAS or text.get("attention_bias"):
        extra += q + 2 * kv + (0 if kind in QKV_BIAS else hidden)
    if text.get("mlp_bias"):
        extra += 2 * ffn + hidden
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", kind in TIED | {"smollm3"}))
    return Shape(number("num_hidden_layers"), hidden, ffn, heads, kv_heads, size, number("vocab_size"), bool(tied),
                 number("max_position_embeddings", 1 << 30), extra)


def read_shape(path: Path) -> Shape:
    """The shape of a model folder, or of a .gguf file. Raises UserError if it cannot be read."""
    file = path if path.suffix == ".gguf" else path / "config.json"
    try:
        if file.suffix == ".gguf":
            return shape_of(gguf_config(file), str(file))
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, struct.error) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{file}: cannot be read ({str(e)[:100]}), so the model's size is unknown") from e
    if not isinstance(config, dict):
        raise UserError(f"{file}: is not a JSON object, so the model's size is unknown")
    return shape_of(config, str(file))


# -- GGUF -------------------------------------------------------------------------------------------------------------

FORMATS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # of value types; 8: text, 9: array


def gguf_config(file: Path) -> dict:
    """The header of a GGUF file as a config.json. Raises ValueError or struct.error if it is none."""
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _header(data)


def _header(data: mmap.mmap) -> dict:
    magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version < 2:
        raise ValueError("not a GGUF file of version 2 or later")
    found, at = {}, 24
    for _ in range(pairs):
        name, at = _text(data, at)
        kind, = struct.unpack_from("<I", data, at)
        found[name], at = _value(data, at + 4, kind)
    names, embedding = set(), []
    for _ in range(tensors):
        name, at = _text(data, at)
        dims, = struct.unpack_from("<I", data, at)
        if name == "token_embd.weight":
            embedding = struct.unpack_from(f"<{dims}Q", data, at + 4)
        names.add(name)
        at += 4 + 8 * dims + 12
    kind = found.get("general.architecture", "")

    def of(key: str):
        return found.get(f"{kind}.{key}")

    return {"model_type": kind, "hidden_size": of("embedding_length"), "intermediate_size": of("feed_forward_length"),
            "num_hidden_layers": of("block_count"), "num_attention_heads": of("attention.head_count"),
            "num_key_value_heads": of("attention.head_count_kv"), "head_dim": of("attention.key_length"),
            "vocab_size": embedding[1] if len(embedding) == 2 else None,
            "max_position_embeddings": of("context_length"), "tie_word_embeddings": "output.weight" not in names}


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    length, = struct.unpack_from("<Q", data, at)
    if at + 8 + length > len(data):
        raise ValueError("the file is cut")
    return bytes(data[at + 8:at + 8 + length]).decode("utf-8", "replace"), at + 8 + length


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[object, int]:
    """A value and where the next one begins; of an array only the number of its entries."""
    if kind == 8:
        return _text(data, at)
    if kind == 9:
        of, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if of in (8, 9):
            for _ in range(count):
                _, at = _value(data, at, of)
            return count, at
        return count, at + count * struct.calcsize(f"<{FORMATS[of]}")
    if not 0 <= kind < len(FORMATS):
        raise ValueError(f"a value of the unknown type {kind}")
    value, = struct.unpack_from(f"<{FORMATS[kind]}", data, at)
    return value, at + struct.calcsize(f"<{FORMATS[kind]}")
