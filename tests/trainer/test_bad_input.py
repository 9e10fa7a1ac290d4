"""What users get wrong, and what they are told: one line a mistake, as docs/errors.md lists them."""

import errno
import gc
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from damage import (
    Place,
    cut_parquet,
    damaged,
    damaged_at_last,
    explode,
    flip,
    full,
    halve,
    held,
    mistyped,
    no_space_for,
    own_code,
    pickled,
    source,
    stopped_in_training,
    two_gpus,
    unknown_head,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from strop.trainer.errors import UserError
from strop.trainer.main import main
from strop.trainer.run.artifacts import list_files
from strop.trainer.run.files import read_json
from strop.trainer.run.tables import read_table

TRAINER = Path(__file__).parents[2] / "trainer"
ERRORS = TRAINER.parent / "docs" / "errors.md"

TURN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]

# name: (what is wrong, arguments, what the line says besides what docs/errors.md says of it)
CHECKPOINT = "strop.trainer.training.checkpoint.save_file"
CASES = {
    "unknown key": (lambda p: p.add("sampel: {k: 1}\n"), [], "tiny.yaml:20: sampel={'k': 1}"),
    "misspelt key": (lambda p: p.edit("k: 8", "kk: 8"), [], "sample.kk=8: unknown key; did you mean sample.k?"),
    "misspelt key in an override": (None, ["sft.lrr=1"], "command line: sft.lrr=1: unknown key; did you mean sft.lr?"),
    "wrong type": (lambda p: p.edit("lr: 1.0e-3", "lr: fast"), [], "sft.lr=fast"),
    "wrong type in an override": (None, ["sample.k=many"], "command line: sample.k=many"),
    "out of range": (None, ["sft.lr=-1"], "greater than 0"),
    "not one of the choices": (None, ["sft.schedule=cos"], "'cosine', 'linear'"),
    "rates that contradict": (None, ["select.pass_rate_min=0.9", "select.pass_rate_max=0.1"], "0.9"),
    "lengths that contradict": (None, ["filter.min_tokens=9", "filter.max_tokens=3"], "min_tokens=9 is above"),
    "prompts all alike": (lambda p: p.prompts.write_text("".join(
        json.dumps({"prompt": "say hello" + "!" * i, "answer": "1"}) + "\n" for i in range(100))),
        ["filter.near_duplicates=0"], "filter.decontaminate=8: every training prompt repeats a held-out one"),
    "merging what is off": (None, ["merge.method=average", "dpo.enabled=false"], "members names dpo"),
    "an average nobody keeps": (None, ["merge.method=ema", "sft.ema_decay=0.9"], "set dpo.ema_decay"),
    "as many weights as members": (None, ["merge.weights=[1.0]"], "weights has 1 entries, members 2"),
    "greedy and many": (None, ["sample.temperature=0"], "sample.k=8"),
    "a number the loss ignores": (None, ["dpo.loss=ipo", "dpo.label_smoothing=0.1"], "dpo.loss=ipo: label_smoothing"),
    "rounds that do not come": (lambda p: p.ready("sft", {"messages": TURN}), ["data.sft.0.rounds=[7]"],
                                "data.sft.0.rounds=[7]"),
    "two of one name": (lambda p: p.ready("sft", {"messages": TURN}), [
        "data.sft=[{name: a, path: x}, {name: a, path: y}]"], "data.sft: two entries"),
    "two sources of one name": (None, ["data.sources=[{name: a, path: x, verifier: math}, {name: a, path: y, verifier: "
                                       "math}]"], "data.sources: two sources share a name (a, a)"),
    "no sources": (None, ["data.sources=[]"], "data.sources is empty"),
    "no verifier": (lambda p: p.edit("      verifier: regex\n      verifier_args: {pattern: \"[0-9]\"}\n", ""), [],
                    "data.sources.0"),
    "no pattern": (lambda p: p.edit("verifier_args: {pattern: \"[0-9]\"}", "verifier_args: {}"), [],
                   "data.sources, digits"),
    "a key that is required": (lambda p: p.edit("    - name: digits\n      path", "    - path"), [],
                               "data.sources.0.name is missing"),
    "a doubled key": (lambda p: p.add("seed: 1\nseed: 2\n"), [], "tiny.yaml:21: seed"),
    "no YAML": (lambda p: p.add("x: [\n"), [], "tiny.yaml"),
    "a YAML tag that would run code": (lambda p: p.add("x: !!python/object/apply:os.system [true]\n"), [],
                                       "tiny.yaml:20"),
    "an empty recipe": (lambda p: p.recipe.write_text(""), [], "tiny.yaml"),
    "no recipe file": (lambda p: p.recipe.unlink(), [], "tiny.yaml"),
    "no such recipe": (None, None, "did you mean quickstart?"),
    "an unknown option": (None, ["--paln"], "--paln"),
    "a secret in the recipe": (lambda p: p.add("hf_token: hf_abc\n"), [], "tiny.yaml:20: hf_token"),
    "no prompt file": (lambda p: p.prompts.unlink(), [], "prompts.jsonl"),
    "unknown format": (lambda p: source(p, "p.csv", b"a,b"), [], "p.csv"),
    "a JSON array": (lambda p: source(p, "p.json", b'[{"prompt": "x"}]'), [], "p.json:1"),
    "an empty file": (lambda p: p.prompts.write_bytes(b""), [], "prompts.jsonl"),
    "a malformed line": (lambda p: p.line(b'{"prompt": '), [], "prompts.jsonl:101: not JSON"),
    "more malformed lines than tolerated": (lambda p: (p.line(b"{"), p.line(b"["), p.line(b"{")),
                                            ["data.max_bad_rows=2"], "prompts.jsonl:103: not JSON"),
    "invalid UTF-8": (lambda p: p.line(b'{"prompt": "\xff"}'), [], "prompts.jsonl:101: not UTF-8"),
    "a missing column": (lambda p: p.line({"question": "x", "answer": "1"}), [],
                         "prompts.jsonl:101: column 'prompt' is missing (there are: question, answer)"),
    "a mistyped column": (mistyped, [], "p.parquet:1: column 'prompt' must hold a string or a list of messages"),
    "a cut Parquet file": (cut_parquet, [], "p.parquet"),
    "fewer prompts than are held out": (None, ["data.test=500"], "data.test=500"),
    "an unknown dataset": (None, ["data.sources=[{name: a, reasoning_gym: chain_sums}]"], "did you mean chain_sum"),
    "ready data without its column": (lambda p: p.ready("preferences", {"prompt": "a", "chosen": "b"}), [],
                                      "ready.jsonl:1: column 'rejected' is missing"),
    "only equal pairs": (lambda p: p.ready("preferences", {"prompt": "a", "chosen": "b", "rejected": "b"}), [],
                         "identical 1"),
    "only empty completions": (lambda p: p.ready("sft", {"prompt": "a", "completion": " "}), [], "empty 1"),
    "nothing survives selection": (lambda p: p.edit("[0-9]", "(?!)"), [], "round-00/select"),
    "rows longer than the limit": (lambda p: p.ready("sft", {"prompt": "a", "completion": "b"}), ["sft.max_length=2"],
                                   "sft.parquet"),
    "pairs longer than the limit": (lambda p: p.ready("preferences", {"prompt": "a", "chosen": "b", "rejected": "c"}),
                                    ["dpo.max_tokens=3"], "pairs.parquet"),
    "prompts longer than the context": (None, ["evaluate.max_new_tokens=510"], "evaluate.max_new_tokens=510"),
    "no model folder": (None, ["model.path=/nowhere"], "model.path=/nowhere"),
    "no model package": (None, ["model.path=package:no_such_model"], "no-such-model"),
    "a package without a model": (None, ["model.path=package:json"], "package:json"),
    "a broken GGUF": (lambda p: (p.dir / "m.gguf").write_bytes(b"GGUFxx"), ["model.path={dir}/m.gguf"], "m.gguf"),
    "a folder that is no model": (lambda p: (p.model() / "config.json").unlink(), [], "model"),
    "a model without weights": (lambda p: (p.model() / "model.safetensors").unlink(), [], "model"),
    "pickled weights": (pickled, [], "model"),
    "cut weights": (lambda p: halve(p.model() / "model.safetensors"), [], "model"),
    "a tensor that is missing": (lambda p: p.weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), [],
                                 "model.layers.1.mlp.up_proj.weight"),
    "a tensor of another shape": (lambda p: p.weights(lambda t: t.update({"model.norm.weight": torch.ones(3)})), [],
                                  "model.norm.weight"),
    "an unknown architecture": (lambda p: p.config(model_type="llamma"), [], "llamma"),
    "a model with code of its own": (own_code, [], "model"),
    "no tokenizer": (lambda p: [f.unlink() for f in p.model().glob("*token*")], [], "model"),
    "no chat template": (lambda p: (p.model() / "chat_template.jinja").unlink(), [], "model.chat_template"),
    "no template file": (None, ["model.chat_template=gone.jinja"], "gone.jinja"),
    "a template that throws": (lambda p: p.template("{{ raise_exception('no users here') }}"), [], "no users here"),
    "a template that fails": (lambda p: p.template("{{ 1 / 0 }}"), [], "division by zero"),
    "a template that is none": (lambda p: p.template("{% for %}"), [], "of source digits"),
    "a template that reaches out": (lambda p: p.template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), [],
                                    "of source digits"),
    "a model that the probe refuses": (unknown_head, [], "LlamaForCausalLM"),
    "a loss that is not finite": (explode, [], "round-00/sft: step 2: "),
    "a full disk under a table": (no_space_for("scores"), [], "baseline.partial/scores.parquet"),
    "a full disk under a resume point": (lambda p: full(p, CHECKPOINT, SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)")), [], "work/step-000001"),
    "a full disk under weights": (lambda p: full(p, "transformers.PreTrainedModel.save_pretrained", OSError(
        errno.ENOSPC, "No space left on device")), [], "sft.partial/model"),
    "a read-only run directory": (lambda p: full(p, "strop.trainer.run.store.Path.mkdir", OSError(
        errno.EROFS, "Read-only file system")), [], "make it writable or choose another output_dir="),
    "an output_dir that is a file": (None, ["output_dir={dir}/prompts.jsonl"], "prompts.jsonl/tiny"),
    "a run directory in use": (held, [], "is running it"),
    "a damaged table": (damaged("prompts/prompts.parquet", "round-00/score"), [], "tiny/prompts/prompts.parquet"),
    "a cut table": (damaged("round-00/select/sft.parquet", "round-00/sft", halve), [], "select/sft.parquet"),
    "a table that is gone": (damaged("round-00/score/scores.parquet", "round-00/select", Path.unlink), [],
                             "delete the folder"),
    "damaged weights": (damaged("round-00/sft/model/model.safetensors", "round-00/dpo"), [],
                        "round-00/sft to re-run it"),
    "damaged results": (damaged("baseline/summary.json", "round-00/merge", lambda p: p.write_text(p.read_text().replace(
        '"pass_rate": 0.0', '"pass_rate": 1.0'))), [], "baseline/summary.json: damaged"),
    "damaged final weights": (damaged_at_last, [], "final/model.safetensors"),
    "a cut manifest": (damaged("round-00/sft/manifest.json", "round-00/dpo", halve), [], "sft/manifest.json"),
    "a manifest that is none": (damaged("round-00/sft/manifest.json", "round-00/dpo", lambda p: p.write_text("{}")), [],
                                "sft/manifest.json"),
    "a damaged resume point": (stopped_in_training, [], "step-000001/state.safetensors"),
    "no GPU": (None, ["device=cuda"], "device=cuda"),
    "fewer GPUs than ranks": (lambda p: two_gpus(p, ranks=4), [], "4 ranks on this machine, but torch finds 2 CUDA"),
}
FOUND: dict[str, str] = {}  # the row of docs/errors.md that a case was found in
SKIPPED = {"no GPU": torch.cuda.is_available()}


def table(heading: str) -> list[list[str]]:
    """Rows of the table below a heading of docs/errors.md."""
    text = ERRORS.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| `")]
    assert rows and len({len(row) for row in rows}) == 1 and len(rows[0]) in (2, 3), rows
    return rows


def pattern(message: str) -> re.Pattern:
    """A message of the table, where `…` stands for anything."""
    return re.compile(".*".join(re.escape(part) for part in message.strip("`").split("…")))


def run(place: Place, arguments: list[str] | None, capfd) -> tuple[int, list[str], str]:
    """(exit code, lines of stderr that are errors, all of it)"""
    shown = [a.format(dir=place.dir) if "{dir}" in a else a for a in arguments or []]
    code = main(["quikstart"] if arguments is None else [str(place.recipe), "rounds=1", *shown])
    text = capfd.readouterr().err
    return code, [line for line in text.splitlines() if line.startswith("error: ")], text


@pytest.fixture
def place(tiny_recipe, tiny_model, tiny_run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = Place(tiny_recipe, tiny_model, tiny_run)
    place.patch = monkeypatch
    return place


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line(name, place, capfd):
    if SKIPPED.get(name):
        pytest.skip("not a mistake here")
    if name == "an unknown dataset":
        pytest.importorskip("reasoning_gym")
    spoil, arguments, said = CASES[name]
    if spoil:
        spoil(place)
    code, errors, text = run(place, arguments, capfd)
    assert code == 1 and len(errors) == 1 and "Traceback" not in text, text
    assert said in errors[0] and len(errors[0]) < 700, errors[0]
    assert not (place.dir / "executed").exists()
    rows = [row[0] for row in table("Errors") if pattern(row[0]).search(errors[0])]
    assert len(rows) == 1, (errors[0], rows)
    FOUND[name] = rows[0]


def test_every_row_of_the_table_of_errors_has_its_case():
    assert len(CASES) >= 40
    if FOUND.keys() | {name for name in SKIPPED if SKIPPED[name]} != CASES.keys():
        pytest.skip("runs with all cases only")
    assert set(FOUND.values()) == {row[0] for row in table("Errors")}


def test_every_reason_for_leaving_a_row_out_is_in_the_table():
    said = r'(?:drops\.add\(|Unfit\(|fates\[[^]]+\] = |return \[\], |reason(?:, detail)? = )"(\w+)"'
    said = rf'(?:{said}|return \(?"(\w+)", (?:f"|why))'
    finish = r'(?:finish, [\w.]+ = |finish=|Reply\("", )"(\w+)"'  # completions that are not kept
    texts = [file.read_text(encoding="utf-8") for file in TRAINER.rglob("*.py")]
    used = {a or b for text in texts for a, b in re.findall(said, text)}
    used |= {a for text in texts for a in re.findall(finish, text)} - {"stop", "length"}
    assert used == {row[0].strip("`") for row in table("Rows left out")}


def test_debug_shows_the_traceback(place):
    with pytest.raises(UserError, match=r"prompts\.jsonl: no such file"):
        place.prompts.unlink()
        main([str(place.recipe), "--debug"])


GOOD = {"prompt": "ab", "chosen": "cd", "rejected": "ef"}
LONG = "".join(random.Random(0).choices("abcdefghij", k=600))


@pytest.mark.parametrize("kind, row, stage, reason", [
    ("preferences", {"prompt": "a", "chosen": "b", "rejected": "b"}, "select", "identical"),
    ("preferences", {"prompt": "a", "chosen": "b", "rejected": "b<|im_end|>"}, "select", "identical"),
    ("preferences", {"prompt": "a", "chosen": LONG + "b", "rejected": LONG + "c"}, "dpo", "overlong"),  # equal if cut
    ("preferences", {"prompt": LONG, "chosen": "b", "rejected": "c"}, "dpo", "overlong"),
    ("preferences", {"prompt": "a", "chosen": "", "rejected": "c"}, "select", "empty"),
    ("sft", {"prompt": "a", "completion": " "}, "select", "empty"),
    ("sft", {"prompt": LONG, "completion": "b"}, "sft", "overlong"),
    ("sft", {"prompt": "a"}, "select", "malformed"),
    ("sft", {"prompt": "a", "completion": 3}, "select", "malformed"),
])
def test_a_row_that_cannot_be_used_is_left_out_counted_and_the_run_goes_on(place, capfd, kind, row, stage, reason):
    good = GOOD if kind == "preferences" else {"prompt": "ab", "completion": "cd"}
    place.ready(kind, row, good)
    code, errors, text = run(place, ["data.max_bad_rows=1"], capfd)
    assert code == 0 and not errors, text
    folder = place.run / "round-00" / stage
    drops = Counter(r["reason"] for r in read_table(folder / "drops.parquet").to_pylist())
    assert drops == {reason: 1} and read_json(folder / "manifest.json")["counts"][f"dropped/{reason}"] == 1
    quarantined = (place.run / "round-00/select/quarantine.jsonl").read_text().splitlines()
    assert len(quarantined) == (reason == "malformed")
    if quarantined:
        assert json.loads(quarantined[0])["where"].endswith("ready.jsonl:1")


def test_pad_equal_to_eos_still_learns_the_end_and_a_doubled_bos_is_one(place, capfd):
    place.template("{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['role'][0] + m['content'] + eos_token }}"
                   "{% endfor %}{% if add_generation_prompt %}{{ 'a' }}{% endif %}")
    place.tokenizer(bos_token="<unk>", pad_token="<|im_end|>", eos_token="<|im_end|>")
    place.ready("sft", {"messages": TURN})
    code, _, text = run(place, [], capfd)
    assert code == 0, text
    row, = read_table(place.run / "round-00/select/sft.parquet").to_pylist()
    assert row["prompt_tokens"][0] == 0 and row["prompt_tokens"].count(0) == 1
    assert row["completion_tokens"][-1] == 2 and row["loss_mask"][-1]


def test_a_loss_that_is_not_finite_leaves_its_batch_and_a_resume_point_of_finite_weights(place, capfd):
    explode(place)
    for interval in (1, 10):  # however seldom it looks, nothing that is not finite is written
        _, errors, _ = run(place, [f"log.interval={interval}", f"name=every-{interval}"], capfd)
        work = place.dir / "runs" / f"every-{interval}" / "round-00/sft.partial" / "work"
        assert "step 2: " in errors[0] and sorted(p.name for p in work.iterdir()) == [
            "bad-step-000002.parquet", "step-000001"]
        batch = read_table(work / "bad-step-000002.parquet").to_pylist()
        assert len(batch) == 4 and all(r["row_id"] in errors[0] and r["completion_tokens"][0] for r in batch)
        state = load_file(work / "step-000001/state.safetensors")
        assert all(t.isfinite().all() for name, t in state.items() if name.startswith("exp_avg"))


def test_what_is_damaged_is_made_again_with_the_same_bits(place, capfd):
    """The remedies of the errors work, and a damaged shard of an unfinished stage is never used."""
    place.finish()
    whole = (place.run / "final/model.safetensors").read_bytes()
    flip(place.run / "round-00/sft/model/model.safetensors")
    for folder in ("round-00/dpo", "round-00/merge", "final"):
        shutil.rmtree(place.run / folder)
    _, errors, _ = run(place, [], capfd)
    shutil.rmtree(re.search(r"delete the folder (\S+)", errors[0])[1])
    partial = place.run / "round-00/sample.partial"
    (place.run / "round-00/sample").rename(partial)
    (partial / "manifest.json").unlink()
    intact = (partial / "shard-00001.parquet").read_bytes()
    flip(partial / "shard-00001.parquet")
    assert run(place, [], capfd)[0] == 0
    assert (place.run / "round-00/sample/shard-00001.parquet").read_bytes() == intact
    assert (place.run / "final/model.safetensors").read_bytes() == whole


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount a small disk")
def test_a_disk_that_is_full_loses_nothing(place, capfd):
    place.finish()
    disk = place.dir / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount")
    stopped = []
    try:
        for size in (48, 80, 120, 180, 260, 400, 600, 900, 4000):
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
            code, errors, text = run(place, [f"output_dir={disk}", "name=full"], capfd)
            if code == 0:
                break
            assert len(errors) == 1 and "free some space" in errors[0] and str(disk) in errors[0], text
            stopped += errors
            for manifest in (disk / "full").rglob("manifest.json"):
                found = {k: v for k, v in list_files(manifest.parent).items() if k != "manifest.json"}
                assert manifest.parent.name.endswith(".partial") or found == read_json(manifest)["files"]
        assert code == 0 and len(stopped) >= 4
        weights = "final/model.safetensors"
        assert (disk / "full" / weights).read_bytes() == (place.run / weights).read_bytes()
        while subprocess.run(["mount", "-o", "remount,ro", disk]).returncode:  # a file is still open
            gc.collect()  # of a run that failed, whose objects may hold each other
            time.sleep(0.5)
        code, errors, _ = run(place, [f"output_dir={disk}", "name=full"], capfd)
        assert code == 1 and "make it writable or choose another output_dir=" in errors[0]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
