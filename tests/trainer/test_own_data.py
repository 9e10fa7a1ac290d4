"""Methods that learn from what the model itself revises and judges: constitutional and self_distill."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from training import largest_difference
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.trainer.cli import load_recipe
from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.methods.running import plan
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table
from strop.trainer.scoring.verdicts import Verdict

sys.path.insert(0, str(Path(__file__).parent))

# of a model with a context of 512 characters
JUDGE = "judge: {mode: pairwise, template: '{prompt} {first} {second} {verdict}'}"
GRADE = "name: grade, weight: 0, judge: {mode: rubric, scale: [1, 2], template: '{prompt} {completion} {verdict}'}"
REVISE = "critique: 'C {feedback}', revision: R, max_new_tokens: 40"


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def brief_model(tiny_model, tmp_path_factory):
    """The tiny model, trained to answer anything with a few random characters and to stop."""
    folder = tmp_path_factory.mktemp("models") / "brief"
    shutil.copytree(tiny_model, folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    draw, end = random.Random(0), tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        rows = []
        for _ in range(16):
            asked = "".join(draw.choices("say 0123456789 C x R ", k=draw.randint(1, 40)))
            prompt = tokenizer(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            answer = [*(draw.randrange(3, 60) for _ in range(draw.randint(2, 8))), end]
            rows.append(([*prompt, *answer], [-100] * len(prompt) + answer))
        longest = max(len(ids) for ids, _ in rows)
        ids, labels = (torch.tensor([[*row[i], *[(end, -100)[i]] * (longest - len(row[i]))] for row in rows])
                       for i in (0, 1))
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def recipe(folder, model, method, scorers, rest):
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"say {a} or {b}"} for a in range(6) for b in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{method}.yaml"
    path.write_text(f"""\
method: {method}
output_dir: {folder / 'runs'}
dtype: float32
threads: 1
model: {{path: {model}}}
data:
  validation: 4
  test: 4
  sources:
    - {{name: digits, path: {prompts}, scorers: [{scorers}]}}
sample: {{prompts: 14, k: 4, max_new_tokens: 24}}
sft: {{batch_size: 2, lr: 1.0e-3, checkpoint_steps: 1, eval_steps: 0}}
dpo: {{batch_size: 4, lr: 1.0e-4, checkpoint_steps: 1, eval_steps: 0}}
evaluate: {{max_new_tokens: 8, bootstrap: 100, kl_prompts: 0}}
log: {{tensorboard: false}}
{rest}
""")
    return path


@pytest.fixture
def judges(monkeypatch):
    """Replaces the verdicts of local judges, which a model this small cannot give in both orders: by a fixed order of
    all completions, without ties. Returns the folders of the judges that were asked."""
    folders = set()

    def answer(judge, questions):
        folders.add(judge.path)
        for i, q in enumerate(questions):
            if q.second is None:
                yield i, Verdict(q.labels[int(q.first, 16) % 2])
            else:
                yield i, Verdict("A" if q.first > q.second else "B")

    monkeypatch.setattr("strop.trainer.scoring.judge.LocalJudge.answer", answer)
    return folders


@pytest.fixture(scope="module")
def constitution(brief_model, tmp_path_factory):
    return recipe(tmp_path_factory.mktemp("constitution"), brief_model, "constitutional", f"{{{JUDGE}}}, {{{GRADE}}}",
                  f"revise: {{{REVISE}, per_prompt: 2, times: 2, principles: [x, y, z]}}\n"
                  "score: {correct_by: grade, correct_at: 0.5}\nselect: {pair_margin: 0.3}")


def test_constitutional_learns_its_revisions_and_then_what_its_start_weights_prefer(constitution, judges, monkeypatch):
    folder = constitution.parent / "runs"
    stages = [entry["stage"] for entry in plan(constitution)]
    assert stages == ["prompts", "baseline-held-out", "baseline", *(f"round-00/{name}" for name in (
        "draft", "revise", "revised", "sft", "sample", "score", "select", "reference", "dpo", "held-out", "evaluate")),
        "final"]
    assert not folder.exists() and main([str(constitution)]) == 0
    run = folder / "constitutional"
    assert {entry["state"] for entry in plan(constitution)} == {"done"}
    drafts = read_json(run / "round-00/draft/manifest.json")["counts"]
    revised = {tuple(row["completion_tokens"]): row for path in (run / "round-00/revise").glob("shard-*")
               for row in read_table(path).to_pylist()}
    learned = read_table(run / "round-00/revised/sft.parquet").to_pylist()
    assert drafts["samples"] == 28 and len(learned) > 3
    assert all(tuple(row["completion_tokens"]) in revised for row in learned)
    asked = [step["feedback"] for row in revised.values() for step in row["steps"]]
    assert set(asked) == {"x", "y", "z"} and {len(row["steps"]) for row in revised.values()} == {2}
    pairs = read_table(run / "round-00/select/pairs.parquet").to_pylist()
    assert pairs and all(row["chosen_score"] > row["rejected_score"] for row in pairs)
    assert {row["decided_by"] for row in pairs} == {"judge_pairwise"}
    assert judges == {Path(load_recipe(constitution).model.path)}
    writers = {row["chosen_writer_hash"] for row in pairs}
    assert len(writers) == 1
    inputs = {entry["stage"].removeprefix("round-00/"): {
        name: source.removeprefix("round-00/") for name, source in entry["inputs"].items()
        if name.partition(".")[0] not in ("prompts", "tokenizer", "student", "files")}
        for entry in read_json(run / "plan.json")["stages"]}
    start, tuned = "outside", "sft/model"
    assert {name: inputs[name] for name in ("draft", "revise", "revised", "sft", "sample", "score", "select",
                                            "reference", "dpo", "final")} == {
        "draft": {"weights": start}, "revise": {"weights": start, "sample": "draft"},
        "revised": {"history.0.0": "revise"}, "sft": {"select": "revised", "start": start},
        "sample": {"weights": tuned}, "score": {"sample": "sample"},
        "select": {"history.0.0": "sample", "history.0.1": "score"},
        "reference": {"select": "select", "weights": tuned},
        "dpo": {"select": "select", "policy": tuned, "reference": "reference"}, "final": {"weights": "dpo/model"}}
    assert read_json(run / "promotions.json")[0]["promoted"] == "dpo"
    assert largest_difference(run / "final", run / "round-00/sft/model") > 0

    # killed in the middle of both trainings and resumed: the same bits
    from strop.trainer.run.metrics import Metrics

    class Killed(BaseException):  # nobody catches it
        pass

    log, seen = Metrics.log, []

    def killed(self, stage, step, *args, **keys):
        log(self, stage, step, *args, **keys)
        if step == 2 and stage not in seen:
            seen.append(stage)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", killed)
        for _ in range(2):
            with pytest.raises(Killed):
                main([str(constitution), "name=killed"])
    assert seen == ["round-00/sft", "round-00/dpo"] and main([str(constitution), "name=killed"]) == 0
    assert largest_difference(run / "final", folder / "killed" / "final") == 0.0


@pytest.mark.parametrize("key, words", [
    ("merge.promote=best", "merge is not read by method constitutional; leave it out"),
    ("write_prompts.enabled=true", "write_prompts is not read by method constitutional"),
    ("dpo.pairs=policy", r"dpo.pairs is not read by method constitutional"),
    ("sft.start=previous", r"sft.start is not read by method constitutional"),
    ("revise.feedback=errors", r"revise.feedback is not read by method constitutional"),
    ("rounds=2", "rounds=2"), ("reward.lr=1.0e-3", "reward"), ("revise.time=2", "did you mean revise.times"),
    ("sample.models=[{name: a}, {name: b}]", "samples its own weights")])
def test_keys_that_constitutional_does_not_read_are_refused_by_name(constitution, key, words):
    from strop.trainer.cli import parse

    with pytest.raises(UserError, match=words):
        parse([str(constitution), key])


def test_defaults_are_the_papers_and_the_recipe_reads_back(constitution, tmp_path):
    from strop.trainer.config import to_yaml

    made = load_recipe(constitution)
    assert load_recipe("constitutional").revise.times == 2 and made.revise.times == 2
    assert load_recipe({"method": "constitutional", "data": made.data.model_dump(mode="json")}).revise.times == 4
    (tmp_path / "again.yaml").write_text(to_yaml(made))
    assert load_recipe(tmp_path / "again.yaml") == made and "merge" not in to_yaml(made)


@pytest.fixture(scope="module")
def corrections(brief_model, tmp_path_factory):
    """Correct is an answer with a digit, which about half of the model's have; the scorer says what is missing."""
    folder = tmp_path_factory.mktemp("corrections")
    (folder / "mine.py").write_text("""\
def digit(completion):
    there = any(c in "0123456789" for c in completion)
    return {"score": float(there)} if there else {"score": 0.0, "missing": "digit"}
""")
    return recipe(folder, brief_model, "self_distill", f"{{python: {folder / 'mine.py'}:digit}}",
                  f"rounds: 1\nrevise: {{{REVISE}}}")


def test_self_distill_prefers_corrections_to_what_they_correct(corrections):
    assert main([str(corrections)]) == 0
    run = corrections.parent / "runs" / "self_distill"
    rows = [row for path in sorted((run / "round-00/sample").glob("shard-*")) for row in read_table(path).to_pylist()]
    judged = {(r["prompt_id"], r["sample_index"]): r["correct"]
              for r in read_table(run / "round-00/select/judged.parquet").to_pylist()}
    first = {(r["prompt_id"], tuple(r["completion_tokens"])): r for r in reversed(rows)}
    pairs = read_table(run / "round-00/select/pairs.parquet").to_pylist()
    assert pairs
    for pair in pairs:
        chosen, rejected = (first[pair["prompt_id"], tuple(pair[f"{side}_tokens"])] for side in ("chosen", "rejected"))
        assert [any(c in "0123456789" for c in row["completion"]) for row in (chosen, rejected)] == [True, False]
        assert chosen["revised_from"] == {k: rejected[k] for k in ("prompt_id", "sample_index")}
        assert judged[chosen["prompt_id"], chosen["sample_index"]]
        assert not judged[rejected["prompt_id"], rejected["sample_index"]]
        assert chosen["writer_hash"] == rejected["writer_hash"]
    learned = {row["writer"] for row in read_table(run / "round-00/select/sft.parquet").to_pylist()}
    assert "revise-current" in learned
    assert {entry["state"] for entry in plan(corrections)} == {"done"}
    assert largest_difference(run / "round-00/dpo/model", run / "round-00/sft/model") > 0


@pytest.mark.parametrize("key, words", [
    ("revise.times=2", "revise.times is not read by method self_distill"),
    ("revise.feedback=principles", "method self_distill corrects errors"),
    ("dpo.pairs=policy", "dpo.pairs is not read by method self_distill")])
def test_keys_that_self_distill_does_not_read_are_refused_by_name(corrections, key, words):
    from strop.trainer.cli import parse

    with pytest.raises(UserError, match=words):
        parse([str(corrections), key])
