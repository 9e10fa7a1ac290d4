"""Losses that need no pairs: KTO, BCO and Plackett-Luce, from rated.parquet to weights."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from stagecalls import dpo, reference
from training import Log, largest_difference, recipe_of, stage_in
from transformers import AutoModelForCausalLM

from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.stages.select import RATED
from strop.trainer.training.batch import plan_steps
from strop.trainer.training.local import Engine
from strop.trainer.training.rated import load_rated, mismatched

sys.path.insert(0, str(Path(__file__).parent))
CPU = torch.device("cpu")
LOSSES = ("kto", "bco", "listwise")


def rated_of(folder: Path, lists: int = 8, seed: int = 0) -> Path:
    """A select artifact of `lists` prompts with 2 to 4 random completions each, some of equal score."""
    draw, rows = random.Random(seed), []

    def ids(low, high):
        return [draw.randrange(3, 90) for _ in range(draw.randint(low, high))]

    for i in range(lists):
        prompt, scores = ids(3, 12), sorted([2.0, 0.0, *draw.choices([0.0, 1.0, 2.0], k=i % 3)], reverse=True)
        for j, score in enumerate(scores):
            tokens = ids(2, 9)
            rows.append({"row_id": f"r{i}/{j}", "list_id": f"r{i}", "source": "s", "prompt_id": f"p{i}",
                         "sample_index": j, "prompt_tokens": prompt, "completion_tokens": tokens, "score": score,
                         "loss_mask": [True] * len(tokens), "template": [False] * (len(tokens) - 1) + [True],
                         "desirable": score > 1, "weight": 1.0, "origin": "round-00", "writer": "current",
                         "writer_hash": "mine", "logp": -1.0})
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "rated.parquet", pa.Table.from_pylist(rows, schema=RATED))
    return folder


def run(tmp_path, name, loss, model, log=None, ref=None, **keys):
    """The stages reference and dpo on the same rows."""
    recipe = recipe_of(dpo={"loss": loss, "batch_size": 6, "lr": 1e-3, "epochs": 2, "eval_steps": 0} | keys)
    select = rated_of(tmp_path / "select")
    table, stage = stage_in(tmp_path / f"{name}-reference", "reference"), stage_in(tmp_path / name, "dpo", log)
    reference(table, recipe, select=select, model=ref or model)
    table.world.barrier()
    dpo(stage, recipe, select=select, policy=model, reference=table.dir, same_weights=ref is None, policy_hash="mine")
    return stage


@pytest.fixture(scope="module")
def moved(tiny_model, tmp_path_factory):
    """Reference weights: the tiny model a little off."""
    folder = tmp_path_factory.mktemp("models") / "moved"
    model, draw = AutoModelForCausalLM.from_pretrained(tiny_model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.02)
    model.save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def first_step(tmp_path, loss, model, ref, **keys):
    """Gradients by name and log lines of a run whose learning rate leaves the weights where they are."""
    kept, log = {}, Log()

    class Keeping(Engine):
        def step(self):
            if not kept:
                kept.update({n: g.clone() for n, g in zip(self.names, self.weights.gradients(), strict=True)})
            return super().step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strop.trainer.training.local.Engine", Keeping)
        run(tmp_path, f"{loss}-{len(os.listdir(tmp_path))}", loss, model, log, ref, lr=1e-12, grad_clip=0.0, **keys)
    return kept, log.rows


def naive(tmp_path, loss, model, ref, **keys):
    """The same from plain logits of separate rows: (gradients of the first step, a line per step)."""
    recipe = recipe_of(dpo={"loss": loss, "batch_size": 6, "epochs": 2} | keys)
    rows = load_rated(stage_in(tmp_path / "naive", "dpo"), tmp_path / "select" / "rated.parquet", recipe.dpo,
                      recipe.dpo.rows, 512, record=False)
    policy, reference = (AutoModelForCausalLM.from_pretrained(m, attn_implementation="eager") for m in (model, ref))

    def ratio(prompt, completion):
        row, start = torch.tensor([[*prompt, *completion]]), len(prompt)
        both = [m(row).logits[0, start - 1:-1].log_softmax(-1).gather(1, row[0, start:, None]).sum()
                for m in (policy, reference)]
        return both[0] - both[1].detach()

    kept, lines, seen, count = {}, [], 0.0, 0
    for step in plan_steps(rows, 2, 6, 0):
        ratios = [[ratio(rows[i].group.prompt, c) for c in rows[i].group.completions] for i in step]
        line = {}
        if loss == "listwise":
            value = sum(torch.logsumexp(torch.stack([0.1 * mine[k] for k in range(len(mine))
                                                     if k == j or rows[i].ratings[k] < rows[i].ratings[j]]), 0)
                        - 0.1 * mine[j] for i, mine in zip(step, ratios, strict=True) for j in range(len(mine)))
        else:
            flat = torch.stack([mine[0] for mine in ratios])
            good = torch.tensor([rows[i].ratings[0] > 0 for i in step])
            if loss == "kto":
                others = [ratio(rows[i].group.prompt, rows[other(rows, step, at)].group.completions[0])
                          for at, i in enumerate(step)]
                z = line["kl"] = max(0.0, torch.stack(others).mean().item())
                value = torch.where(good, torch.sigmoid(0.1 * (z - flat)), torch.sigmoid(0.1 * (flat - z))).sum()
            else:
                seen, count = seen + 0.1 * flat.sum().item(), count + len(step)
                d = line["delta"] = seen / count
                shifted = 0.1 * flat - d
                value = -torch.nn.functional.logsigmoid(torch.where(good, shifted, -shifted)).sum()
        value = value / len(step)
        lines.append(line | {"loss": value.item()})
        if not kept:
            value.backward()
            kept = {n: p.grad for n, p in policy.named_parameters()}
    return kept, lines


def other(rows, step, at):
    """The completion before it in the step that belongs to another prompt."""
    prompts = [rows[i].group.prompt for i in step]
    return next(step[at - n] for n in range(1, len(step)) if prompts[at - n] != prompts[at])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_equals_plain_logits_of_separate_rows(tmp_path, tiny_model, moved, loss):
    """Packed in one microbatch and in several; z and d of every step."""
    found, lines = first_step(tmp_path, loss, tiny_model, moved)
    expected, naively = naive(tmp_path, loss, tiny_model, moved)
    for line, plain in zip(lines, naively, strict=True):
        for name, value in plain.items():
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert (len(lines) > 2 and loss == "listwise") or abs(lines[-1]["kl" if loss == "kto" else "delta"]) > 1e-3
    apart, several = first_step(tmp_path, loss, tiny_model, moved, max_tokens=60)
    for name, value in expected.items():
        for mine in (found, apart):
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(lines, several, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


@pytest.mark.parametrize("loss", LOSSES)
def test_it_starts_where_the_formula_says_resumes_to_the_same_bits_and_learns(tmp_path, tiny_model, loss):
    log, keys = Log(), {"checkpoint_steps": 1, "epochs": 4}
    whole = run(tmp_path, "whole", loss, tiny_model, log, **keys)
    first, last = log.rows[0], log.rows[-1]
    assert last["loss"] < first["loss"] and abs(first["rewards/margins"]) < 1e-5 < last["rewards/margins"]
    if loss != "listwise":
        assert first["loss"] == pytest.approx({"kto": 0.5, "bco": math.log(2)}[loss], abs=1e-6)
        assert first["kl" if loss == "kto" else "delta"] == pytest.approx(0, abs=1e-5) and "nll_loss" not in first
        assert whole.counts["completions"] == read_table(tmp_path / "select" / "rated.parquet").num_rows
        assert 0 < whole.counts["desirable"] < whole.counts["completions"]
    else:
        assert whole.counts["lists"] == 8
    assert whole.counts["off_policy_share"] == 0 and "writer_log_ratio" in whole.counts
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "killed", loss, tiny_model, Log(stop_at=3), **keys)
    log = Log()
    again = run(tmp_path, "killed", loss, tiny_model, log, **keys)
    assert log.rewound_to == 2 and largest_difference(whole.dir / "model", again.dir / "model") == 0.0


def test_weights_of_labels_are_those_of_the_loss(tmp_path, tiny_model):
    log = Log()
    run(tmp_path, "dpo", "bco", tiny_model, log, desirable_weight=2.0, undesirable_weight=0.5, batch_size=99)
    labels = [row["desirable"] for row in read_table(tmp_path / "select" / "rated.parquet").to_pylist()]
    expected = math.log(2) * (2.0 * sum(labels) + 0.5 * (len(labels) - sum(labels))) / len(labels)
    assert log.rows[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_a_prompt_is_never_matched_with_its_own_completion(tmp_path):
    recipe = recipe_of(dpo={"loss": "kto"})
    stage = stage_in(tmp_path / "s", "dpo")
    rows = load_rated(stage, rated_of(tmp_path / "select") / "rated.parquet", recipe.dpo, "labels", 512, record=False)
    of = {row.row_id: row for row in rows}
    whole = [list(range(len(rows)))]  # completions of a prompt follow each other
    for plan in (whole, [[i] for i in range(len(rows))], plan_steps(rows, 2.0, 5, 3)):
        found, steps = mismatched(rows, plan, 512)
        assert [len(step) for step in steps] == [len(step) for step in plan]
        for step, mine in zip(plan, steps, strict=True):
            for i, example in zip(step, (found[k] for k in mine), strict=True):
                here, there = (of[name] for name in example.row_id.split(" < "))
                assert here is rows[i] and list(example.group.prompt) == list(here.group.prompt)
                assert example.group.completions == there.group.completions and here.row_id[:2] != there.row_id[:2]
        assert len({e.row_id for e in found}) == len(found)
    longest = max(len(r.group.prompt) + len(r.group.completions[0]) for r in rows)
    tight, steps = mismatched(rows, whole, longest - 4)
    assert all(e.tokens <= longest - 4 for e in tight) and len(steps[0]) <= len(rows)
    with pytest.raises(UserError, match="all are of one prompt"):
        mismatched(rows[:2], [[0, 1]], 512)


def test_lists_keep_what_fits_and_two_scores(tmp_path):
    path, stage = rated_of(tmp_path / "select") / "rated.parquet", stage_in(tmp_path / "s", "dpo")
    recipe = recipe_of(dpo={"loss": "listwise"})
    whole = load_rated(stage, path, recipe.dpo, "lists", 512, record=True)
    assert [len(e.ratings) for e in whole] == [2 + i % 3 for i in range(8)] and not read_table(
        stage.dir / "drops.parquet").num_rows
    assert all(list(e.ratings) == sorted(e.ratings, reverse=True) and e.ranks[0] == 0 for e in whole)
    four = next(e for e in whole if len(e.ratings) == 4)
    tight = recipe_of(dpo={"loss": "listwise", "max_tokens": four.tokens - 1}).dpo
    kept = {e.row_id: e for e in load_rated(stage, path, tight, "lists", 512, record=True)}
    assert kept[four.row_id].group.completions[0] == four.group.completions[0]
    assert len(kept[four.row_id].ratings) < 4 and stage.counts["dropped/overlong"]
    rows = read_table(path).to_pylist()
    rows[0]["score"] = rows[1]["score"]
    rows[3]["completion_tokens"], rows[3]["loss_mask"], rows[3]["template"] = (
        rows[2][k] for k in ("completion_tokens", "loss_mask", "template"))
    write_table(path, pa.Table.from_pylist(rows, schema=RATED))
    stage = stage_in(tmp_path / "t", "dpo")
    left = load_rated(stage, path, recipe.dpo, "lists", 512, record=True)
    assert len(left) == 7 and stage.counts["dropped/tie"] == 1 and stage.counts["dropped/duplicate"] == 1


def test_masked_template_tokens_are_out_of_the_loss(tmp_path):
    path, stage = rated_of(tmp_path / "select") / "rated.parquet", stage_in(tmp_path / "s", "dpo")
    for masked in (False, True):
        section = recipe_of(dpo={"loss": "kto"} | ({"mask_template_tokens": True} if masked else {})).dpo
        for e in load_rated(stage, path, section, "labels", 512, record=False):
            assert e.targets() == [len(e.group.completions[0]) - masked]


@pytest.mark.parametrize("keys, words", [
    ({"dpo": {"loss": "kto", "nll_weight": 0.2}}, "nll_weight is not read by loss=kto; leave it out"),
    ({"dpo": {"loss": "bco", "label_smoothing": 0.1}}, "label_smoothing is not read by loss=bco"),
    ({"dpo": {"loss": "listwise", "nll_normalization": "sequence_sum"}}, "nll_normalization is not read by"),
    ({"dpo": {"loss": "listwise", "rpo_eta": 2.0}}, "rpo_eta is read with loss=rpo only"),
    ({"dpo": {"loss": "listwise", "desirable_weight": 2.0}}, "desirable_weight is read with loss=kto or bco only"),
    ({"dpo": {"undesirable_weight": 2.0}}, "undesirable_weight is read with loss=kto or bco only"),
    ({"dpo": {"loss": "kto", "batch_size": 1}}, "batch_size=1, but loss=kto compares"),
    ({"dpo": {"loss": "kto"}, "select": {"pair_margin": 0.1}}, "select.pair_margin is not read with dpo.loss=kto"),
    ({"dpo": {"loss": "listwise"}, "select": {"pairs_per_prompt": 2}}, "select.pairs_per_prompt is not read with"),
])
def test_keys_that_a_loss_does_not_read_are_refused_by_name(keys, words):
    with pytest.raises(ValidationError, match=words):
        recipe_of(**keys)


def test_template_tokens_are_learned_where_nothing_else_teaches_to_stop():
    assert recipe_of().dpo.mask_template_tokens is True
    assert [recipe_of(dpo={"loss": loss}).dpo.mask_template_tokens for loss in LOSSES] == [False] * 3
    assert recipe_of(dpo={"loss": "kto", "mask_template_tokens": True}).dpo.mask_template_tokens is True


TRL_ROWS = [("say 3 or 4: ", "3", True), ("what is left of twelve, less seven?", "five is left", False),
            ("no", "yes and no", True), ("spell cat", "k-a-t!", False)]


def test_kto_trainer_takes_the_same_step(tiny_model, moved, tmp_path):
    """Loss, KL estimate, rewards and gradients of TRL's KTOTrainer in fp32."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.5}
    policy, ref = (ModelFolder(m).load(torch.float32, CPU, "eager") for m in (tiny_model, moved))
    config = KTOConfig(output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, report_to=[], use_cpu=True,
                       bf16=False, gradient_checkpointing=False, disable_dropout=True, beta=0.1, max_length=None,
                       train_sampling_strategy="sequential", **weights)
    rows = [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in TRL_ROWS]
    trainer = KTOTrainer(policy, ref_model=ref, args=config, train_dataset=Dataset.from_list(rows),
                         processing_class=ModelFolder(tiny_model).tokenizer())
    theirs = list(trainer.train_dataset)
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(theirs))
    expected.backward()

    select = tmp_path / "select"
    select.mkdir()
    # our plan shuffles: give it the rows such that the step has them in TRL's order, for z goes by the one before
    order = plan_steps([type("E", (), {"weight": 1.0})] * 4, 1.0, 4, 0)[0]
    ours = [None] * 4
    for place, row in zip(order, theirs, strict=True):
        n = len(row["completion_ids"])
        ours[place] = {"row_id": f"r{place}", "list_id": f"r{place}", "prompt_tokens": row["prompt_ids"],
                       "completion_tokens": row["completion_ids"], "loss_mask": [True] * n, "template": [False] * n,
                       "desirable": row["label"], "score": float(row["label"]), "weight": 1.0}
    write_table(select / "rated.parquet", pa.Table.from_pylist(ours, schema=RATED))
    recipe = recipe_of(dpo={"loss": "kto", "batch_size": 4, "grad_clip": 0.0, "eval_steps": 0} | weights)
    table, stage = stage_in(tmp_path / "reference", "reference"), stage_in(tmp_path / "dpo", "dpo")
    reference(table, recipe, select=select, model=moved)
    kept = {}

    class Keeping(Engine):
        def step(self):
            kept.update({n: g.clone() for n, g in zip(self.names, self.weights.gradients(), strict=True)})
            return super().step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strop.trainer.training.local.Engine", Keeping)
        dpo(stage, recipe, select=select, policy=tiny_model, reference=table.dir, same_weights=False)
    (line,) = stage.metrics.rows
    assert line["loss"] == pytest.approx(expected.item(), abs=1e-5)
    logged = {k: v[-1] for k, v in trainer._metrics["train"].items() if isinstance(v, list) and v}
    assert line["kl"] == pytest.approx(logged["kl"], rel=1e-4, abs=1e-5) and line["kl"] > 1e-3
    for name, p in policy.named_parameters():
        torch.testing.assert_close(kept[name], p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_two_ranks_do_what_one_does(tmp_path, tiny_model, moved):
    """z and d are of the global batch, also where a rank has fewer microbatches or, in the last step, none."""
    code = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from strop.trainer.run.world import join
import test_rated as t
world, here = join("cpu", 1), Path(sys.argv[2])
def stage_in(folder, name, log=None):
    return replace(made(folder, name, log), world=world)
made, t.stage_in, found = t.stage_in, stage_in, {}
for loss in t.LOSSES:
    log = t.Log()
    t.run(here / loss, "dpo", loss, Path(sys.argv[3]), log, Path(sys.argv[4]), checkpoint_steps=1, max_tokens=64,
          batch_size=5 if loss == "listwise" else 9)  # the last step is of one list or completion
    found[loss] = log.rows
if world.first:
    (here / "found.json").write_text(json.dumps(found))
world.close()
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    made = {}
    for ranks in (1, 2):
        here = tmp_path / str(ranks)
        here.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone",
                  str(script), str(Path(__file__).parent), str(here), str(tiny_model), str(moved)]
        subprocess.run(launch, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        made[ranks] = json.loads((here / "found.json").read_text())
    for loss in LOSSES:
        baseline = {"kto": ["kl"], "bco": ["delta"], "listwise": []}[loss]
        for one, two in zip(made[1][loss], made[2][loss], strict=True):
            for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm", *baseline):
                assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), (loss, name)
        assert all(any(abs(row[name]) > 1e-3 for row in made[1][loss]) for name in baseline)
        a, b = (tmp_path / ranks / loss / "dpo" / "model" for ranks in "12")
        assert largest_difference(a, b) < 1e-5
