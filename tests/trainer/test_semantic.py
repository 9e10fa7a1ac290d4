"""Semantic duplicates: the greedy choice against brute force, clusters, ranks, embeddings, and the stage."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stagecalls import select
from transformers import BertConfig, BertModel

from strop.trainer.config import Recipe
from strop.trainer.data import semantic
from strop.trainer.data.semantic import cluster, ranked, semantic_duplicates
from strop.trainer.errors import UserError
from strop.trainer.methods.running import open_run
from strop.trainer.models.embedder import Embedder, find_embedder
from strop.trainer.run.tables import read_table
from strop.trainer.stages import select as select_stage

sys.path.insert(0, str(Path(__file__).parent))
from chats import tokenizer_of
from rounds import prompts_of, round_of
from training import stage_in

CPU = torch.device("cpu")


def unit(rows) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(np.asarray(rows, np.float32)), dim=1).half()


def brute_force(embeddings, threshold, order, groups):
    """{dropped row: the best kept row of its cluster within the threshold}, and all cosines."""
    cosines = embeddings.double() @ embeddings.double().T
    kept, gone = [], {}
    for i in order:
        match = next((j for j in kept if groups[i] == groups[j] and cosines[i, j] >= threshold), None)
        if match is None:
            kept.append(i)
        else:
            gone[i] = match
    return gone, cosines


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_dropped_is_what_brute_force_drops(data):
    n, seed = data.draw(st.integers(1, 90)), data.draw(st.integers(0, 2 ** 16))
    draw = np.random.default_rng(seed)
    base = draw.normal(size=(max(1, n // 3), 6))
    x = unit(base[draw.integers(len(base), size=n)] + data.draw(st.sampled_from([0.0, 0.1, 0.5])) * draw.normal(
        size=(n, 6)))
    threshold, clusters = data.draw(st.sampled_from([0.5, 0.9, 0.99])), data.draw(st.integers(1, 5))
    order = draw.permutation(n).tolist()
    groups = cluster(x, clusters, seed).tolist()
    expected, cosines = brute_force(x, threshold, order, groups)
    assume(not ((cosines - threshold).abs() < 1e-5).any())
    with pytest.MonkeyPatch.context() as m:  # several blocks of either kind
        m.setattr(semantic, "BLOCK", 7)
        m.setattr(semantic, "KEPT", 5)
        found = list(semantic_duplicates(x, threshold, order, seed, clusters))
    assert {i: j for i, j, _ in found} == expected and len(found) == len(expected)
    assert all(abs(cosine - cosines[i, j]) < 1e-4 for i, j, cosine in found)


def test_clusters_are_deterministic_and_hold_what_belongs_together():
    draw = np.random.default_rng(3)
    centers = draw.normal(size=(4, 16))
    of = draw.integers(4, size=400)
    x = unit(centers[of] + 0.05 * draw.normal(size=(400, 16)))
    groups = cluster(x, 4, seed=1)
    assert torch.equal(groups, cluster(x, 4, seed=1))
    assert len({(a, b) for a, b in zip(of.tolist(), groups.tolist(), strict=True)}) == 4  # one to one
    assert cluster(x, 1).unique().tolist() == [0] and len(cluster(x[:0], 3)) == 0
    assert list(semantic_duplicates(x[:0], 0.9, [])) == []


def test_rows_that_are_all_the_same_do_not_break_clusters():
    x = unit(np.ones((50, 8)))
    found = list(semantic_duplicates(x, 0.99, range(49, -1, -1), clusters=5))
    assert {j for _, j, _ in found} == {49} and len(found) == 49


def test_rows_are_ranked_by_quality_times_difficulty():
    assert ranked([1.0, 1.0, 0.5], [0.1, 0.9, 0.9]) == [1, 2, 0]
    assert ranked([0.5, 1.0], [0.0, 0.0]) == [1, 0]  # equal products: the better one
    assert ranked([1.0, 1.0, None], [0.5, 0.5, None]) == [2, 0, 1]
    assert ranked([-3.0, -1.0], [0.5, 0.5]) == [1, 0]  # harder is not worse where quality is negative
    assert ranked([-1.0, -1.0, -2.0], [0.1, 0.9, 0.9]) == [1, 0, 2]


# ---- embeddings

@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of a random encoder as sentence-transformers saves it."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = tokenizer_of("chatml")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64, initializer_range=0.5)
    BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True,
                                                                  "pooling_mode_cls_token": False}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    return folder


def test_an_embedding_is_the_mean_of_hidden_states_whatever_the_batch(bert):
    embedder = Embedder(bert, torch.float32, CPU)
    texts, seen = ["a much longer text than that, cut", "ab", "", "abcdefgh"], []
    found = embedder.embed([*texts[:2], *texts[3:]], seen.append)
    assert sum(seen) == 3 and found.dtype == torch.float16
    for text, vector in zip([*texts[:2], *texts[3:]], found, strict=True):
        ids = torch.tensor([embedder.tokenizer(text)["input_ids"][:24]])
        with torch.no_grad():
            mean = embedder.model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector.float(), mean / mean.norm(), atol=2e-3, rtol=0)
    assert embedder.embed([]).shape == (0, 16)


def test_equal_texts_are_computed_once_and_batches_have_one_length(bert, monkeypatch):
    embedder = Embedder(bert, torch.float32, CPU)
    texts = ["ab", "abcd", "ab", "a" * 23 + "x", "cd", "a" * 23 + "y", "ab", "b" * 30 + "x", "b" * 30 + "y"]
    shapes, real, seen = [], embedder.model.forward, []
    embedder.model.forward = lambda **batch: shapes.append(tuple(batch["input_ids"].shape)) or real(**batch)
    whole = embedder.embed(texts, seen.append)
    assert sum(seen) == len(texts) and sum(n for n, _ in shapes) == 6  # the last two are equal where they are cut
    assert torch.equal(whole[0], whole[2]) and torch.equal(whole[7], whole[8]) and not torch.equal(whole[0], whole[4])
    monkeypatch.setattr("strop.trainer.models.embedder.TOKENS", 24)
    shapes.clear()
    torch.testing.assert_close(embedder.embed(texts), whole, atol=2e-3, rtol=0)
    assert max(n * length for n, length in shapes) <= 24 and len(shapes) == 5


def test_pooling_is_as_the_folder_says(bert, tmp_path):
    copy = Path(shutil.copytree(bert, tmp_path / "cls"))
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": true}')
    embedder = Embedder(copy, torch.float32, CPU)
    first = embedder.model(input_ids=torch.tensor([embedder.tokenizer("ab")["input_ids"]])).last_hidden_state[0, 0]
    torch.testing.assert_close(embedder.embed(["ab", "abcd"])[0].float(), first.detach() / first.detach().norm(),
                               atol=2e-3, rtol=0)
    pooling.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match=r"filter.embedder=.*pooling_mode_max_tokens"):
        Embedder(copy, torch.float32, CPU)
    (copy / "model.safetensors").write_bytes(b"torn")
    pooling.unlink()
    with pytest.raises(UserError, match=r"filter.embedder=.*cannot load"):
        Embedder(copy, torch.float32, CPU)


def test_an_embedder_is_a_folder_or_one_in_a_package(bert, tmp_path, monkeypatch):
    assert find_embedder(str(bert)) == bert
    with pytest.raises(UserError, match=r"filter.embedder=nowhere: no folder with a config.json"):
        find_embedder("nowhere")
    with pytest.raises(UserError, match=r"filter.embedder=package:no_such_thing: .* not installed"):
        find_embedder("package:no_such_thing")
    shutil.copytree(bert, tmp_path / "some_embedder" / "model")
    (tmp_path / "some_embedder" / "__init__.py").write_text("")
    (tmp_path / "no_embedder").mkdir()
    (tmp_path / "no_embedder" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_embedder("package:some_embedder") == tmp_path / "some_embedder" / "model"
    with pytest.raises(UserError, match="holds 0 model folders"):
        find_embedder("package:no_embedder")


# ---- the stage

class Words:
    """A fake embedder: the set of a text's letters."""

    def __init__(self, *how):
        pass

    def embed(self, texts, advance):
        assert texts, "no model is loaded for nothing"
        advance(len(texts))
        return unit([[1e-3, *(float(chr(97 + i) in text.split("\n")[-1]) for i in range(26))] for text in texts])


def selected(tmp_path, monkeypatch, samples, model, data=None, **filters):
    monkeypatch.setattr(select_stage, "Embedder", Words)
    stage = stage_in(tmp_path / "select", "round-00/select")
    sources = {"sources": [{"name": "s", "path": "x", "verifier": "exact"}]}
    recipe = Recipe.model_validate({"dtype": "float32", "data": sources | (data or {}), "filter": filters,
                                    "select": {"sft_min_score": None}})
    select(stage, recipe, round=0, prompts=prompts_of(tmp_path / "prompts", samples), model=model,
           history=[round_of(tmp_path / "r", samples)], embedder=Path("x"), compute=recipe)
    return *(read_table(stage.dir / f"{t}.parquet").to_pylist() for t in ("sft", "drops")), stage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer_of("chatml").save_pretrained(folder)
    return folder


def test_each_drop_names_the_better_row_it_was_dropped_for(tmp_path, monkeypatch, model):
    samples = {"p1": [("abc", 1.0), ("zzz", 1.0)], "p2": [("cab", 1.0), ("x", 0.0)], "p3": [("xyz", 1.0)]}
    sft, drops, stage = selected(tmp_path, monkeypatch, samples, model, semantic=0.95)
    assert [r["prompt_id"] for r in sft] == ["p2", "p3"]  # p2 is harder than p1
    (drop,) = [d for d in drops if d["reason"] == "semantic_duplicate"]
    assert (drop["prompt_id"], drop["source"]) == ("p1", "s")
    assert drop["detail"].endswith(" like round-00/p2/0") and drop["detail"].startswith("round-00/p1/")
    assert stage.counts["dropped/semantic_duplicate"] == 1 and stage.counts["sft_rows"] == 2


def test_ready_rows_come_first_and_are_left_alone_if_they_keep_near_duplicates(tmp_path, monkeypatch, model):
    path = tmp_path / "ready.jsonl"
    rows = [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(["abc", "bca"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for near, kept in ((True, ["ready/1"]), (False, ["round-00/p1/0", "ready/1", "ready/2"])):
        folder = tmp_path / str(near)
        folder.mkdir()
        sft, drops, _ = selected(folder, monkeypatch, {"p1": [("cab", 1.0)]}, model, semantic=0.9, data={
            "sft": [{"name": "ready", "path": str(path), "near_duplicates": near}]})
        assert [r["row_id"] for r in sft] == kept
        assert all(d["detail"].endswith("like ready/1") for d in drops if d["reason"] == "semantic_duplicate")


def test_templated_sources_are_left_alone(tmp_path, monkeypatch, model):
    sources = [{"name": "s", "path": "x", "verifier": "exact", "templated": True}]
    sft, _, stage = selected(tmp_path, monkeypatch, {"p1": [("abc", 1.0)], "p2": [("abc", 1.0)]}, model, semantic=0.9,
                             data={"sources": sources})
    assert len(sft) == 2 and stage.counts["semantic_compared"] == 0


def test_scorers_of_the_recipe_are_quality_and_difficulty(tmp_path):
    scorers = [{"rule": "exact"}, {"rule": "number", "weight": 0}]
    recipe = Recipe.model_validate({"data": {"sources": [{"name": "s", "path": "x", "scorers": scorers}]},
                                    "filter": {"difficulty": "number"}})
    s = {"values": {"exact": (0.5, None), "number": (0.75, None)}, "score": 0.5, "completion": "c"}
    assert select_stage._rank(s, "q", 0.0, recipe.filter) == {"text": "q\nc", "quality": 0.5, "difficulty": 0.75}
    with pytest.raises(ValueError, match=r"filter.quality names the scorer nobody"):
        Recipe.model_validate({"data": {"sources": [{"name": "s", "path": "x", "scorers": scorers}]},
                               "filter": {"quality": "nobody"}})


def test_a_run_embeds_its_rows_and_depends_on_the_embedder(tiny_recipe, bert, tmp_path):
    """Strop's command line to drops.parquet; another embedder makes the selection stale, a copy of it does not."""
    here = Path(shutil.copytree(bert, tmp_path / "embedder"))
    keys = {"rounds": 1, "filter.semantic": 0.6, "filter.embedder": str(here), "dpo.enabled": False}

    def selected(where):
        with open_run(tiny_recipe, keys | {"filter.embedder": str(where)}) as run:
            for _ in run.rounds(1):
                prompts = run.prompts()
                samples = run.sample(run.recipe.sample, run.start, prompts)
                scores = run.score(run.recipe.score, samples, prompts)
                return run.select(run.recipe.select, prompts, [(samples, scores)])

    first = selected(here)
    counts = json.loads((first.path / "manifest.json").read_text())["counts"]
    assert counts["semantic_compared"] == counts["sft_rows"] + counts["dropped/semantic_duplicate"] > counts["sft_rows"]
    assert selected(shutil.copytree(here, tmp_path / "copy")).hash == first.hash
    made = (first.path / "manifest.json").read_bytes()
    (here / "config.json").write_text((here / "config.json").read_text() + "\n")
    selected(here)
    assert (first.path / "manifest.json").read_bytes() != made
