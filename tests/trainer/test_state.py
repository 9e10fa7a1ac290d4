"""Cheaper forms of the optimizer's state, and Muon, in the training engines."""


import pytest
import torch
from stagecalls import sft
from training import Log, largest_difference, recipe_of, select_of, stage_in

from strop.kernels import optimizer
from strop.kernels.optimizer import many
from strop.trainer.config import Sft
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.world import World
from strop.trainer.training import engines
from strop.trainer.training.local import Engine
from strop.trainer.training.masters import Masters

FORMS = [({"moments": "bfloat16"}, 0.02), ({"moments": "int8", "masters": "split"}, 0.1),
         ({"optimizer": "muon", "masters": "split", "moments": "int8"}, 2.0)]


def trained(folder, name, model, log=None, **keys):
    """(folder, masters) of an SFT stage in bf16: four steps of several microbatches, with an average."""
    section = {"batch_size": 4, "lr": 1e-3, "epochs": 2, "max_tokens": 48, "ema_decay": 0.5} | keys
    stage, kept = stage_in(folder / name, "round-00/sft", log), {}

    class Keeping(Engine):
        def save(self, target):
            kept[target.name] = torch.cat([m.detach().flatten() for m in self.masters])
            super().save(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strop.trainer.training.local.Engine", Keeping)
        sft(stage, recipe_of(dtype="bfloat16", sft=section), select=select_of(folder / "select", 8), start=model)
    return stage.dir, kept["model"]


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    """(folder, masters, start's weights) with fp32 masters and moments, whose weights round a number halfway between
    two bf16 numbers away from zero."""
    step = Masters.step

    def rounded(self, *args):
        norm = step(self, *args)
        for param, master in zip(self.params, self.masters, strict=True):
            param.data.copy_(optimizer.split(master.detach())[0])
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masters, "step", rounded)
        folder, masters = trained(tmp_path_factory.mktemp("plain"), "plain", tiny_model)
    model = ModelFolder(tiny_model).load(torch.bfloat16, torch.device("cpu"))
    return folder, masters, torch.cat([p.detach().float().flatten() for p in model.parameters()])


def test_split_masters_train_bit_for_bit_as_fp32_masters_do(tmp_path, tiny_model, plain):
    folder, masters = trained(tmp_path, "split", tiny_model, masters="split")
    assert torch.equal(masters, plain[1]) and not torch.equal(masters, plain[2])
    for part in ("model", "ema"):
        assert largest_difference(folder / part, plain[0] / part) == 0.0


@pytest.mark.parametrize(("keys", "allowed"), FORMS, ids=str)
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, tiny_model, plain, keys, allowed):
    """And close to where fp32 moments end, relative to the way there."""
    keys = keys | {"checkpoint_steps": 1}
    whole, masters = trained(tmp_path, "whole", tiny_model, **keys)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, "killed", tiny_model, Log(stop_at=3), **keys)
    log = Log()
    again, _ = trained(tmp_path, "killed", tiny_model, log, **keys)
    assert log.rewound_to == 2
    for part in ("model", "ema"):
        assert largest_difference(whole / part, again / part) == 0.0
    apart = (masters - plain[1]).norm() / (plain[1] - plain[2]).norm()
    assert 0 < apart < allowed


@pytest.mark.parametrize(("keys", "launches"), [({}, 1), ({"masters": "split"}, 1), ({"moments": "bfloat16"}, 2),
                                                ({"moments": "int8", "masters": "split"}, 2)], ids=str)
def test_a_step_on_a_gpu_is_a_launch_for_each_form(monkeypatch, keys, launches):
    """However many tensors there are; another one adds up the gradients of a microbatch. Nothing is computed here."""
    pytest.importorskip("triton")
    from strop.kernels._triton import adamw, sums

    found = []
    monkeypatch.setattr(many, "on_gpu", lambda x: True)
    for module in (adamw, sums):
        monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: found.append(kernel))
    params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in 20 * [(8, 64), (64,), (32, 48)]]
    masters = Masters(params, Sft(**keys), World())
    for microbatches in (1, 3):
        for number in range(1, 3):
            found.clear()
            for i in range(microbatches):
                for param in params[i % 2:]:  # one has none in the second
                    param.grad = torch.randn_like(param)
                if i < microbatches - 1:
                    masters.fold()
            masters.step(number, 1e-3)
            added = microbatches if microbatches > 1 else 0
            assert found == added * [sums.add_kernel] + launches * [adamw.adamw_many_kernel]
    moments = [{k: v.clone() for k, v in state.items()} for state in masters.moments()]
    masters.set_moments(moments, 2)
    masters.step(3, 1e-3)
    held = {id(x) for group in masters.adamw.groups for column in (group.master, *group.rest) for x in column}
    assert {id(x) for state in moments for x in state.values()} <= held, "moments that were read are used"


@pytest.mark.parametrize("masters", ["float32", "split"])
def test_muon_is_pytorchs_and_adamw_has_the_rest(masters):
    torch.manual_seed(0)
    section = Sft(optimizer="muon", masters=masters, weight_decay=0.1, grad_clip=0.5, lr=1e-2)
    params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((6, 10), (10, 4), (12,), (8, 10))]
    ours = Masters(params, section, World(), matrices=[True, True, False, False])
    plain = [torch.nn.Parameter(p.detach().float()) for p in params]
    options = {"lr": 1e-2, "weight_decay": 0.1}
    theirs = [torch.optim.Muon(plain[:2], adjust_lr_fn="match_rms_adamw", **options),
              torch.optim.AdamW(plain[2:], betas=section.betas, eps=section.eps, **options)]
    for number in range(1, 4):
        for param, other in zip(params, plain, strict=True):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(plain, 0.5)
        for one in theirs:
            one.step()
        torch.testing.assert_close(ours.step(number, 1e-2), norm)
        for param, master, other in zip(params, ours.masters, plain, strict=True):
            # PyTorch's Muon computes in bf16, where an input of another last bit can round otherwise
            torch.testing.assert_close(master.detach(), other.detach(), rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(param.detach(), master.detach().bfloat16())
    assert [sorted(state) for state in ours.moments()] == [["momentum_buffer"]] * 2 + [["exp_avg", "exp_avg_sq"]] * 2


def test_muon_has_the_matrices_of_layers(tmp_path, tiny_model):
    recipe = recipe_of(sft={"optimizer": "muon"})
    engine = Engine(ModelFolder(tiny_model), recipe.sft, stage_in(tmp_path / "s", "sft"), 8, compute=recipe,
                    lora=recipe.lora, seed=0)
    assert {engine.names[i] for i in engine.weights.muon} == {
        name for name, p in engine.model.named_parameters() if "layers" in name and p.dim() == 2}
    assert len(engine.weights.muon) == 14


@pytest.mark.parametrize(("keys", "said"), [
    ({"sft": {"optimizer": "muon"}, "engine": {"kind": "fsdp"}},
     "sft.optimizer=muon needs whole matrices, and engine.kind=fsdp keeps parts; set optimizer=adamw"),
    ({"dpo": {"masters": "split"}, "engine": {"kind": "fsdp"}}, "dpo.masters=split is not for engine.kind=fsdp"),
    ({"sft": {"compile": True}, "engine": {"kind": "fsdp"}}, "sft.compile=true is not for engine.kind=fsdp"),
    ({"sft": {"masters": "split"}, "dtype": "float32"}, "sft.masters=split needs bfloat16 compute"),
    ({"sft": {"moments": "float16"}}, "sft.moments=float16: input should be 'float32', 'bfloat16' or 'int8'"),
])
def test_what_cannot_train_so_is_refused(keys, said):
    from strop.trainer.cli import load_recipe

    with pytest.raises(UserError) as error:
        load_recipe({"data": {"sft": [{"name": "x", "path": "x"}]}} | keys)
    assert said in str(error.value)
    load_recipe({"data": {"sft": [{"name": "x", "path": "x"}]}, "engine": {"kind": "fsdp"}, "sft": {"moments": "int8"}})


def test_a_device_without_bf16_refuses_split_masters(tmp_path, tiny_model):
    recipe, compute = recipe_of(sft={"masters": "split"}, dtype="auto"), recipe_of(dtype="float32")
    with pytest.raises(UserError, match=r"sft: masters=split needs bfloat16 compute, and dtype is float32"):
        engines.open_engine(ModelFolder(tiny_model), recipe.sft, stage_in(tmp_path / "s", "sft"), 8, compute=compute,
                            lora=recipe.lora, seed=0)


def test_all_three_keys_count():
    keys = [Sft(**{name: value}).key() for name, value in (("optimizer", "muon"), ("moments", "int8"),
                                                           ("masters", "split"))]
    assert all(one != Sft().key() for one in keys)
