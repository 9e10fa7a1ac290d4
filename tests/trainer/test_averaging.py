"""Averages of weights: formulas against fp64, folders with shards and tied heads, memory."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stagecalls import merge
from training import recipe_of, stage_in, weights_of
from transformers import AutoModelForCausalLM

from strop.trainer.errors import UserError
from strop.trainer.models import averaging
from strop.trainer.models.averaging import combine, linear, slerp, task_arithmetic, toward, warp

T = st.floats(0, 1)
SEED = st.integers(0, 2**16)


def drawn(seed, *shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact_slerp(a, b, t):
    """fp64, by Gram-Schmidt: a turned by t times the angle, with the length between the lengths of unit vectors."""
    a, b = a.double().flatten(), b.double().flatten()
    cos = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
    if cos.abs() > 0.9995:
        return (1 - t) * a + t * b
    angle, unit = torch.acos(cos), a / a.norm()
    across = b / b.norm() - cos * unit
    across /= across.norm()
    # sin((1-t)W)/sin W a + sin(tW)/sin W b in the basis (a, across)
    share = torch.sin(t * angle) / torch.sin(angle)
    along = torch.sin((1 - t) * angle) / torch.sin(angle) * a.norm() + share * b.norm() * cos
    return along * unit + share * b.norm() * torch.sin(angle) * across


@given(seed=SEED, t=T, dtype=st.sampled_from([torch.float32, torch.bfloat16]), lean=st.floats(-1, 1))
@settings(max_examples=100, deadline=None)
def test_slerp_is_the_arc_between_two_tensors(seed, t, dtype, lean):
    a, b = drawn(seed, (5, 7), (5, 7), dtype=dtype)
    b = (b + 3 * lean * a).to(dtype)
    found = slerp(a, b, t)
    assert found.dtype == torch.float32 and found.shape == a.shape
    torch.testing.assert_close(found.double().flatten(), exact_slerp(a, b, t), rtol=1e-5, atol=1e-5)


def test_slerp_at_its_anchors():
    a, b = drawn(0, (4, 3), (4, 3))
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    assert torch.equal(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, 3 * a, 0.25), 1.5 * a)  # parallel: linear
    torch.testing.assert_close(slerp(a, -a, 0.25), 0.5 * a)  # opposite: no arc is the shortest, so linear
    torch.testing.assert_close(slerp(x, y, 0.5), torch.tensor([2.0, 2.0]) / 2**0.5)  # orthogonal: the norm is kept
    torch.testing.assert_close(slerp(x, y, 1 / 3), torch.tensor([3**0.5, 1.0]))  # 30 of 90 degrees
    zero = torch.zeros(2)
    assert torch.equal(slerp(zero, zero, 0.5), zero)
    torch.testing.assert_close(slerp(zero, y, 0.5), y / 2**0.5)  # no direction: as orthogonal
    assert slerp(torch.tensor(3.0), torch.tensor(5.0), 0.5).item() == 4.0  # a scalar
    assert slerp(torch.zeros(0, 3), torch.zeros(0, 3), 0.5).shape == (0, 3)


@given(seed=SEED, t=T, share=T, weights=st.lists(st.floats(-2, 2), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_formulas_equal_fp64_and_leave_their_inputs(seed, t, share, weights):
    start, *members = drawn(seed, *[(6, 4)] * (len(weights) + 1))
    a, b = drawn(seed + 1, (6, 4), (6, 4))
    before = [x.clone() for x in (start, a, b, *members)]
    exact = [x.double() for x in members]
    torch.testing.assert_close(linear(members, weights).double(),
                               sum(w * m for w, m in zip(weights, exact, strict=True)), rtol=1e-5, atol=1e-5)
    differences = sum(w * (m - start.double()) for w, m in zip(weights, exact, strict=True))
    torch.testing.assert_close(task_arithmetic(start, members, weights).double(), start.double() + differences,
                               rtol=1e-5, atol=1e-5)
    on_arc = start.double() + exact_slerp(a.double() - start, b.double() - start, t).view_as(start)
    torch.testing.assert_close(warp(start, a, b, t).double(), on_arc, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(toward(start, a, share).double(), (1 - share) * start.double() + share * a.double(),
                               rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip((start, a, b, *members), before, strict=True))


def test_warp_and_interpolation_at_their_anchors():
    start, a, b = drawn(1, (4, 3), (4, 3), (4, 3))
    torch.testing.assert_close(warp(start, a, b, 0.0), a)
    torch.testing.assert_close(warp(start, a, b, 1.0), b)
    torch.testing.assert_close(warp(start, a, a, 0.3), a)
    assert torch.equal(warp(start, start, start, 0.5), start)  # what nobody trained
    assert torch.equal(toward(start, a, 0.0), start) and torch.equal(toward(start, a, 1.0), a)
    assert torch.equal(task_arithmetic(start, [start, start], [0.5, -3.0]), start)


def moved(model, folder, seed, dtype=torch.float32, shards=None):
    """A copy of the model with noise on every weight, in shards of so many MB if given."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("model*.safetensors*"))
    loaded.to(dtype).save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return folder


def read(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: value.detach() for name, value in loaded.named_parameters()}


METHODS = {"slerp": {"t": 0.3}, "warp": {"t": 0.3}, "task_arithmetic": {"weights": [0.7, 0.6]},
           "average": {"weights": [1.0, 3.0]}}


def exact_merge(method, start, a, b):
    match method:
        case "slerp":
            return exact_slerp(a, b, 0.3).view_as(a)
        case "warp":
            return start + exact_slerp(a - start, b - start, 0.3).view_as(a)
        case "task_arithmetic":
            return start + 0.7 * (a - start) + 0.6 * (b - start)
    return (a + 3 * b) / 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_merge_of_shards_equals_fp64_and_is_rounded_once(tiny_model, tmp_path, method, share):
    start = moved(tiny_model, tmp_path / "start", 0, torch.bfloat16)
    for i, (stage, shards) in enumerate((("sft", "20KB"), ("dpo", "15KB"))):
        moved(tiny_model, tmp_path / stage / "model", i + 1, shards=shards)
    recipe = recipe_of(merge={"method": method, "interpolate": share} | METHODS[method])
    stage = stage_in(tmp_path / "merge", "merge")
    merge(stage, recipe, start=start, sft=tmp_path / "sft", dpo=tmp_path / "dpo")
    out = stage.dir / "model"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    s, a, b, found = read(start), read(tmp_path / "sft/model"), read(tmp_path / "dpo/model"), read(out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in found.items():
        x, y, z = s[name].double(), a[name].double(), b[name].double()
        exact = exact_merge(method, x, y, z)
        exact = (1 - share) * x + share * exact
        assert value.dtype == torch.bfloat16, "the start's dtype"
        assert ((value.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_a_tied_head_may_be_saved_in_some_folders_only(tiny_model, tmp_path):
    sharded = moved(tiny_model, tmp_path / "a", 1, shards="15KB")
    index = json.loads((sharded / averaging.INDEX).read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    weights = load_file(sharded / last)
    embedding = read(sharded)["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": embedding}, sharded / last, metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = last
    (sharded / averaging.INDEX).write_text(json.dumps(index))
    combine([sharded, tiny_model], tiny_model, tmp_path / "out", lambda _, m: slerp(*m, 0.5), uses_start=False)
    written = json.loads((tmp_path / "out" / averaging.INDEX).read_text())
    assert "lm_head.weight" not in written["weight_map"]
    files = {name: load_file(tmp_path / "out" / name) for name in set(written["weight_map"].values())}
    assert written["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert written["metadata"]["total_size"] == sum(t.nbytes for tensors in files.values() for t in tensors.values())
    torch.testing.assert_close(read(tmp_path / "out")["model.embed_tokens.weight"],
                               slerp(embedding, read(tiny_model)["model.embed_tokens.weight"], 0.5))


def changed(model, folder, change):
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights) or weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NORM = "model.norm.weight"


@pytest.mark.parametrize("change, said", [
    (lambda w: w.update({NORM: torch.ones(1)}), rf"{NORM} has the shape \[1\], in .* \[32\]"),  # would broadcast
    (lambda w: w.update({NORM: torch.arange(32)}), f"{NORM} holds integers that differ"),
    (lambda w: {k: v for k, v in w.items() if k != NORM}, rf"does not hold the tensors of .*\({NORM}\)"),
])
def test_folders_that_do_not_match_are_refused(tiny_model, tmp_path, change, said):
    odd = changed(tiny_model, tmp_path / "odd", change)
    for members, start in (([tiny_model, odd], tiny_model), ([tiny_model, tiny_model], odd)):
        with pytest.raises(UserError, match=said):
            combine(members, start, tmp_path / "out", lambda s, m: linear(m, [0.5, 0.5]))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out-*"))


def test_an_untied_head_that_one_folder_lacks_is_refused(tiny_model, tmp_path):
    whole = changed(tiny_model, tmp_path / "whole",
                    lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    config = json.loads((whole / "config.json").read_text()) | {"tie_word_embeddings": False}
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"\(lm_head.weight\)"):
        combine([whole, tiny_model], whole, tmp_path / "out", lambda _, m: slerp(*m, 0.5), uses_start=False)


def test_integers_that_all_folders_share_are_kept(tiny_model, tmp_path):
    folders = [changed(tiny_model, tmp_path / str(i), lambda w: w.update({"steps": torch.tensor(7)})) for i in (0, 1)]
    combine(folders, folders[0], tmp_path / "out", lambda _, m: linear(m, [0.5, 0.5]), uses_start=False)
    assert torch.equal(weights_of(tmp_path / "out")["steps"], torch.tensor(7))


@pytest.mark.slow
def test_one_tensor_is_in_memory_at_a_time(tiny_model, tmp_path):
    alive, most = weakref.WeakSet(), 0

    def formula(_, members):
        nonlocal most
        gc.collect()
        result = slerp(*members, 0.5)
        alive.add(result.untyped_storage())
        most = max(most, len(alive))
        return result

    other = moved(tiny_model, tmp_path / "other", 1)
    combine([tiny_model, other], tiny_model, tmp_path / "out", formula, uses_start=False)
    assert most == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, ours, theirs", [
    ("slerp", {"t": 0.3}, "base_model: {sft}\nmodels: [{{model: {sft}}}, {{model: {dpo}}}]\nparameters: {{t: 0.3}}"),
    ("average", {"weights": [1.0, 3.0]},
     "models: [{{model: {sft}, parameters: {{weight: 1.0}}}}, {{model: {dpo}, parameters: {{weight: 3.0}}}}]"),
    ("task_arithmetic", {"weights": [0.7, -0.4]},
     "base_model: {start}\n"
     "models: [{{model: {sft}, parameters: {{weight: 0.7}}}}, {{model: {dpo}, parameters: {{weight: -0.4}}}}]"),
    ("warp", {"t": 0.25}, "base_model: {start}\n"
     "models: [{{model: {sft}, parameters: {{weight: 0.75}}}}, {{model: {dpo}, parameters: {{weight: 0.25}}}}]"),
])
def test_merges_equal_those_of_mergekit(tiny_model, tmp_path, dtype, method, ours, theirs):
    pytest.importorskip("mergekit")
    paths = {name: moved(tiny_model, tmp_path / name / "model", i, dtype)
             for i, name in enumerate(("start", "sft", "dpo"))}
    stage = stage_in(tmp_path / "merge", "merge")
    merge(stage, recipe_of(merge={"method": method} | ours), start=paths["start"], sft=tmp_path / "sft",
          dpo=tmp_path / "dpo")
    name = {"average": "linear", "warp": "nuslerp"}.get(method, method)
    (tmp_path / "mergekit.yaml").write_text(
        f"merge_method: {name}\n{theirs.format(**paths)}\ndtype: float32\nout_dtype: float32\n")
    code = "import sys; from mergekit.scripts.run_yaml import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, tmp_path / "mergekit.yaml", tmp_path / "theirs"], check=True,
                   env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, timeout=120)
    expected, found = read(tmp_path / "theirs"), read(stage.dir / "model")
    assert expected.keys() == found.keys()
    rounding = 2**-8 if dtype == torch.bfloat16 else 0.0  # of mergekit's fp32 result, once
    for key in found:
        assert found[key].dtype == dtype
        torch.testing.assert_close(found[key].float(), expected[key], rtol=2e-6 + rounding, atol=1e-6)
