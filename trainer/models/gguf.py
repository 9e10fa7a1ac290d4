"""GGUF files: converted once into a Hugging Face folder in a cache directory."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.run.artifacts import check_file, list_files
from strop.trainer.run.files import cache_dir, hash_file, read_json, reason_of, write_json, writing

HASHES = ".hashes.json"  # of the converted files, beside them


def convert_gguf(gguf: Path, console, convert: bool = True) -> Path:
    """The folder with the dequantized bf16 weights of `gguf`; its name holds the file's content hash.

    With convert=False only its path is computed. Raises UserError if the file cannot be read as a causal LM."""
    target = cache_dir() / f"{gguf.stem}-{hash_file(gguf)[:12]}"
    if not convert:
        return target
    if (target / HASHES).exists():
        for name, entry in read_json(target / HASHES).items():
            check_file(target / name, entry, f"delete the folder {target} to convert it again")
        return target
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"reading a .gguf needs the package {package}: pip install {package}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    console.line(f"converting {gguf.name} to {target}, once")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as e:  # a broken file can raise anything
        if is_out_of_memory(e):
            raise
        raise UserError(f"{gguf}: cannot be read as a GGUF of a causal LM ({reason_of(e)}); download it again, or set "
                        "another model.path") from e
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # not marked as quantized, so transformers can save it
    model.load_state_dict(loaded.state_dict())
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    with writing(target, temporary):
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / HASHES, list_files(temporary))
        if (target / HASHES).exists():  # another process was faster
            shutil.rmtree(temporary)
        else:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
    return target
