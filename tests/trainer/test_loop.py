import json
import shutil
from collections import Counter

import pyarrow as pa
import pytest
import torch
from conftest import write_recipe
from training import largest_difference

from strop.trainer.main import main
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table, write_table


@pytest.fixture(scope="module")
def two_rounds(launcher, tiny_model, tmp_path_factory):
    """(recipe, what a plan printed before, the finished run of two rounds); not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    recipe = write_recipe(folder, tiny_model)
    recipe.write_text(recipe.read_text().replace("lr: 1.0e-3", "lr: 3.0e-3"))
    planned = launcher.run(folder, recipe, "--plan")
    assert planned.returncode == 0 and not (folder / "runs").exists(), planned.stderr
    done = launcher.run(folder, recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe, planned.stdout, done.stdout


def test_two_rounds_resume_and_recompute(strop, two_rounds):
    recipe, planned, first = two_rounds
    run = recipe.parent / "runs" / "tiny"
    assert planned.count("to run") == 22
    for stage in ("prompts", "baseline-held-out", "baseline", "final", *(f"round-0{r}/{s}" for r in (0, 1) for s in (
            "sample", "score", "select", "sft", "reference", "dpo", "merge", "held-out", "evaluate"))):
        assert (run / stage / "manifest.json").exists(), stage
    assert (run / "report.html").exists() and (run / "metrics.jsonl").exists() and (run / "config.yaml").exists()
    assert "round-01: promoted" in first and "gain over base" in first
    assert not list(run.rglob("work")) and not list(run.rglob("*.partial"))

    again = strop(recipe)
    assert again.returncode == 0 and again.stdout.count(": up to date\n") == 22

    changed = strop(recipe, "dpo.beta=0.3", "--plan")
    assert "dpo.beta: 0.1 -> 0.3" in changed.stdout
    lines = {w[0]: w[1] for w in (line.split() for line in changed.stdout.splitlines()) if len(w) > 1}
    assert lines["round-00/sft"] == "done" and lines["round-00/dpo"] == lines["round-01/sample"] == "stale"


def writers(run):
    """(its folder, manifests of its stages) of each round."""
    for name in ("round-00", "round-01"):
        yield run / name, {stage: read_json(run / name / stage / "manifest.json") for stage in ("sample", "sft", "dpo")}


def test_pairs_of_the_policy_are_what_dpo_starts_from(strop, two_rounds, tmp_path):
    """With pairs=policy DPO learns from completions of the weights that it starts from, in every round."""
    shutil.copytree(two_rounds[0].parent / "runs", tmp_path, dirs_exist_ok=True)  # what is up to date is not run again
    done = strop(two_rounds[0], "dpo.pairs=policy", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    for round_, found in writers(tmp_path / "tiny"):
        counts, inputs = found["dpo"]["counts"], found["dpo"]["inputs"]
        drawn = read_json(round_ / "dpo-sample" / "manifest.json")["inputs"]
        assert drawn["weights"] == inputs["policy"] != found["sample"]["inputs"]["weights"]
        assert counts["off_policy_share"] == 0 and abs(counts["writer_log_ratio"]) < 1e-3
        rows = [read_table(f).to_pylist() for f in round_.glob("*sample/shard-*.parquet")]
        assert {r["writer_hash"] for shard in rows for r in shard} == {
            drawn["weights"], found["sample"]["inputs"]["weights"]}
        origins = read_table(round_ / "dpo-select" / "pairs.parquet")["origin"].to_pylist()
        assert set(origins) == {round_.name}


def test_pairs_of_the_round_are_not_the_policys(two_rounds):
    for round_, found in writers(two_rounds[0].parent / "runs" / "tiny"):
        counts = found["dpo"]["counts"]
        assert not (round_ / "dpo-sample").exists()
        assert counts["off_policy_share"] == 1 and abs(counts["writer_log_ratio"]) > 1e-3


def test_final_folder_is_plain_transformers(two_rounds):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = two_rounds[0].parent / "runs" / "tiny" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "say 1"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    assert torch.isfinite(model(**ids).logits).all()
    assert "base_model:" in (final / "README.md").read_text()
    assert read_json(final / "results.json")["promotions"][0]["candidates"]["start"] == ["baseline", "base"]


def test_two_ranks_do_what_one_does(strop, two_rounds, tmp_path):
    """test_locks.py has two ranks under torchrun itself."""
    two = strop(two_rounds[0], "rounds=1", f"output_dir={tmp_path}", ranks=2)
    assert two.returncode == 0, two.stdout + two.stderr
    a, b = two_rounds[0].parent / "runs" / "tiny", tmp_path / "tiny"
    for table in ("prompts/prompts", "round-00/score/scores", "round-00/select/sft", "round-00/select/pairs",
                  "baseline/results", "round-00/sample/shard-00003"):
        assert read_table(a / f"{table}.parquet").equals(read_table(b / f"{table}.parquet")), table
    for stage in ("sft", "dpo"):
        assert largest_difference(a / "round-00" / stage / "model", b / "round-00" / stage / "model") < 1e-5
    assert read_json(b / "round-00/sample/manifest.json")["ranks"] == 2


@pytest.mark.parametrize("argument, message", [
    ("model.path=/nowhere", "model.path=/nowhere: no such folder"),
    ("data.sources.0.path=gone.jsonl", "gone.jsonl: no such file"),
])
def test_a_users_mistake_is_a_line_and_no_traceback(strop, tiny_recipe, argument, message):
    done = strop(tiny_recipe, argument, "rounds=1")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr


def test_a_job_of_ones_own(strop, tiny_model, tmp_path):
    """Two sources with their own verifiers and shares, ready data in TRL's columns, LoRA, an average, in one recipe."""
    pytest.importorskip("peft")
    write_table(tmp_path / "choice.parquet", pa.table({
        "question": [[{"role": "user", "content": f"pick a or b, {i}"}] for i in range(60)],
        "truth": ["a" if i % 2 else "b" for i in range(60)], "choices": [["a", "b"]] * 60}))
    lines = {"digits": [{"prompt": f"say {i}", "answer": str(i % 10)} for i in range(60)],
             "chats": [{"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ho"},
                                     {"role": "user", "content": "again"}, {"role": "assistant", "content": "ho ho"}]}
                       for i in range(6)],
             "pairs": [{"prompt": f"one or two, {i}? ", "chosen": "two", "rejected": "one"} for i in range(6)]
             + [{"prompt": "same? ", "chosen": "x", "rejected": "x"}]}
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"""\
output_dir: {tmp_path / 'runs'}
dtype: float32
rounds: 1
threads: 1
model: {{path: {tiny_model}}}
lora: {{rank: 4}}
data:
  validation: 6
  test: 10
  sources:
    - {{name: digits, path: {tmp_path / 'digits.jsonl'}, verifier: regex, verifier_args: {{pattern: "[0-9]"}},
       system_prompt: Be brief., share: 3}}
    - {{name: choice, path: {tmp_path / 'choice.parquet'}, prompt_column: question, answer_column: truth,
       verifier: choice}}
  sft: [{{name: chats, path: {tmp_path / 'chats.jsonl'}, weight: 0.5}}]
  preferences: [{{name: pairs, path: {tmp_path / 'pairs.jsonl'}, rounds: [0], weight: 2}}]
sample: {{prompts: 16, k: 6, max_new_tokens: 24}}
sft: {{batch_size: 4, lr: 1.0e-2}}
dpo: {{batch_size: 4, lr: 1.0e-2, ema_decay: 0.5, reference: base, nll_weight: 0.2}}
merge: {{method: average, members: [start, dpo], promote: last}}
evaluate: {{max_new_tokens: 8, bootstrap: 100}}
""")
    done = strop(recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "own"  # the run is named after its file
    drawn = {r["prompt_id"] for r in read_table(run / "round-00/sample/shard-00000.parquet").to_pylist()}
    prompts = {r["prompt_id"]: r for r in read_table(run / "prompts/prompts.parquet").to_pylist()}
    by_source = Counter(prompts[i]["source"] for i in drawn)
    assert by_source == {"digits": 12, "choice": 4}
    assert {p["messages"][0]["role"] for p in prompts.values() if p["source"] == "digits"} == {"system"}
    pairs = read_table(run / "round-00/select/pairs.parquet").to_pylist()
    assert [p["weight"] for p in pairs if p["origin"] == "pairs"] == [2] * 6
    drops = Counter(r["reason"] for r in read_table(run / "round-00/select/drops.parquet").to_pylist())
    assert drops["identical"] == 1
    assert sum(r["origin"] == "chats" for r in read_table(run / "round-00/select/sft.parquet").to_pylist()) == 6
    assert (run / "round-00/dpo/ema/model.safetensors").exists()
    moved = largest_difference(run / "round-00/dpo/model", tiny_model)
    assert 0 < largest_difference(run / "final", tiny_model) < moved


def test_ready_data_alone_needs_no_prompts(strop, tiny_model, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"one or two, {i}? ", "chosen": "two", "rejected": "one"}) + "\n" for i in range(6)))
    (tmp_path / "only.yaml").write_text(f"""\
output_dir: {tmp_path / 'runs'}
dtype: float32
rounds: 1
threads: 1
model: {{path: {tiny_model}}}
data: {{preferences: [{{name: pairs, path: {tmp_path / 'pairs.jsonl'}}}]}}
sft: {{enabled: false}}
dpo: {{batch_size: 4, lr: 1.0e-3, epochs: 2}}
""")
    done = strop(tmp_path / "only.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert largest_difference(tmp_path / "runs/only/final", tiny_model) > 0


def test_a_later_round_without_pairs_keeps_the_weights(tiny_recipe, tmp_path, capsys):
    """Ready pairs for round 0 alone, and samples that all score the same."""
    pairs = [{"prompt": f"ab{i}", "chosen": f"cd{i}", "rejected": f"xy{i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    text = tiny_recipe.read_text().replace('"[0-9]"', '"(?:)"')
    ready = f"  preferences: [{{name: mine, path: {tmp_path / 'pairs.jsonl'}, rounds: [0]}}]\nsample:"
    tiny_recipe.write_text(text.replace("sample:", ready))
    few = ["sample.prompts=8", "sample.k=4", "sample.max_new_tokens=60", "data.validation=2", "data.test=2"]
    arguments = [str(tiny_recipe), "select.accumulate=false", *few]
    assert main(arguments) == 0
    shown, run = capsys.readouterr().out, tmp_path / "runs" / "tiny"
    assert shown.count("round-01/dpo: the weights stay as they are: ") == 1 and "round-00/dpo: the w" not in shown
    assert read_json(run / "round-01/dpo/manifest.json")["counts"]["pairs"] == 0
    assert largest_difference(run / "round-01/sft/model", run / "round-01/dpo/model") == 0
    assert largest_difference(run / "round-00/sft/model", run / "round-00/dpo/model") > 0
    assert main([*arguments, "data.preferences=[]", "name=none"]) == 1  # nothing to keep in the first round
    assert "no pair is left to train on" in capsys.readouterr().err
