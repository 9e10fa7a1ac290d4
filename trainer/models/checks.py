"""Start weights, held against their config.json and their tokenizer before anything runs."""

import re
from pathlib import Path

import torch

from strop.trainer.config import Model
from strop.trainer.errors import UserError
from strop.trainer.models.loading import AGAIN, ModelFolder, read_object, read_tensors
from strop.trainer.run.files import check_file_types, reason_of

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
POSITIVE = re.compile(r"(max_position_embeddings|hidden_size|vocab_size|num_hidden_layers|num_attention_heads|"
                      r"rope_theta|\w*norm_?eps(ilon)?|\w*_epsilon)$")
BLOCK = 1 << 20  # numbers that are looked at together


def check_model(path: Path, options: Model, read_all: bool) -> None:
    """Raises UserError, naming the file, where the parts of a model folder do not go together or cannot be trained.

    read_all: also look at every weight, unless a run of ours made them."""
    file, folder = path / "config.json", ModelFolder(path, options)
    check_file_types(path)
    if (adapter := path / "adapter_config.json").exists():
        raise UserError(f"{adapter}: the folder holds an adapter, which would be left out; merge it into the weights "
                         "(merge_and_unload of peft) and name the folder of the result, or delete the file")
    if not file.exists():
        raise UserError(f"{path}: has no config.json, so it is no Hugging Face model folder")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: holds no *.safetensors; save the model with safe_serialization (pickled weights are "
                         "never loaded)")
    settings, generation, *_ = [read_object(path / f"{name}.json") for name in (
        "config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens")]
    if found := settings.get("quantization_config"):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise UserError(f"{file}: quantization_config={method}: quantized weights cannot be trained; save the model in "
                         "bfloat16 or float32 without it")
    check_numbers(file, settings)
    config, tensors = folder.config(), read_tensors(path)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(tensors):
        raise UserError(f"{file}: num_hidden_layers={layers}, but the weights hold {len(tensors)} tensors; {AGAIN}")
    for name, (where, tensor) in tensors.items():
        if tensor.dtype not in FLOATS and name.endswith("weight"):
            raise UserError(f"{where}: tensor {name} is {str(tensor.dtype)[6:]}: integer or quantized weights cannot "
                             "be trained; save the model in bfloat16 or float32")
    model = None if "auto_map" in settings else build(file, config, tensors)
    check_tokens(path, folder.tokenizer(), model, {file: settings, path / "generation_config.json": generation})
    if read_all and not any((above / "manifest.json").exists() for above in (path, path.parent)):
        check_values(file, model, tensors)


def check_numbers(file: Path, settings: dict) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            check_numbers(file, value)
        elif POSITIVE.match(key) and isinstance(value, int | float) and not 0 < value < float("inf"):
            raise UserError(f"{file}: {key}={value} must be a number above 0; {AGAIN}")


def build(file: Path, config, tensors: dict) -> torch.nn.Module:
    """The model that config.json describes, without memory for its weights, if shapes and layers are those of
    `tensors`. Names that transformers converts while it loads are left to it, and so is what is missing."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as e:  # ValueError, KeyError, ZeroDivisionError, ...: whatever its values lead to
        cause = f"{type(e).__name__}: {reason_of(e)}"
        raise UserError(f"{file}: describes no causal LM that can be built ({cause}); {AGAIN}") from e
    state, ignored = model.state_dict(), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ["$^"]
    kinds = {re.sub(r"\.\d+\.", ".N.", name) for name in state}
    for name, (where, tensor) in tensors.items():
        if name in state and state[name].shape != tensor.shape:
            raise UserError(f"{where}: tensor {name} has another shape than config.json says, {list(tensor.shape)} "
                             f"instead of {list(state[name].shape)}; {AGAIN}")
        known = name in state or re.sub(r"\.\d+\.", ".N.", name) not in kinds or re.search("|".join(ignored), name)
        if not known:
            raise UserError(f"{file}: describes fewer layers (num_hidden_layers?) than {where.name} holds, which has "
                             f"{name}; {AGAIN}")
    return model


def check_tokens(path: Path, tokenizer, model: torch.nn.Module | None, settings: dict[Path, dict]) -> None:
    if model is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    for file, found in settings.items():
        ids = found.get("eos_token_id")
        for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if not isinstance(i, int) or not 0 <= i < rows:
                raise UserError(f"{file}: eos_token_id={ids}, but the vocabulary has {rows} tokens; correct it")
    # tokens that stand for pictures and sound need no embedding: text holds none
    media = {tokenizer.init_kwargs.get(f"{kind}_token") for kind in ("image", "audio", "video")}
    largest, token = max((i, token) for token, i in tokenizer.get_vocab().items() if token not in media)
    if largest >= rows:
        raise UserError(f"{path}: the tokenizer has {largest + 1} tokens (the last is {token}), the model's vocabulary "
                         f"{rows} embeddings; call resize_token_embeddings({largest + 1}) and save the model again")


def check_values(file: Path, model: torch.nn.Module | None, tensors: dict) -> None:
    """Every number is finite as the fp32 that it becomes, and tensors that the model shares are equal."""
    for name, (where, tensor) in tensors.items():
        for part in tensor.flatten().split(BLOCK) if tensor.dtype in FLOATS and tensor.numel() else ():
            extremes = torch.aminmax(part.float() if part.dtype == torch.float64 else part)  # NaN if one number is
            if not all(extreme.isfinite() for extreme in extremes):
                raise UserError(f"{where}: tensor {name} holds numbers that are not finite; {AGAIN}")
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False) if model else ():
        if name in tensors and not torch.equal(tensors[name][1], tensors[first.setdefault(id(parameter), name)][1]):
            raise UserError(f"{file}: {name} and {first[id(parameter)]} are the same (tie_word_embeddings=true), but "
                             f"{tensors[name][0].name} holds two that differ; set it to false, or save again")
