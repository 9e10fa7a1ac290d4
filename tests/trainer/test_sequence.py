"""Ranks that share packed rows, as threads of one process: what they compute, hold and refuse. Processes do the same in
test_engines.py, check `sliced`."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import FAMILIES, model_of
from training import recipe_of, stage_in
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from strop.kernels import Group, PackedGroups
from strop.kernels.integrations.transformers import register
from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.loading import ModelFolder
from strop.trainer.models.reward import Rewarder, packs
from strop.trainer.models.sequence import Sequence, SlicedGroups, hidden_states
from strop.trainer.run.console import Console
from strop.trainer.sharding import Auto, Fsdp, Local
from strop.trainer.training.local import Engine
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.mesh import Mesh, check_sequence
from strop.trainer.training.probe import probe

CPU, QUIET = torch.device("cpu"), Console(enabled=False)


@dataclass(frozen=True)
class Thread(Sequence):
    """A rank that is a thread. board: what each rank has to give."""

    board: list | None = None
    barrier: Barrier | None = None

    def _meet(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.board[self.rank] = x.detach()
        self.barrier.wait(60)
        found = list(self.board)
        self.barrier.wait(60)
        return found

    def all_to_all(self, x):
        assert x.is_contiguous() and len(x) == self.size  # as torch.distributed needs it
        return torch.stack([part[self.rank] for part in self._meet(x)])

    def all_gather(self, x):
        assert x.is_contiguous()
        return torch.stack(self._meet(x))


def on_ranks(size: int, function) -> list:
    """function(sequence) on every rank, in their order."""
    board, barrier = [None] * size, Barrier(size)

    def run(rank: int):
        try:
            return function(Thread(rank, size, board=board, barrier=barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def random_model(kind: str = "llama", heads: int = 4, kv_heads: int = 2, reward: bool = False, **keys):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=90, hidden_size=4 * heads, intermediate_size=32, num_hidden_layers=2, head_dim=4,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=256, initializer_range=0.3,
        pad_token_id=0, num_labels=1, **keys)
    make = (AutoModelForSequenceClassification if reward else AutoModelForCausalLM).from_config
    model = make(config, attn_implementation=register()).train()
    register(model)
    return model


TOKENS = st.lists(st.integers(1, 89), min_size=1, max_size=9)


@st.composite
def groups(draw) -> list[Group]:
    """Prompts, some empty, each with completions, some of whose tokens are not in the loss."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        completions = draw(st.lists(TOKENS, min_size=1, max_size=3))
        masks = [draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c))) for c in completions]
        found.append(Group(draw(st.lists(st.integers(1, 89), max_size=12)), completions, masks))
    return found


@settings(max_examples=40, deadline=None)
@given(groups(), st.integers(1, 5))
def test_slices_hold_every_row_target_and_end_once(rows, size):
    """The rows, in order, and one copy of each value where the joined ones are looked up."""
    whole = PackedGroups.pack(rows)
    slices = [SlicedGroups.of(whole, Sequence(rank, size)) for rank in range(size)]
    held = torch.cat([s.rows for s in slices])
    assert torch.equal(held[:whole.num_tokens], torch.arange(whole.num_tokens))
    assert (held[whole.num_tokens:] == whole.num_tokens - 1).all() and len(held) < whole.num_tokens + size
    assert len({len(s.pred_rows) for s in slices}) == len({len(s.end_rows) for s in slices}) == 1
    predicted = torch.cat([s.rows[s.pred_rows] for s in slices])
    targets, ends = torch.cat([s.own_target for s in slices]), torch.cat([s.rows[s.end_rows] for s in slices])
    for s in slices:
        assert torch.equal(predicted[s.target_places], whole.pred_index)
        assert torch.equal(targets[s.target_places], whole.target)
        assert torch.equal(ends[s.end_places], torch.tensor([end - 1 for _, end in whole.completion_bounds]))
        assert s.num_targets == whole.num_targets and s.num_tokens == whole.num_tokens
    left = torch.ones(len(targets), dtype=torch.bool)
    left[slices[0].target_places] = False
    assert (targets[left] == -100).all()  # nothing is predicted twice


@pytest.mark.parametrize(("size", "heads", "kv_heads", "value_size"), [
    (2, 4, 2, 5), (3, 6, 3, 5), (4, 4, 2, 5), (4, 12, 6, 3), (2, 2, 1, 5), (1, 3, 1, 5)])
def test_heads_and_back(size, heads, kv_heads, value_size):
    """Every rank gets its heads of all tokens, with the key heads that they attend to, and its slice of the result."""
    tokens, length = 11, -(-11 // size)
    q, k, v = torch.randn(heads, tokens, 5), torch.randn(kv_heads, tokens, 5), torch.randn(kv_heads, tokens, value_size)

    def run(sequence):
        own = slice(sequence.rank * length, (sequence.rank + 1) * length)
        padded = [torch.nn.functional.pad(x, (0, 0, 0, size * length - tokens))[None, :, own] for x in (q, k, v)]
        found = sequence.to_heads(*padded, tokens)
        return found, sequence.to_tokens(found[0])

    found = on_ranks(size, run)
    mine = heads // size
    for rank, ((own_q, own_k, own_v), back) in enumerate(found):
        assert torch.equal(own_q[0], q[rank * mine:(rank + 1) * mine])
        ratio = mine // own_k.shape[1]
        for head in range(mine):
            of_whole = (rank * mine + head) // (heads // kv_heads)
            assert torch.equal(own_k[0, head // ratio], k[of_whole])
            assert torch.equal(own_v[0, head // ratio], v[of_whole])
        rows = q[:, rank * length:(rank + 1) * length]
        assert torch.equal(back[0, :, :rows.shape[1]], rows) and not back[0, :, rows.shape[1]:].any()


def test_heads_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="6 attention heads cannot be divided among 4 ranks"):
        Sequence(0, 4).to_heads(*[torch.zeros(1, 6, 2, 4)] * 3, 8)


MODELS = {"gqa": {}, "one key head": {"kv_heads": 1}, "12 heads, 6 key heads": {"heads": 12, "kv_heads": 6},
          "windows and soft-caps": {"kind": "gemma2", "sliding_window": 5}, "head norms": {"kind": "qwen3"}}


@pytest.mark.parametrize("name", MODELS)
def test_slices_give_the_log_probs_and_gradients_of_the_whole(name):
    model = random_model(**MODELS[name])

    @settings(max_examples=4, deadline=None)
    @given(groups(), st.sampled_from([2, 4]))
    def check(rows, size):
        whole = PackedGroups.pack(rows)
        weights = torch.randn(whole.num_targets)

        def run(model, groups):
            model.zero_grad()
            logp, stats = Scorer(model)(groups, ("top1", "entropy"))
            (logp * weights).sum().backward()
            return logp.detach(), stats, {n: p.grad for n, p in model.named_parameters()}

        logp, stats, grads = run(model, whole)
        found = on_ranks(size, lambda s: run(copy.deepcopy(model), SlicedGroups.of(whole, s)))
        for own, own_stats, _ in found:
            torch.testing.assert_close(own, logp, atol=2e-5, rtol=0)
            assert torch.equal(own_stats["top1"], stats["top1"]) and not own_stats["entropy"].requires_grad
            torch.testing.assert_close(own_stats["entropy"], stats["entropy"], atol=2e-5, rtol=0)
        for name, grad in grads.items():
            total = sum(own[name] for *_, own in found)
            torch.testing.assert_close(total, grad, atol=2e-5 * max(1.0, grad.abs().max().item()), rtol=0)

    check()


def test_slices_give_the_scores_of_the_whole():
    model = random_model(reward=True)
    whole = PackedGroups.pack([Group([3, 4, 5], [[6, 7], [8]]), Group([9], [[1] * 8, [2, 3], [4]])])
    scores = Rewarder(model)(whole)
    scores.square().sum().backward()
    grad = model.score.weight.grad.clone()

    def run(sequence):
        own = copy.deepcopy(model)
        own.zero_grad()
        assert packs(own, QUIET, sequence)
        found = Rewarder(own)(SlicedGroups.of(whole, sequence))
        found.square().sum().backward()
        return found.detach(), own.score.weight.grad

    found = on_ranks(2, run)
    assert all(torch.allclose(own, scores, atol=1e-5) for own, _ in found)
    torch.testing.assert_close(sum(grad for _, grad in found), grad, atol=1e-4, rtol=1e-5)


def test_a_rank_saves_its_slice_and_its_heads_only():
    """Bytes that the body's forward pass saves: a quarter on each of four ranks, with attention's output in a second
    copy, by tokens."""
    model = random_model(heads=8, kv_heads=4)
    whole = PackedGroups.pack([Group([3] * 300, [[4] * 100, [5] * 110])])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tables = {t.untyped_storage().data_ptr() for t in whole._tensors().values()}

    def saved(groups) -> int:
        found = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own | tables:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden_states(model.get_decoder(), groups)
        return sum(size for size, _ in found.values())

    alone = saved(whole)
    for size in on_ranks(4, lambda s: saved(SlicedGroups.of(whole, s))):
        assert size < 1.01 * (alone + 2 * 510 * 32 * 4) / 4


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_the_probe_refuses_what_cannot_be_sliced():
    """A model that runs packed, but adds what the row begins with, and one that does not run packed."""
    model = random_model()
    assert on_ranks(2, lambda s: probe(copy.deepcopy(model), QUIET, s)) == [True, True]

    def first_token(sequence):
        own, said = copy.deepcopy(model), []

        def shift(module, inputs, output):
            return output + 0.5 * output[:, :1]

        own.get_input_embeddings().register_forward_hook(shift)
        try:
            probe(own, QUIET, sequence)
        except UserError as e:
            said.append(str(e))
        return said

    (said,), _ = on_ranks(2, first_token)
    assert said.startswith("engine.sequence_parallel=2: LlamaForCausalLM does not run in slices of a packed row")
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match=r"does not run in slices .*; set engine.sequence_parallel=1"):
        probe(model, QUIET, Sequence(0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_slices(family):
    model = model_of(family)
    assert on_ranks(4, lambda s: probe(copy.deepcopy(model), QUIET, s)) == [True] * 4


@pytest.mark.parametrize("kind", [Auto, Local, Fsdp])
def test_ranks_and_heads_that_it_does_not_divide_are_refused(tiny_model, tmp_path, kind):
    folder = ModelFolder(tiny_model)
    for size, ranks in ((1, 3), (2, 2), (4, 8), (2, None)):
        check_sequence(kind(sequence_parallel=size), folder, ranks, {})
    with pytest.raises(UserError, match=r"sequence_parallel=2: 3 rank\(s\) cannot be divided into groups of 2"):
        check_sequence(kind(sequence_parallel=2), folder, 3, {})
    with pytest.raises(UserError, match=r"sequence_parallel=3: .* has 4 attention heads"):
        check_sequence(kind(sequence_parallel=3), folder, 6, {})
    check_sequence(kind(sequence_parallel=3), ModelFolder(tmp_path), 6, {})  # not downloaded yet


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_look_at_the_whole_row_are_refused(tiny_model, tmp_path, kind):
    config = json.loads((tiny_model / "config.json").read_text())
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(UserError, match=f"rope_type={kind}, which depend on the longest position"):
        check_sequence(Local(sequence_parallel=2), ModelFolder(tmp_path), 2, {})


def test_it_is_refused_before_anything_runs(tiny_recipe, capsys):
    assert main([str(tiny_recipe), "engine.sequence_parallel=2"]) == 1
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and "engine.sequence_parallel=2: 1 rank(s) cannot be divided" in shown[0], shown
    assert not list((tiny_recipe.parent / "runs").rglob("manifest.json"))
    assert main([str(tiny_recipe), "engine.sequence_parallel=2", "--plan", "--on", "8x80GB"]) == 0
    assert main([str(tiny_recipe), "engine.sequence_parallel=2", "--plan", "--on", "3x80GB"]) == 0
    assert "needs: unknown: engine.sequence_parallel=2: 3 rank(s)" in capsys.readouterr().out
    assert main([str(tiny_recipe), "engine.sequence_parallel=2", "dpo.compile=true", "--plan"]) == 1
    assert "the layers that dpo.compile=true compiles would have to exchange slices" in capsys.readouterr().err
    for keys in ({"sequence_parallel": 0}, {"sequence_parallel": 1.5}):
        with pytest.raises(UserError, match=r"engine.sequence_parallel"):
            load_recipe({"data": {"sft": [{"name": "x", "path": "x"}]}, "engine": keys})


def test_a_step_of_shared_rows_cannot_begin_anew_on_one_rank(tmp_path, tiny_model):
    recipe = recipe_of()
    engine = Engine(ModelFolder(tiny_model), recipe.sft, stage_in(tmp_path, "sft"), 4, compute=recipe, lora=recipe.lora,
                    seed=0)
    assert engine.discard()
    engine.mesh = Mesh(SimpleNamespace(size=2), 0, 1, Sequence(0, 2))
    assert not engine.discard()
