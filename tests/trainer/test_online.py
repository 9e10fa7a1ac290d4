"""Online training: steps equal the written formulas, resuming changes nothing, sampler and trainer agree."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from rounds import prompts_of
from stagecalls import dpo, online, reference
from training import Log, largest_difference, recipe_of, stage_in, weights_of
from transformers import AutoModelForCausalLM

from strop.kernels.policy import reference as formulas
from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.files import read_json
from strop.trainer.run.metrics import read_metrics
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.sampling.in_process import Generator, lent
from strop.trainer.training import rollouts as rollouts_module
from strop.trainer.training.guard import Guard
from strop.trainer.training.local import Engine
from strop.trainer.training.online import OnlinePairs, PolicyGradient

SMALL = {"steps": 3, "epochs": 1, "batch_size": 4, "k": 4, "max_new_tokens": 8, "lr": 1e-3, "eval_steps": 0,
         "warmup_ratio": 0.0}
DIFFERENCE = "sampling/sampling_logp_difference/"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Training prompts and validation prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = [read_table(prompts_of(folder / split, ids, split=split) / "prompts.parquet")
            for split, ids in (("train", [f"{i:02}" for i in range(10)]), ("validation", ["a", "b", "c"]))]
    write_table(folder / "prompts.parquet", pa.concat_tables(rows))
    return folder


def section_of(lora=None, source=None, **keys):
    source = {"name": "s", "path": "x", "verifier": "regex", "verifier_args": {"pattern": "[0-9]"}} | (source or {})
    return load_recipe({"method": "committee", "dtype": "float32", "data": {"sources": [source]}, "lora": lora or {},
                        "evaluate": {"max_new_tokens": 8}, "online": SMALL | keys})


def train(folder, model, prompts, log=None, lora=None, source=None, **keys):
    recipe = section_of(lora, source, **keys)
    stage = stage_in(folder, "round-00/online", log)
    online(stage, recipe, policy=model, reference=model, same_weights=True, prompts=prompts, round=0,
           evaluate=recipe.evaluate.only("max_new_tokens"))
    return stage


def rows_of(stage, step):
    return read_table(stage.dir / "rollouts" / f"step-{step:06}.parquet").to_pylist()


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and "work" not in p.parts}


def by_transformers(model, rows) -> list[torch.Tensor]:
    """fp64 log-probs of each completion's tokens from the model's own logits, in one batch padded on the right."""
    texts = [row["prompt_tokens"] + row["completion_tokens"] for row in rows]
    ids = torch.zeros(len(rows), max(map(len, texts)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, :len(text)], mask[i, :len(text)] = torch.tensor(text), 1
    logp = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
    logp = logp.gather(-1, ids[:, 1:, None])[..., 0]
    return [logp[i, len(row["prompt_tokens"]) - 1:len(texts[i]) - 1] for i, row in enumerate(rows)]


def written_out(policy, start, ref, rows, keys) -> torch.Tensor:
    """The loss of a step by its formula. policy, start, ref: log-probs of each completion's tokens."""
    rewards: dict[str, list[float]] = {}
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        reward = row["score"] - keys.get("missing_eos_penalty", 1.0) * (row["finish"] == "length")
        if keys["loss"] in ("rloo", "mdloo"):
            reward -= keys["beta"] * (start[i].sum() - ref[i].sum()).item()
        rewards.setdefault(row["prompt_id"], []).append(reward)
        places.setdefault(row["prompt_id"], []).append(i)
    if keys["loss"] in ("rloo", "mdloo"):
        order = [i for mine in places.values() for i in mine]
        advantages = [a for mine in formulas.leave_one_out(list(rewards.values())) for a in mine]
        return formulas.policy_loss([policy[i] for i in order], advantages, keys["loss"], [start[i] for i in order],
                                    keys.get("mirror_weight", 1.0))
    terms = []
    for name, mine in rewards.items():
        best, worst = (places[name][mine.index(pick(mine))] for pick in (max, min))
        if max(mine) > min(mine):
            margin = (policy[best].sum() - ref[best].sum()) - (policy[worst].sum() - ref[worst].sum())
            terms.append(-torch.nn.functional.logsigmoid(keys["beta"] * margin))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("keys", [
    {"loss": "rloo", "beta": 0.2}, {"loss": "mdloo", "beta": 0.2, "mirror_weight": 3.0, "epochs": 2},
    {"loss": "sigmoid", "beta": 0.5}, {"loss": "rloo", "beta": 0.2, "max_tokens": 64}], ids=str)
def test_gradients_are_those_of_the_written_formula(tmp_path, tiny_model, asked, monkeypatch, keys):
    """In plain transformers and fp64, on padded rows. A small max_tokens divides the completions of a prompt."""
    taken, step = [], Engine.step

    def note(engine):
        taken.append([{n: x.detach().clone() for n, x in engine.model.named_parameters()},
                      {n: x.grad.clone() for n, x in engine.model.named_parameters()}])
        return step(engine)

    monkeypatch.setattr(Engine, "step", note)
    log, epochs = Log(), keys.get("epochs", 1)
    stage = train(tmp_path / "s", tiny_model, asked, log, steps=2, **keys)
    assert len(taken) == 2 * epochs
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    with torch.no_grad():
        ref = {n: by_transformers(model, rows_of(stage, n)) for n in (1, 2)}
    for i, (weights, grads) in enumerate(taken):
        rows = rows_of(stage, 1 + i // epochs)
        model.load_state_dict(taken[i - i % epochs][0], strict=False)
        with torch.no_grad():
            start = by_transformers(model, rows)
        model.load_state_dict(weights, strict=False)
        model.zero_grad()
        loss = written_out(by_transformers(model, rows), start, ref[1 + i // epochs], rows, keys)
        loss.backward()
        found = dict(model.named_parameters())
        scale = max(p.grad.abs().max() for p in found.values())
        for name, grad in grads.items():
            assert (grad - found[name].grad).abs().max() < 2e-5 * scale, (i, name)
        assert log.rows[i]["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
        assert [r["ref_logp"] for r in rows] == pytest.approx([x.sum().item() for x in ref[1 + i // epochs]], abs=1e-3)
    if epochs > 1:
        assert log.rows[0]["policy/ratio"] == 1 and log.rows[0]["policy/approxkl"] == 0 < log.rows[1]["policy/approxkl"]


def test_a_step_of_online_dpo_is_one_of_dpo_on_its_completions(tmp_path, tiny_model, asked):
    keys = {"loss": "sigmoid", "beta": 0.3, "lr": 1e-3}
    stage = train(tmp_path / "online", tiny_model, asked, k=2, steps=1, batch_size=10, **keys)
    rows, pairs = rows_of(stage, 1), []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["prompt_id"] == second["prompt_id"]
        best, worst = sorted((first, second), key=lambda row: -row["reward"])
        if best["reward"] > worst["reward"]:
            pairs.append({"row_id": best["prompt_id"], "source": "s", "prompt_id": best["prompt_id"], "margin": None,
                          "prompt_tokens": best["prompt_tokens"], "weight": 1.0, "chosen_score": 1.0,
                          "rejected_score": 0.0} | {f"{side}_{name}": value for side, row in (
                              ("chosen", best), ("rejected", worst)) for name, value in {
                                  "tokens": row["completion_tokens"], "mask": [True] * len(row["completion_tokens"]),
                                  "template": [False] * len(row["completion_tokens"])}.items()})
    assert 2 < len(pairs) == 10 - stage.counts["skipped/tied"]
    write_table(tmp_path / "pairs.parquet", pa.Table.from_pylist(pairs))
    offline = recipe_of(dpo=keys | {"batch_size": 10, "schedule": "constant", "warmup_ratio": 0.0})
    table = stage_in(tmp_path / "reference", "round-00/reference")
    reference(table, offline, select=tmp_path, model=tiny_model)
    other = stage_in(tmp_path / "dpo", "round-00/dpo")
    dpo(other, offline, select=tmp_path, policy=tiny_model, reference=table.dir, same_weights=True)
    assert largest_difference(stage.dir / "model", tiny_model) > 1e-4
    assert largest_difference(stage.dir / "model", other.dir / "model") < 1e-5


@pytest.mark.parametrize("lora", [{}, {"rank": 4, "dropout": 0.1}], ids=["full", "lora"])
def test_sampler_and_trainer_agree_on_every_step(tmp_path, tiny_model, asked, lora):
    """In place: a sampler that lagged a step behind would be off by far more."""
    log = Log()
    stage = train(tmp_path / "s", tiny_model, asked, log, lora=lora and {"rank": 4}, lr=1e-2, steps=4)
    assert all(0 < row[DIFFERENCE + "mean"] <= row[DIFFERENCE + "max"] < 2e-5 for row in log.rows)
    moved = largest_difference(stage.dir / "model", tiny_model)
    assert moved > 1e-2 and abs(log.rows[0]["kl"]) < 1e-4 < abs(log.rows[-1]["kl"])
    rows = [rows_of(stage, step) for step in (1, 4)]
    assert [mine[0]["writer"] for mine in rows] == ["round-00/online@0", "round-00/online@3"]
    assert Counter(row["prompt_id"] for row in rows[0]) == dict.fromkeys({row["prompt_id"] for row in rows[0]}, 4)
    for row in rows[0]:
        assert len(row["logprobs"]) == len(row["completion_tokens"]) <= 8
        assert row["score"] == float(any(c.isdigit() for c in row["completion"]))
        assert row["reward"] == row["score"] - (row["finish"] == "length")
    means = [sum(row["reward"] for row in mine) / len(mine) for mine in rows]
    assert [log.rows[0]["reward"], log.rows[-1]["reward"]] == pytest.approx(means)
    assert stage.counts["reward/first_step"] == pytest.approx(means[0])
    assert (stage.counts["steps"], stage.counts["completions"]) == (4, 64)


@pytest.mark.parametrize("lora", [{}, {"rank": 4}], ids=["full", "lora"])
def test_the_anchor_is_the_average_of_the_weights_so_far(tmp_path, tiny_model, asked, monkeypatch, lora):
    """Of every step, by a second model with an average in fp64; the weights in training are what they were."""
    seen, step = [], Engine.step

    def note(engine):
        if not seen:
            seen.append([m.detach().double().clone() for m in engine.masters])
        norm = step(engine)
        seen.append([m.detach().double().clone() for m in engine.masters])
        return norm

    monkeypatch.setattr(Engine, "step", note)
    keys = {"loss": "mdloo", "epochs": 2, "beta": 0.5, "ema_decay": 0.75, "lr": 1e-2}
    stage = train(tmp_path / "s", tiny_model, asked, lora=lora, anchor="ema", **keys)
    averages = [seen[0]]
    for masters in seen[1:]:
        averages.append([0.75 * a + 0.25 * m for a, m in zip(averages[-1], masters, strict=True)])
    other = stage_in(tmp_path / "other", "other")
    engine = Engine(ModelFolder(tiny_model), section_of(**keys).online, other, 1, compute=section_of(), seed=0,
                    lora=section_of(lora).lora)
    engine.base.set_attn_implementation("sdpa")
    for n in (1, 2, 3):
        rows = rows_of(stage, n)
        with torch.no_grad():
            engine._set_weights([a.float() for a in averages[2 * (n - 1)]])
            ref = by_transformers(engine.model.eval(), rows)
        assert [row["ref_logp"] for row in rows] == pytest.approx([x.sum().item() for x in ref], abs=1e-3), n
    with torch.no_grad():
        engine._set_weights([m.float() for m in seen[-3]])
        policy = by_transformers(engine.model.eval(), rows)
    assert [sum(row["logprobs"]) for row in rows] == pytest.approx([x.sum().item() for x in policy], abs=1e-3)
    assert max(abs(a.sum() - b.sum()) for a, b in zip(ref, policy, strict=True)) > 0.05
    whole = train(tmp_path / "fixed", tiny_model, asked, lora=lora, **keys)
    assert rows_of(whole, 1) == rows_of(stage, 1)
    assert largest_difference(whole.dir / "model", stage.dir / "model") > 1e-5


@pytest.mark.parametrize("keys", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "masters": "split"}], ids=str)
def test_average_and_masters_change_places_bit_for_bit(tmp_path, tiny_model, keys):
    recipe = section_of(ema_decay=0.5)
    section = recipe.online.model_copy(update={"masters": keys.get("masters", "float32")})
    compute = recipe.model_copy(update={"dtype": keys.get("dtype", "float32")})
    engine = Engine(ModelFolder(tiny_model), section, stage_in(tmp_path, "s"), 1, compute=compute, seed=0,
                    lora=recipe.lora)
    draw = torch.Generator().manual_seed(0)
    values = [[torch.randn(m.shape, generator=draw) for m in engine.masters] for _ in range(2)]
    with torch.no_grad():
        engine._set_weights(values[0])
    engine.ema = [v.clone() for v in values[1]]
    for inside in (True, False):
        with engine.averaged() if inside else nullcontext():
            for masters, average, *both in zip(engine.masters, engine.ema, *values, strict=True):
                assert torch.equal(masters, both[inside]) and torch.equal(average, both[not inside])
            for weight, value in zip(engine.model.parameters(), values[inside], strict=True):
                assert (weight.float() - value).abs().max() <= 0.01 * value.abs().max()
            assert engine.model.training != inside


def test_lora_samples_with_its_adapters_and_refers_to_the_weights_without(tmp_path, tiny_model, asked):
    second = train(tmp_path / "second", tiny_model, asked, lora={"rank": 4}, lr=1e-2, steps=2)
    base, adapted = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, second.dir / "model"))
    rows = rows_of(train(tmp_path / "third", tiny_model, asked, lora={"rank": 4}, lr=1e-2, steps=3), 3)
    with torch.no_grad():
        ref, mine = by_transformers(base, rows), by_transformers(adapted, rows)
    assert [row["ref_logp"] for row in rows] == pytest.approx([x.sum().item() for x in ref], abs=1e-3)
    assert [sum(row["logprobs"]) for row in rows] == pytest.approx([x.sum().item() for x in mine], abs=1e-3)
    assert max(abs(a.sum() - b.sum()) for a, b in zip(ref, mine, strict=True)) > 0.1


def test_a_lent_model_comes_back_as_it_was(tiny_model):
    model = ModelFolder(tiny_model).load(torch.float32, torch.device("cpu")).train()
    kinds = [type(m) for m in model.modules()]
    before = {n: p for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="a failure"), lent(model) as generator:
        generator.generate([[5, 6, 7]], max_new_tokens=4)
        assert not model.training
        raise RuntimeError("a failure")
    assert [type(m) for m in model.modules()] == kinds and model.training
    assert all(p is before[n] and p.requires_grad for n, p in model.named_parameters())
    assert model.config._attn_implementation == "strop"


KILLS = [(keys, *when) for keys in ({"loss": "mdloo", "epochs": 2}, {"loss": "sigmoid"},
                                         {"loss": "mdloo", "epochs": 2, "anchor": "ema"})
         for when in ((1, 1), (3, 1), (3, 2), (2, 50))]


@pytest.mark.parametrize(("keys", "stop_at", "checkpoint_steps"), [
    pytest.param(*how, marks=() if i in (7, 10) else pytest.mark.slow) for i, how in enumerate(KILLS)], ids=str)
def test_killed_and_resumed_ends_as_if_never_killed(tmp_path, tiny_model, asked, monkeypatch, keys, stop_at,
                                                    checkpoint_steps):
    keys = keys | {"steps": 4, "snapshots": 1, "ema_decay": 0.5, "checkpoint_steps": checkpoint_steps, "eval_steps": 2}
    whole = train(tmp_path / "whole", tiny_model, asked, **keys)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", tiny_model, asked, Log(stop_at=stop_at), **keys)
    kept = len(list((tmp_path / "killed/rollouts").iterdir()))
    sampled, generate = [], Generator.generate
    monkeypatch.setattr(Generator, "generate", lambda *args, **how: (
        sampled.append(1) if "k" in how else None, generate(*args, **how))[1])
    again = train(tmp_path / "killed", tiny_model, asked, **keys)
    assert len(sampled) == 4 - kept  # what was sampled before the kill is read
    assert content(again.dir) == content(whole.dir)
    assert again.counts == whole.counts


def test_a_damaged_step_is_sampled_again(tmp_path, tiny_model, asked):
    whole = train(tmp_path / "whole", tiny_model, asked)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", tiny_model, asked, Log(stop_at=2), checkpoint_steps=50)
    damaged = tmp_path / "killed/rollouts/step-000002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert content(train(tmp_path / "killed", tiny_model, asked, checkpoint_steps=50).dir) == content(whole.dir)


def test_other_weights_in_the_sampler_stop_the_first_step(tmp_path, tiny_model, asked, monkeypatch):
    other = ModelFolder(tiny_model).load(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(rollouts_module, "lent", lambda model: lent(other))
    with pytest.raises(UserError, match=r"step 1: the log-probs of sampled tokens differ between sampler and trainer "
                                        r"by 0\.\d+ on average, .* at most; rounding is up to 0.001"):
        train(tmp_path / "s", tiny_model, asked)
    assert not (tmp_path / "s/model").exists()


def test_the_guard_ends_a_runaway(tmp_path, tiny_model, asked, monkeypatch):
    good = {"cut_share": 0.0, "mean_length": 5.0, "kl": 0.1}
    monkeypatch.setattr(Guard, "_measure", lambda guard: good | ({"kl": 2.0} if guard.engine.step_index == 4 else {}))
    log = Log()
    stage = train(tmp_path / "s", tiny_model, asked, log, steps=6, eval_steps=2, checkpoint_steps=1)
    plain = train(tmp_path / "plain", tiny_model, asked, steps=2)
    assert (stage.counts["steps"], stage.counts["kept_step"], len(log.rows)) == (4, 2, 4)
    assert largest_difference(stage.dir / "model", plain.dir / "model") == 0.0
    assert "online.max_kl=1" in read_json(stage.dir / "guard.json")["why"]
    assert log.rows[3]["eval/stopped"] == 1.0 and stage.counts["completions"] == 64


def row_of(prompt, i, reward, tokens=(5, 6), ref=-1.0):
    return {"prompt_id": prompt, "sample_index": i, "prompt_tokens": [3, 4], "completion_tokens": list(tokens),
            "logprobs": [-0.5] * len(tokens), "ref_logp": ref, "reward": reward}


def test_completions_without_a_reward_are_counted_and_left_out():
    rows = [row_of("a", 0, 1.0), row_of("a", 1, None), row_of("a", 2, 0.0, ref=-2.0), row_of("b", 0, 1.0),
            row_of("b", 1, None), row_of("c", 0, None), row_of("c", 1, None)]
    batch = PolicyGradient(section_of(beta=0.5).online).batch(rows)
    assert batch.skipped == {"unscored": 4, "alone": 1} and batch.count == 2
    assert [e.group.completions for e in batch.examples] == [[[5, 6], [5, 6]]]
    assert batch.given == [[pytest.approx(1.5), pytest.approx(-1.5)]]  # the KL estimates are 0 and 1
    rows += [row_of("d", i, 1.0) for i in range(2)] + [row_of("e", 0, 2.0), row_of("e", 1, 1.0, (7,)),
                                                       row_of("e", 2, 0.0, (7, 8))]
    batch = OnlinePairs(section_of(loss="sigmoid", beta=0.1).online).batch(rows)
    assert batch.skipped == {"unscored": 4, "tied": 2}  # of a, both completions are equal
    assert [e.group.completions for e in batch.examples] == [[[5, 6], [7, 8]]]
    assert batch.given == [[-1.0, -1.0]] and batch.sampled == [[-0.5] * 4]


def test_a_step_without_anything_to_learn_goes_on(tmp_path, tiny_model, asked):
    source = {"verifier_args": {"pattern": "no such text"}}
    log = Log()
    stage = train(tmp_path / "s", tiny_model, asked, log, source=source, loss="sigmoid", beta=0.1, steps=2,
                  missing_eos_penalty=0.0)
    assert stage.counts["skipped/tied"] == 8 and [row["grad_norm"] for row in log.rows] == [0.0, 0.0]
    assert largest_difference(stage.dir / "model", tiny_model) == 0.0
    assert log.rows[0]["frac_reward_zero_std"] == 1.0 and "loss" not in log.rows[0]


def test_scorers_that_fail_stop_the_stage(tmp_path, tiny_model, asked):
    (tmp_path / "mine.py").write_text("def grade(completion):\n    raise ValueError('cannot grade')\n")
    source = {"verifier": None, "verifier_args": {}, "scorers": [{"python": f"{tmp_path}/mine.py:grade"}]}
    with pytest.raises(UserError, match=r"scorer grade: .*cannot grade.*score.max_errors=0"):
        train(tmp_path / "s", tiny_model, asked, source=source, steps=1)


def test_the_mean_reward_rises(tmp_path, tiny_model, asked):
    """A random model learns to say a digit and to stop."""
    log = Log()
    train(tmp_path / "s", tiny_model, asked, log, loss="rloo", lr=2e-2, steps=20, batch_size=8, beta=0.0,
          max_new_tokens=6)
    rewards = [row["reward"] for row in log.rows]
    assert sum(rewards[:4]) / 4 < 0.0 and sum(rewards[-4:]) / 4 > 0.5, rewards


def test_prompts_that_leave_no_room_are_refused(tmp_path, tiny_model, asked):
    with pytest.raises(UserError, match=r"none of 10 prompts leaves room for online.max_new_tokens=500"):
        train(tmp_path / "s", tiny_model, asked, max_new_tokens=500)


@pytest.mark.parametrize(("keys", "message"), [
    ({"epochs": 2, "loss": "rloo"}, "online: epochs=2 with loss=rloo"),
    ({"loss": "rloo", "mirror_weight": 2.0}, "online: mirror_weight is read with loss=mdloo only"),
    ({"temperature": 0.7}, "online: temperature=0.7 with loss=mdloo"),
    ({"loss": "ipo", "beta": 0.0}, "online: beta=0 with loss=ipo"),
    ({"max_tokens": 8, "max_new_tokens": 8}, "online: max_tokens=8 holds no prompt"),
    ({"k": 1}, "online.k=1"), ({"anchor": "ema"}, "online: anchor=ema is the EMA of ema_decay"),
    ({"anchor": "ema", "ema_decay": 0.9, "beta": 0.0}, "online: anchor=ema is the EMA of ema_decay"),
])
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        section_of(**keys)


def test_every_column_of_rollouts_is_documented():
    text = (Path(__file__).parents[2] / "docs/stages.md").read_text()
    section = text[text.index("\n## online\n"):text.index("\n## merge\n")]
    assert {name for name in rollouts_module.SCHEMA.names if f"`{name}`" not in section} == set()


def recipe_file(tiny_recipe, method: str, **keys):
    text = tiny_recipe.read_text().replace("name: tiny", f"name: {method}\nmethod: {method}")
    for key in ("sample", "sft", "dpo") if method != "committee" else ():
        text = "\n".join(line for line in text.splitlines() if not line.startswith(f"{key}:")) + "\n"
    text = text if method == "committee" else text.replace("rounds: 2\n", "")
    section = {"steps": 3, "batch_size": 4, "max_new_tokens": 8, "lr": 1e-3, "checkpoint_steps": 1} | keys
    path = tiny_recipe.with_name(f"{method}.yaml")
    path.write_text(text + f"online: {json.dumps(section)}\n")
    return path


def test_a_committee_writes_the_data_of_its_next_round(tiny_recipe, capsys):
    path = recipe_file(tiny_recipe, "committee", k=2)
    assert main([str(path)]) == 0, capsys.readouterr().err
    run = tiny_recipe.parent / "runs/committee"
    writers = [{row["writer"] for p in (run / f"round-0{r}/sample").glob("shard-*.parquet")
                for row in read_table(p).to_pylist()} for r in (0, 1)]
    assert writers == [{"start"}, {"start", "sft", "dpo", "online"}]
    chosen = read_table(run / "round-01/select/sft.parquet").to_pylist()
    assert len({row["writer"] for row in chosen if row["origin"] == "round-01"}) > 1  # the best by prompt, not by model
    hashes = {row["writer_hash"] for p in (run / "round-01/sample").glob("shard-*.parquet")
              for row in read_table(p).to_pylist()}
    assert len(hashes) == 4
    logged = [r for r in read_metrics(run / "metrics.jsonl") if r["stage"] == "round-01/online"]
    assert [r["step"] for r in logged] == [1, 2, 3, 4, 5, 6] and all(r[DIFFERENCE + "mean"] < 1e-4 for r in logged[::2])
    assert "online" in read_json(run / "promotions.json")[0]["candidates"]
    capsys.readouterr()
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count(": up to date\n") == len(read_json(run / "plan.json")["stages"])
    assert main([str(path), "--plan"]) == 0 and "to run" not in capsys.readouterr().out


def test_online_dpo_runs_and_is_exported(tiny_recipe, tmp_path, capsys):
    path = recipe_file(tiny_recipe, "online_dpo")
    assert main([str(path)]) == 0, capsys.readouterr().err
    run = tiny_recipe.parent / "runs/online_dpo"
    assert {"loss", "reward", "rewards/accuracies", "kl", "entropy", "completions/clipped_ratio"} <= {
        name for r in read_metrics(run / "metrics.jsonl") for name in r}
    assert weights_of(run / "final") and (run / "report.html").exists()
    for change, said in (("sft.lr=1e-5", "is not read by method online_dpo; leave it out"),
                         ("sample.k=4", "is not read by method online_dpo"),
                         ("engine.sequence_parallel=2", "in online training every rank has rows of its own"),
                         ("online.loss=rloo", "online.loss=rloo is no loss of pairs")):
        assert main([str(path), change, "--plan"]) == 1
        assert said in capsys.readouterr().err
