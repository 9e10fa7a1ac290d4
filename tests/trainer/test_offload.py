"""Inputs of checkpointed layers in the host's memory: the same numbers, and nothing else keeps them. On a CPU the
copies are made within its memory; test_gpu.py has the streams, test_engines.py several ranks (`sliced`)."""

import pytest
import torch
from test_families import FAMILIES, model_of
from torch.multiprocessing.reductions import StorageWeakRef
from training import recipe_of

from strop.kernels import Group, PackedGroups
from strop.trainer.cli import load_recipe
from strop.trainer.config import Lora, Sft
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.training import offload
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.policy import load_policy

CPU = torch.device("cpu")
GROUPS = PackedGroups.pack([Group([3, 4, 5], [[6, 7], [8]]), Group([9], [[1] * 8, [2, 3], [4]])])


def policy(folder, **keys):
    section = Sft(activation_checkpointing=True, **keys)
    return load_policy(ModelFolder(folder), section, CPU, compute=recipe_of(), lora=Lora(), seed=0, reward=False)


def gradients(model, packed: bool = True) -> list[torch.Tensor]:
    model.zero_grad()
    scorer = Scorer(model, packed)
    if not packed:
        model.set_attn_implementation("sdpa")
    scorer(GROUPS).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_are_the_same_bits(tiny_model, packed):
    """Also where several passes, a row each, come before the backward pass."""
    plain = gradients(policy(tiny_model), packed)
    assert all(map(torch.equal, plain, gradients(policy(tiny_model, activation_offload=True), packed)))


def test_layers_inputs_go_and_come_back_one_ahead(tiny_model, monkeypatch):
    """In a forward pass only the last layer's input stays; the backward pass fetches the one before it at once."""
    events, inputs, real = [], [], {name: getattr(offload.Offload, name) for name in ("pack", "unpack", "_fetch")}

    def pack(self, tensor):
        inputs.append(StorageWeakRef(tensor.untyped_storage()))
        kept = real["pack"](self, tensor)
        events.append(("out", len(inputs) - 1))
        kept.number = len(inputs) - 1
        return kept

    def unpack(self, kept):
        events.append(("used", kept.number))
        return real["unpack"](self, kept)

    def fetch(self, kept):
        events.append(("back", kept.number))
        return real["_fetch"](self, kept)

    for function, name in ((pack, "pack"), (unpack, "unpack"), (fetch, "_fetch")):
        monkeypatch.setattr(offload.Offload, name, function)
    logp = Scorer(policy(tiny_model, activation_offload=True))(GROUPS)
    assert events == [("out", 0), ("out", 1)] and [storage.expired() for storage in inputs] == [True, False]
    logp.sum().backward()
    assert events[2:] == [("used", 1), ("back", 0), ("used", 0)] and inputs[1].expired()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hands_its_layers_inputs_over(family, monkeypatch):
    model, seen, pack = model_of(family).train(), [], offload.Offload.pack
    model.gradient_checkpointing_enable({"use_reentrant": False})
    offload.offload(model, CPU)
    monkeypatch.setattr(offload.Offload, "pack", lambda self, tensor: seen.append(pack(self, tensor)) or seen[-1])
    Scorer(model)(GROUPS)
    assert sum(isinstance(kept, offload.Kept) for kept in seen) == model.config.num_hidden_layers


def test_a_pass_after_one_that_failed(tiny_model):
    """A backward pass that ends while an input is on its way back leaves nothing behind that later ones see."""
    plain, model = gradients(policy(tiny_model)), policy(tiny_model, activation_offload=True)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_full_backward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        gradients(model)
    hook.remove()
    assert all(map(torch.equal, plain, gradients(model)))


def test_it_is_read_with_checkpointing_only():
    data = {"data": {"sft": [{"name": "x", "path": "x"}]}}
    with pytest.raises(UserError, match=r"activation_offload is read with activation_checkpointing=true only"):
        load_recipe(data | {"sft": {"activation_offload": True}})
    with pytest.raises(UserError, match=r"activation_offload is not read with compile=true"):
        load_recipe(data | {"sft": {"activation_checkpointing": True, "activation_offload": True, "compile": True}})
    sections = [Sft(activation_checkpointing=True, activation_offload=on) for on in (False, True)]
    assert sections[0].key() == sections[1].key()  # nothing runs again
