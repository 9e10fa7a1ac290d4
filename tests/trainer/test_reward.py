"""Reward models: the loss, training on groups, the saved folder in plain transformers, and TRL's trainer beside
ours."""

import json
import math
from itertools import combinations

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import Log, recipe_of, select_of, stage_in, weights_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from strop.kernels import Group
from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.models.loading import ModelFolder
from strop.trainer.models.reward import Rewarder, check_reward_model, runs_packed
from strop.trainer.reports.rewards import describe
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.stages.reward import reward
from strop.trainer.training.batch import Example, collate
from strop.trainer.training.rewards import Ranked, fit, load_ranked, pair_tensors, reward_loss, scored_group, split

CPU = torch.device("cpu")
ROWS = [{"prompt": "say 3 or 4: ", "chosen": "3", "rejected": "four, I think", "margin": 0.5},
        {"prompt": "what is left of twelve, less seven?", "chosen": "five is left", "rejected": "6", "margin": 0.0},
        {"prompt": "no", "chosen": "yes", "rejected": "yes and no", "margin": 2.0},
        {"prompt": "spell cat", "chosen": "c-a-t", "rejected": "k-a-t!", "margin": 1.0}]


def section_of(**keys):
    return load_recipe({"method": "reward", "dtype": "float32", "reward": {"batch_size": 4, "held_out": 0.25} | keys,
                        "data": {"preferences": [{"name": "x", "path": "x"}]}})


def pairs_in(folder, n=24, **columns):
    """A select artifact of n ready-made pairs."""
    table = read_table(select_of(folder, n) / "pairs.parquet").to_pylist()
    for i, row in enumerate(table):
        row |= {"margin": i / 4, "chosen_score": None, "rejected_score": None, "prompt_id": None} | columns
    write_table(folder / "pairs.parquet", pa.Table.from_pylist(table))
    return folder


def train_in(folder, tiny_model, select, log=None, history=(), seed=0, **keys):
    recipe = section_of(**keys)
    stage = stage_in(folder, "reward", log)
    reward(stage, reward=recipe.reward, lora=recipe.lora, model=recipe.model.only("chat_template", "trust_remote_code"),
           compute=recipe.only("dtype", "device", "attention", "engine"), log=recipe.log, seed=seed, select=select,
           start=tiny_model, history=list(history))
    return stage


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=5, unique=True), min_size=1, max_size=4),
       st.floats(0, 0.4), st.floats(0, 0.5), st.floats(0, 2))
def test_the_loss_is_the_mean_over_groups_of_the_mean_over_their_pairs(groups, smoothing, centering, margin):
    rows, scores, expected = [], [], 0.0
    for values in groups:
        pairs = [(i, j, margin) for i, j in combinations(range(len(values)), 2)]
        rows.append(Ranked(Example("", scored_group([1], [[2]] * len(values))), pairs, "s"))
        scores += values
        losses = []
        for i, j, m in pairs:
            d = values[i] - values[j]
            right, wrong = (math.log1p(math.exp(-x)) for x in (d - m, -d - m))
            losses.append((1 - smoothing) * right + smoothing * wrong + centering * (values[i] + values[j]) ** 2)
        expected += sum(losses) / len(losses) / len(groups)
    loss, sums = reward_loss(torch.tensor(scores, dtype=torch.float64), *pair_tensors(rows, CPU), len(groups),
                             label_smoothing=smoothing, centering=centering)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert sums[-1].item() == pytest.approx(len(groups))


def test_scores_of_equal_completions_cost_ln_2():
    rows = [Ranked(Example("", scored_group([1], [[2], [3]])), [(0, 1, 0.0)], "s")]
    loss, sums = reward_loss(torch.zeros(2, requires_grad=True), *pair_tensors(rows, CPU), 1)
    assert loss.item() == pytest.approx(math.log(2)) and sums[1] == 0  # a tie is not accurate


def test_a_prompt_is_on_one_side_of_the_split():
    rows = [Ranked(Example(str(i), scored_group([i % 50], [[1], [2]])), [(0, 1, 0.0)], "s") for i in range(200)]
    kept, held = split(rows, 0.3, 0)
    assert len(kept) + len(held) == 200 and not {r.prompt for r in kept} & {r.prompt for r in held}
    assert 5 < len({r.prompt for r in held}) < 25
    assert split(rows, 0.0, 0) == (rows, [])
    assert {r.prompt for r in split(rows, 0.3, 1)[1]} != {r.prompt for r in held}


def test_a_group_that_does_not_fit_keeps_its_best_and_worst():
    group = scored_group([1, 2], [[3] * 4, [4] * 4, [5] * 4, [6] * 9])
    row = Ranked(Example("g", group), [(i, j, 1.0) for i, j in combinations(range(4), 2)], "s")
    assert fit(row, 100, 100) == row
    smaller = fit(row, 6, 10)  # the worst completion is too long for the context, and two of the others fit
    assert smaller.example.group.completions == [[3] * 4, [5] * 4] and smaller.pairs == [(0, 1, 1.0)]
    assert fit(row, 6, 9) is None


@pytest.mark.parametrize("options", [{}, {"center_rewards_coefficient": 0.01}, {"margin": 1.0}], ids=str)
def test_reward_trainer_takes_the_same_steps(tiny_model, tmp_path, options):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    steps, use_margin = 3, options.pop("margin", 0.0)
    start = reward_folder(tiny_model, tmp_path / "start")
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32)
    config = RewardConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, max_steps=steps, use_cpu=True, report_to=[],
        bf16=False, gradient_checkpointing=False, disable_dropout=True, lr_scheduler_type="constant",
        learning_rate=1e-3, weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0, logging_steps=1, save_strategy="no",
        **options)
    data = [row if use_margin else {k: v for k, v in row.items() if k != "margin"} for row in ROWS]
    trainer = RewardTrainer(model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    tokens = list(trainer.train_dataset)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]

    rows = []
    for i, row in enumerate(tokens):
        chosen, rejected = list(row["chosen_ids"]), list(row["rejected_ids"])
        n = next(k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        rows.append({"row_id": str(i), "source": "s", "prompt_id": None, "prompt_tokens": chosen[:n], "weight": 1.0,
                     "chosen_tokens": chosen[n:], "rejected_tokens": rejected[n:], "chosen_score": None,
                     "rejected_score": None, "margin": ROWS[i]["margin"]})
    (tmp_path / "select").mkdir()
    write_table(tmp_path / "select/pairs.parquet", pa.Table.from_pylist(rows))
    log = Log()
    train_in(tmp_path / "ours", start, tmp_path / "select", log, lr=1e-3, schedule="constant", warmup_ratio=0.0,
             epochs=float(steps), held_out=0.0, margin=use_margin,
             centering=options.get("center_rewards_coefficient", 0.0))
    assert len(logged) == len(log.rows) == steps
    for theirs, ours in zip(logged, log.rows, strict=True):
        for name in ("loss", "accuracy", "margin", "mean_reward", "grad_norm"):
            assert ours[name] == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-5), (name, theirs, ours)
    ours = weights_of(tmp_path / "ours/model")
    for name, p in trainer.model.state_dict().items():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def reward_folder(tiny_model, target):
    """A reward model with a random head, whose padding token ends no completion."""
    model = ModelFolder(tiny_model).load(torch.float32, CPU, "eager", reward=True, head_seed=3)
    model.config.pad_token_id = 0
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(target)
    return target


def test_the_saved_folder_scores_the_same_in_plain_transformers(tiny_model, tmp_path):
    select = pairs_in(tmp_path / "select")
    stage = train_in(tmp_path / "reward", tiny_model, select, lr=1e-3)
    held = {r["row_id"]: r for r in read_table(stage.dir / "held_out.parquet").to_pylist()}
    model = AutoModelForSequenceClassification.from_pretrained(stage.dir / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(stage.dir / "model")
    assert model.config.num_labels == 1 and tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [r for r in read_table(select / "pairs.parquet").to_pylist() if r["row_id"] in held]
    texts = [{"input_ids": r["prompt_tokens"] + r[f"{side}_tokens"]} for r in rows for side in ("chosen", "rejected")]
    batch = tokenizer.pad(texts, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0].view(-1, 2).tolist()
    assert len(held) >= 3
    for row, (chosen, rejected) in zip(rows, scores, strict=True):
        assert held[row["row_id"]]["chosen"] == pytest.approx(chosen, abs=1e-5)
        assert held[row["row_id"]]["rejected"] == pytest.approx(rejected, abs=1e-5)
    found = read_json(stage.dir / "reward.json")["all"]
    assert found["n"] == len(held) == stage.counts["held_out_pairs"]
    assert found["accuracy"] == sum(r["chosen"] > r["rejected"] for r in held.values()) / len(held)
    check_reward_model(stage.dir / "model")


def test_it_learns_what_the_pairs_say(tiny_model, tmp_path):
    """Chosen completions hold the token 7: held-out prompts are judged right after a few epochs."""
    select = pairs_in(tmp_path / "select", 60)
    rows = read_table(select / "pairs.parquet").to_pylist()
    for row in rows:
        row["chosen_tokens"], row["rejected_tokens"] = [9, 7, 2], [9, 8, 2]
    write_table(select / "pairs.parquet", pa.Table.from_pylist(rows))
    stage = train_in(tmp_path / "reward", tiny_model, select, lr=3e-3, epochs=4.0)
    assert read_json(stage.dir / "reward.json")["all"]["accuracy"] == 1.0


def test_a_stopped_training_goes_on_to_the_same_weights(tiny_model, tmp_path):
    select = pairs_in(tmp_path / "select")
    whole = train_in(tmp_path / "whole", tiny_model, select, checkpoint_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path / "cut", tiny_model, select, Log(stop_at=3), checkpoint_steps=1)
    train_in(tmp_path / "cut", tiny_model, select, checkpoint_steps=1)
    a, b = weights_of(tmp_path / "cut/model"), weights_of(whole.dir / "model")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_lora_trains_the_head_too(tiny_model, tmp_path):
    select, recipe = pairs_in(tmp_path / "select"), section_of()
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 2})})
    stage = stage_in(tmp_path / "reward", "reward")
    reward(stage, reward=recipe.reward.model_copy(update={"lr": 1e-2}), lora=recipe.lora, log=recipe.log, seed=0,
           model=recipe.model.only("chat_template", "trust_remote_code"), select=select, start=tiny_model, history=[],
           compute=recipe.only("dtype", "device", "attention", "engine"))
    before = ModelFolder(tiny_model).load(torch.float32, CPU, reward=True, head_seed=0).score.weight
    after = weights_of(stage.dir / "model")["score.weight"]
    assert not torch.equal(before, after) and (stage.dir / "model/adapter").is_dir()


def test_samples_are_ranked_in_one_group_with_every_pair(tmp_path):
    folder = tmp_path / "round-00"
    completions = {0: ([3, 2], 1.0), 1: ([4, 2], 0.0), 2: ([5, 2], 0.5), 3: ([3, 2], 1.0), 4: ([6, 2], None)}
    rows = [{"prompt_id": "p", "sample_index": i, "prompt_tokens": [8, 9], "completion_tokens": tokens,
             "completion": "x"} for i, (tokens, _) in completions.items()]
    rows += [{"prompt_id": "q", "sample_index": i, "prompt_tokens": [8], "completion_tokens": [3 + i, 2],
              "completion": "x"} for i in range(2)]
    for name in ("sample", "select"):
        (folder / name).mkdir(parents=True)
    write_table(folder / "sample/shard-00000.parquet", pa.Table.from_pylist(rows))
    write_table(folder / "select/judged.parquet", pa.Table.from_pylist(
        [{"prompt_id": "p", "sample_index": i, "score": score} for i, (_, score) in completions.items()]
        + [{"prompt_id": "q", "sample_index": i, "score": 1.0} for i in range(2)]))
    write_table(folder / "select/difficulty.parquet", pa.Table.from_pylist(
        [{"prompt_id": name, "source": "digits"} for name in "pq"]))
    pairs_in(folder / "select", 4)
    own = read_table(folder / "select/pairs.parquet").to_pylist()
    own[0]["prompt_id"] = "p"  # a pair of samples, which the group replaces
    write_table(folder / "select/pairs.parquet", pa.Table.from_pylist(own))
    stage = stage_in(tmp_path / "reward", "reward")
    found = load_ranked(stage, section_of(pairs="all").reward, 100, folder / "select",
                        [(folder / "sample", folder / "select")])
    assert len(found) == 4 and found[-1].example.group.completions == [[3, 2], [5, 2], [4, 2]]
    assert found[-1].source == "digits" and {row.example.weight for row in found} == {1.0}
    mix = {"digits": 0.5, found[0].source: 0}
    left = load_ranked(stage_in(tmp_path / "mix", "reward"), section_of(pairs="all").reward, 100, folder / "select",
                       [(folder / "sample", folder / "select")], mix)
    assert [row.example.weight for row in left] == [mix.get(row.source, 1.0) for row in found if mix.get(row.source, 1)]
    assert found[-1].pairs == [(0, 1, 0.5), (0, 2, 1.0), (1, 2, 0.5)]
    assert {k: v for k, v in stage.counts.items() if "dropped" in k} == {
        "dropped/duplicate": 1, "dropped/unscored": 1, "dropped/tie": 1}


def test_margins_come_from_the_data(tmp_path):
    select = pairs_in(tmp_path / "select", 3)
    rows = read_table(select / "pairs.parquet").to_pylist()
    rows[1] |= {"margin": None, "chosen_score": 0.75, "rejected_score": 0.5}
    rows[2] |= {"margin": None}
    write_table(select / "pairs.parquet", pa.Table.from_pylist(rows))
    found = load_ranked(stage_in(tmp_path / "reward", "reward"), section_of().reward, 1000, select, [])
    assert [row.pairs[0][2] for row in found] == [0.0, 0.25, 0.0]


def test_intervals_know_that_pairs_of_a_prompt_go_together():
    def rows(per_prompt):
        return [{"row_id": "", "source": "s", "prompt": str(p), "chosen": 1.0 if p % 2 else -1.0, "rejected": 0.0,
                 "chosen_tokens": 2, "rejected_tokens": 1} for p in range(20) for _ in range(per_prompt)]

    one, many = describe(rows(1)), describe(rows(10))
    assert one["accuracy"] == many["accuracy"] == 0.5 and many["n"] == 200 and many["prompts"] == 20
    assert (many["low"], many["high"]) == pytest.approx((one["low"], one["high"]))


def test_length_bias_and_calibration():
    rows = [{"source": "s", "prompt": str(i), "chosen": i / 10, "rejected": 0.0, "chosen_tokens": 10 + i,
             "rejected_tokens": 10} for i in range(1, 21)]
    found = describe(rows)
    assert found["length"] == {"correlation": pytest.approx(1.0), "within_pairs": pytest.approx(1.0),
                               "chosen_longer": 1.0, "higher_longer": 1.0}
    assert found["accuracy"] == 1.0 and sum(b["n"] for b in found["calibration"]["bins"]) == 20
    mean = sum(1 / (1 + math.exp(-i / 10)) for i in range(1, 21)) / 20
    assert found["calibration"]["error"] == pytest.approx(1 - mean)
    assert describe([]) == {"n": 0, "prompts": 0}


def test_the_probe_finds_a_sibling_that_shows_through(tiny_model, monkeypatch):
    model = ModelFolder(tiny_model).load(torch.float32, CPU, reward=True, head_seed=0)
    assert runs_packed(model) == ""
    groups = collate([Example("", Group([5, 6], [[7, 8], [9, 3, 4]]))], [0], CPU)
    with torch.no_grad():
        packed, separate = Rewarder(model)(groups), Rewarder(model, packed=False)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(packed, separate(groups), rtol=0, atol=1e-5)
    model.set_attn_implementation("strop")
    body = model.base_model.forward

    def leaky(*args, **kwargs):
        out = body(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    monkeypatch.setattr(model.base_model, "forward", leaky)
    assert runs_packed(model)


def test_a_recipe_trains_one_from_ready_pairs_and_from_samples(tiny_model, tmp_path, capsys):
    rows = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": f"not {i + 1}", "margin": i % 3} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prompts = [{"prompt": f"say {a} or {b}", "answer": str(a)} for a in range(10) for b in range(10)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in prompts))
    recipe = tmp_path / "rm.yaml"
    recipe.write_text(f"""\
name: rm
method: reward
output_dir: {tmp_path / 'runs'}
dtype: float32
threads: 1
model: {{path: {tiny_model}}}
filter: {{near_duplicates: 0}}
data:
  validation: 5
  test: 5
  preferences: [{{name: pairs, path: {tmp_path / 'pairs.jsonl'}}}]
  sources:
    - {{name: digits, path: {tmp_path / 'prompts.jsonl'}, verifier: regex, verifier_args: {{pattern: "[0-9]"}}}}
sample: {{prompts: 24, k: 6, max_new_tokens: 16}}
reward: {{pairs: all, margin: 1.0, batch_size: 8, held_out: 0.2}}
log: {{tensorboard: false}}
""")
    threads = torch.get_num_threads()
    assert main([str(recipe)]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "round-00/reward" in out and f"weights {tmp_path / 'runs/rm/round-00/reward/model'}" in out
    found = read_json(tmp_path / "runs/rm/round-00/reward/reward.json")
    assert found["by_source"].keys() == {"pairs", "digits"}
    page = (tmp_path / "runs/rm/report.html").read_text()
    assert "Reward model" in page and "Calibration" in page and "reward model, by optimizer step" in page
    assert main([str(recipe)]) == 0 and "round-00/reward: up to date" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "runs/rm"), str(tmp_path / "exported")]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").config.num_labels == 1
    assert "| digits | " in (tmp_path / "exported/README.md").read_text()
    assert main(["show", str(tmp_path / "runs/rm")]) == 0
    kept, asked = (load_recipe(path).model_dump() for path in (tmp_path / "runs/rm/config.yaml", recipe))
    assert kept == asked


def test_ready_pairs_alone_are_enough(tiny_model, tmp_path):
    rows = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": f"not {i + 1}"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    threads, recipe = torch.get_num_threads(), tmp_path / "rm.yaml"
    recipe.write_text(f"""\
method: reward
output_dir: {tmp_path / 'runs'}
dtype: float32
threads: 1
model: {{path: {tiny_model}}}
data: {{preferences: [{{name: pairs, path: {tmp_path / 'pairs.jsonl'}, near_duplicates: false}}]}}
log: {{tensorboard: false}}
""")
    assert main([str(recipe)]) == 0
    torch.set_num_threads(threads)
    rows = read_table(tmp_path / "runs/rm/round-00/reward/held_out.parquet").to_pylist()
    assert 0 < len(rows) < 30 and {r["source"] for r in rows} == {"pairs"}


@pytest.mark.parametrize("keys, words", [
    ({"dpo": {"lr": 1e-3}}, "dpo is not read by method reward"), ({"rounds": 2}, "rounds"),
    ({"reward": {"held_out": 1.0}}, "reward.held_out"), ({"reward": {"nonsense": 1}}, "reward.nonsense")])
def test_keys_that_the_method_does_not_read_are_refused(keys, words):
    with pytest.raises(UserError, match=words):
        load_recipe({"method": "reward", "data": {"preferences": [{"name": "x", "path": "x"}]}} | keys)


def test_a_margin_that_is_no_number_is_quarantined(tiny_model, tmp_path):
    from strop.trainer.config import Filter, ReadyData
    from strop.trainer.data.ready import ready_pairs
    from strop.trainer.data.rows import Quarantine
    from strop.trainer.run.tables import Drops

    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": m} for m in (1, 0.5, "much", None)]
    lines = [json.dumps(row | {"prompt": f"a{i}"}) + "\n" for i, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    drops = Drops(stage_in(tmp_path / "stage", "select"))
    found = ready_pairs(ModelFolder(tiny_model).tokenizer(), ReadyData(name="x", path=str(tmp_path / "pairs.jsonl")),
                        Filter(near_duplicates=0), None, drops, Quarantine(1))
    assert [row["margin"] for row in found] == [1.0, 0.5, None] and drops.rows[0]["reason"] == "malformed"


def test_other_classifiers_are_refused_as_reward_models(tiny_model, tmp_path):
    with pytest.raises(UserError, match="ForSequenceClassification"):
        check_reward_model(tiny_model)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="3 outputs"):
        check_reward_model(tmp_path / "three")
    assert recipe_of().method == "rounds"
