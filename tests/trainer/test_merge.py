import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stagecalls import members_of, merge
from training import recipe_of, stage_in, weights_of

from strop.trainer.errors import UserError
from strop.trainer.models.averaging import combine, copy_folder, linear


def shifted(model, folder, by, dtype=torch.float32):
    """A copy of the model with `by` added to every weight."""
    shutil.copytree(model, folder)
    weights = {k: (v + by).to(dtype) for k, v in load_file(model / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def mean(folders, target, start=None):
    weights = [1 / len(folders)] * len(folders)
    combine(folders, start or folders[0], target, lambda _, members: linear(members, weights), uses_start=False)


def stages_of(model, tmp_path):
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    for stage, base in ((sft, 1.0), (dpo, 2.0)):
        stage.mkdir()
        shifted(model, stage / "model", base)
    (dpo / "snapshots").mkdir()
    shifted(model, dpo / "snapshots" / "step-000001", 4.0)
    shifted(model, dpo / "ema", 8.0)
    return sft, dpo


@pytest.mark.parametrize("keys, shift", [
    ({}, 2.0),
    ({"method": "average"}, (1 + 2 + 4) / 3),
    ({"method": "average", "members": ["dpo"]}, 3.0),
    ({"method": "average", "members": ["sft", "dpo"], "weights": [1, 3]}, (1 + 3 * 3) / 4),
    ({"method": "average", "members": ["start", "sft"], "interpolate": 0.5}, 0.25),
    ({"method": "ema"}, 8.0),
    ({"interpolate": 0.25}, 0.5),
    ({"interpolate": 0.0}, 0.0),
    ({"method": "task_arithmetic", "weights": [0.5, 2]}, 0.5 * 1 + 2 * 2),
    ({"method": "task_arithmetic", "weights": [-0.5, 1.5]}, -0.5 * 1 + 1.5 * 2),  # extrapolates beyond dpo
    ({"method": "task_arithmetic", "members": ["dpo"], "weights": [0.5], "interpolate": 0.5}, 0.5),
    ({"method": "warp", "t": 0.25}, 1 + 0.25),  # parallel differences
    ({"method": "warp", "t": 0.25, "interpolate": 0.5}, (1 + 0.25) / 2),
    ({"method": "slerp", "t": 0.0}, 1.0),
    ({"method": "slerp", "t": 1.0, "members": ["dpo", "sft"]}, 1.0),
    ({"method": "slerp", "t": 0.0, "members": ["start", "sft"]}, 0.0),
])
def test_merges_are_the_weighted_means_they_say(tiny_model, tmp_path, keys, shift):
    sft, dpo = stages_of(tiny_model, tmp_path)
    stage = stage_in(tmp_path / "merge", "merge")
    merge(stage, recipe_of(merge=keys, dpo={"ema_decay": 0.9}), start=tiny_model, sft=sft, dpo=dpo)
    before, after = weights_of(tiny_model), weights_of(stage.dir / "model")
    for name in before:
        torch.testing.assert_close(after[name], before[name] + shift, rtol=0, atol=1e-5)
    assert (stage.dir / "model" / "tokenizer.json").exists() and (stage.dir / "model" / "config.json").exists()


def test_bf16_weights_are_averaged_in_fp32_and_rounded_once(tiny_model, tmp_path):
    parts = [shifted(tiny_model, tmp_path / str(i), 0.1 * i, torch.bfloat16) for i in range(3)]
    mean(parts, tmp_path / "out")
    loaded = [weights_of(p) for p in parts]
    for name, value in weights_of(tmp_path / "out").items():
        exact = sum(w[name].double() for w in loaded) / 3
        assert value.dtype == torch.bfloat16
        # half a unit in the last place of bf16, and fp32's rounding on top
        assert ((value.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_one_checkpoint_is_kept_bit_for_bit(tiny_model, tmp_path):
    copy_folder(tiny_model, tmp_path / "out")
    a, b = weights_of(tiny_model), weights_of(tmp_path / "out")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_other_architectures_are_refused_and_no_stage_leaves_the_start(tiny_model, tmp_path):
    odd = shifted(tiny_model, tmp_path / "odd", 0.0)
    weights = load_file(odd / "model.safetensors")
    weights["extra"] = torch.zeros(1)
    save_file(weights, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"odd: does not hold the tensors of .*\(extra\)"):
        mean([tiny_model, odd], tmp_path / "out")
    assert members_of(recipe_of(), tiny_model, None, None) == ([tiny_model], [1.0])
