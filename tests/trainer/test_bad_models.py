"""Model folders whose parts do not go together: one line that names the file, before anything runs."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import pattern, table
from transformers import AutoModelForCausalLM

from strop.trainer.config import Model
from strop.trainer.errors import UserError
from strop.trainer.models.checks import BLOCK, check_model, check_values
from strop.trainer.models.folders import find_base
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.console import Console

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(file: str = "config.json", **keys):
    def spoil(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return spoil


def write(file: str, data: bytes = b"{nope"):
    return lambda folder: (folder / file).write_bytes(data)


def weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return spoil


def put(name: str, value: float, at: int = -1):
    """One number of a tensor."""
    return weights(lambda t: t[name].view(-1)[at].fill_(value) is None or None)


def cast(dtype):
    return weights(lambda t: {name: tensor.to(dtype) for name, tensor in t.items()})


def head(scale: float = 1.0, **keys):
    """The tied head written out too."""
    return weights(lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] * scale})


def rows(n: int):
    """A model with n embeddings for its tokenizer of 99 tokens."""
    def spoil(folder):
        weights(lambda t: t.update({"model.embed_tokens.weight": torch.zeros(n, 32)}))(folder)
        edit(vocab_size=n)(folder)
    return spoil


def sharded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def shards(spoil):
    return lambda folder: (sharded(folder), spoil(folder))


def add_token(folder):
    tokenizer = ModelFolder(folder).tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)


INDEX = "model.safetensors.index.json"
CASES = {  # name: (what is wrong, what the line says)
    "an adapter beside the weights": (write("adapter_config.json", b"{}"), "adapter_config.json"),
    "an adapter alone": (lambda f: ((f / "config.json").rename(f / "adapter_config.json")), "adapter_config.json"),
    "one token too many": (add_token, "100 tokens (the last is <extra>), the model's vocabulary 99 embeddings"),
    "too few embeddings": (rows(60), "99 tokens (the last is \\n), the model's vocabulary 60"),
    "quantized": (edit(quantization_config={"quant_method": "gptq"}), "config.json: quantization_config=gptq"),
    "quantized in some way": (edit(quantization_config="yes"), "config.json: quantization_config=yes"),
    "int8": (cast(torch.int8), "model.safetensors: tensor model.embed_tokens.weight is int8"),
    "float8": (cast(torch.float8_e4m3fn), "is float8_e4m3fn"),
    "not UTF-8": (write("config.json", b"\xff\xfe{}"), "config.json: not readable"),
    "a list": (write("config.json", b"[]"), "config.json: not readable as a JSON object (it is a list)"),
    "deep": (write("config.json", b"[" * 100000), "config.json: not readable"),
    "garbage of generation": (write("generation_config.json"), "generation_config.json"),
    "garbage of the tokenizer": (write("tokenizer.json"), "tokenizer.json"),
    "garbage of its config": (write("tokenizer_config.json"), "tokenizer_config.json"),
    "garbage in the index": (shards(write(INDEX)), f"{INDEX}: not readable"),
    "an index that leads out": (shards(edit(INDEX, weight_map={UP: "../x.safetensors"})), f"{INDEX}: its weight_map"),
    "an index without a map": (shards(edit(INDEX, weight_map=[1])), f"{INDEX}: its weight_map"),
    "a shard that is missing": (shards(lambda f: min(f.glob("model-*")).unlink()), "(there is no such file)"),
    "a shard that is empty": (shards(lambda f: min(f.glob("model-*")).write_bytes(b"")), "model-00001-of"),
    "empty weights": (write("model.safetensors", b""), "model.safetensors: not readable"),
    "a header bomb": (write("model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"), "header too large"),
    "NaN": (put(UP, float("nan"), -1), f"model.safetensors: tensor {UP} holds numbers that are not finite"),
    "inf": (put("model.embed_tokens.weight", float("-inf"), 0), "tensor model.embed_tokens.weight holds"),
    "too large for fp32": (lambda f: (cast(torch.float64)(f), put(UP, 1e300)(f)), f"tensor {UP} holds numbers"),
    "another head though tied": (head(2.0), "lm_head.weight and model.embed_tokens.weight are the same"),
    "no context": (edit(max_position_embeddings=0), "config.json: max_position_embeddings=0"),
    "a negative context": (edit(max_position_embeddings=-5), "config.json: max_position_embeddings=-5"),
    "an epsilon that is NaN": (edit(rms_norm_eps=float("nan")), "config.json: rms_norm_eps=nan"),
    "no frequency": (edit(rope_parameters={"rope_type": "default", "rope_theta": -1.0}), "rope_theta=-1.0"),
    "heads that do not divide": (edit(num_attention_heads=5), "config.json (Class validation error"),
    "an activation nobody knows": (edit(hidden_act="gleu"), "config.json: describes no causal LM that can be built"),
    "an encoder-decoder": (edit(model_type="t5"), "config.json: describes no causal LM"),
    "a layer more than tensors": (edit(num_hidden_layers=10**9), "config.json: num_hidden_layers=1000000000"),
    "fewer layers": (edit(num_hidden_layers=1), "config.json: describes fewer layers"),
    "another width": (edit(intermediate_size=10**12), "has another shape than config.json says"),
    "an end that is text": (edit(eos_token_id="stop"), "eos_token_id"),
    "an end beyond the vocabulary": (edit("generation_config.json", eos_token_id=[2, 99]),
                                     "generation_config.json: eos_token_id=[2, 99]"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
}


def found(folder) -> str:
    """What the user is told."""
    with pytest.raises(UserError) as e:
        find_base(Model(path=str(folder)), Console(enabled=False))
    return str(e.value)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_cannot_be_trained_is_one_line_that_names_the_file(name, folder):
    spoil, said = CASES[name]
    spoil(folder)
    line = found(folder)
    assert said in line and str(folder) in line and "\n" not in line and len(line) < 900, line
    page = [row[0] for heading in ("Model folders", "Errors") for row in table(heading)]
    assert len([row for row in page if pattern(row).search(line)]) == 1, line


@pytest.mark.parametrize("change", [
    lambda f: None, head(), rows(200), cast(torch.float64), cast(torch.bfloat16), cast(torch.float16), sharded,
    edit(max_position_embeddings=1 << 20), edit(eos_token_id=None), edit("generation_config.json", eos_token_id=[2, 0]),
    lambda f: save_file({"layers.0.wq": torch.zeros(3)}, f / "consolidated.safetensors"),
    weights(lambda t: t.update({"model.layers.0.self_attn.mask": torch.zeros(3, dtype=torch.int64)})),
    lambda f: (f / "generation_config.json").unlink(),
], ids=["as it is", "head", "rows", "fp64", "bf16", "fp16", "shards", "long", "no end", "two ends", "consolidated",
        "buffer", "no generation config"])
def test_a_healthy_folder_passes(change, folder):
    change(folder)
    assert find_base(Model(path=str(folder)), Console(enabled=False)).path == folder


def test_any_value_of_any_key_of_the_config_passes_or_is_one_line(folder):
    path = folder / "config.json"
    good, slowest = json.loads(path.read_text()), 0.0
    for key in [*good, "quantization_config", "sliding_window", "text_config"]:
        for value in (None, -1, 0, 10**9, 1.5, float("nan"), "x", [], [1], {}, {"x": 1}, True):
            path.write_text(json.dumps(good | {key: value}))
            started = time.perf_counter()
            try:
                check_model(folder, Model(path=str(folder)), read_all=True)
            except UserError as e:
                assert "\n" not in str(e) and str(folder) in str(e), (key, value, str(e))
            slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 5


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                                  "model.safetensors", "chat_template.jinja"])
def test_any_damage_to_a_file_passes_or_is_one_line(file, folder):
    data = (folder / file).read_bytes()
    for damaged in (b"", data[:len(data) // 2], data[1:], b"\0" * len(data), b"null", b"\xff" + data, data + b"\xff"):
        (folder / file).write_bytes(damaged)
        try:
            check_model(folder, Model(path=str(folder)), read_all=True)
        except UserError as e:
            assert "\n" not in str(e) and str(folder) in str(e), str(e)
        else:
            assert file == "chat_template.jinja" or damaged == b"", (file, damaged[:20])


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_anywhere_is_found(at, value):
    tensor = torch.zeros(2 * BLOCK + 6, dtype=torch.bfloat16)
    check_values(Path("config.json"), None, {"a": (Path("f"), tensor)})
    tensor[at] = value
    with pytest.raises(UserError, match="f: tensor a holds"):
        check_values(Path("config.json"), None, {"a": (Path("f"), tensor), "i": (Path("f"), torch.zeros(2).int())})


def test_weights_of_a_run_and_of_a_plan_are_not_read_again(folder):
    put(UP, float("nan"))(folder)
    find_base(Model(path=str(folder)), Console(enabled=False), convert=False)
    (folder.parent / "manifest.json").write_text("{}")
    find_base(Model(path=str(folder)), Console(enabled=False))


@pytest.mark.parametrize("path", ["package:", "package:__main__", "package:a b", "package:../x", "package:1"])
def test_a_name_that_is_no_package(path):
    with pytest.raises(UserError, match="not the name of a package"):
        find_base(Model(path=path), Console(enabled=False))
