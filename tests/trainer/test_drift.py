"""KL to the start weights: against a sum written out, its standard error, and what a round records of it."""

import statistics

import pytest
import torch
from stagecalls import held_out
from training import recipe_of, stage_in

from strop.trainer.models.kl import drift, ratio
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table

CPU = torch.device("cpu")
ROWS = [([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14, 15, 16]), ([20] * 9, [21])]


@pytest.fixture(scope="module")
def moved(tiny_model, tmp_path_factory):
    """The tiny model with its weights shaken."""
    model = ModelFolder(tiny_model).load(torch.float32, CPU, "sdpa")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("moved")
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def by_hand(model, start, rows):
    """Sum over the vocabulary at each completion token, a row at a time from the models' own logits in fp64."""
    sums = []
    for prompt, completion in rows:
        tokens = torch.tensor([[*prompt, *completion]])
        p, q = (m(tokens).logits[0, len(prompt) - 1:-1].double().log_softmax(-1) for m in (model, start))
        sums.append((p.exp() * (p - q)).sum().item())
    return sums


def test_it_is_the_kl_summed_over_the_vocabulary(tiny_model, moved, monkeypatch):
    sums = by_hand(*(ModelFolder(m).load(torch.float32, CPU, "sdpa") for m in (moved, tiny_model)), ROWS)
    monkeypatch.setattr("strop.trainer.models.kl.CHUNK", 2)
    for budget in (1, 20, 4096):  # each row alone, two together, all together
        monkeypatch.setattr("strop.trainer.models.kl.BUDGET", budget)
        found = drift({"sft": ModelFolder(moved)}, {"sft": ROWS}, ModelFolder(tiny_model), torch.float32, CPU)["sft"]
        assert found["kl"] == pytest.approx(sum(sums) / 8, rel=1e-4) and found["kl"] > 1e-3
        assert (found["prompts"], found["tokens"]) == (3, 8)


def test_the_same_weights_have_not_moved(tiny_model):
    same = ModelFolder(tiny_model)
    assert drift({"base": same}, {"base": ROWS}, same, torch.bfloat16, CPU)["base"]["kl"] == 0.0


def test_the_standard_error_is_that_of_a_ratio_of_means():
    even = ratio([1.0, 2.0, 6.0], [4, 4, 4])  # equal lengths: the standard error of a plain mean
    assert even["kl"] == 0.75
    assert even["stderr"] == pytest.approx(statistics.stdev([0.25, 0.5, 1.5]) / 3 ** 0.5)
    assert ratio([1.0], [2])["stderr"] is None and ratio([2.0, 4.0], [1, 2])["stderr"] == 0.0


def test_evaluate_records_it_for_every_candidate(tiny_model, moved, tmp_path):
    import pyarrow as pa

    from strop.trainer.run.tables import write_table
    from strop.trainer.stages.prompts import SCHEMA

    rows = [{"prompt_id": f"p{i}", "source": "s", "split": "validation" if i < 3 else "test", "answer": "1",
             "messages": [{"role": "user", "content": f"say {i}"}], "conversational": False,
             "metadata": "{}"} for i in range(6)]
    write_table(tmp_path / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    for file in tiny_model.iterdir():
        if not (moved / file.name).exists():
            (moved / file.name).write_bytes(file.read_bytes())
    recipe = recipe_of(evaluate={"max_new_tokens": 6, "kl_prompts": 2})
    stage = stage_in(tmp_path / "out", "round-00/evaluate")
    held_out(stage, recipe, prompts=tmp_path, candidates={"sft": moved}, start=tiny_model)
    found = read_json(stage.dir / "kl.json")["sft"]
    own = {r["prompt_id"]: r["tokens"] for r in read_table(stage.dir / "completions.parquet").to_pylist()}
    assert found["prompts"] == 2 and found["tokens"] == len(own["p0"]) + len(own["p1"])
    assert stage.counts["sft/kl"] == found["kl"] > 0
    off = stage_in(tmp_path / "off", "round-00/evaluate")
    held_out(off, recipe_of(evaluate={"max_new_tokens": 6, "kl_prompts": 0}), prompts=tmp_path,
             candidates={"sft": moved}, start=tiny_model)
    assert not (off.dir / "kl.json").exists() and "sft/kl" not in off.counts
