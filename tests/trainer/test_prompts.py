import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stagecalls import prompts

from strop.trainer.config import Filter, Recipe
from strop.trainer.data.rows import read_rows
from strop.trainer.data.splits import allot
from strop.trainer.data.text import normalize
from strop.trainer.errors import UserError
from strop.trainer.run.tables import read_table

sys.path.insert(0, str(Path(__file__).parent))
from training import stage_in


def recipe_of(*sources, seed=0, **data):
    data = {"sources": list(sources), "test": 5, "validation": 3} | data
    return Recipe.model_validate({"data": data, "seed": seed})


def source(path, name="s", **keys):
    return {"name": name, "path": str(path), "verifier": "exact"} | keys


def jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def questions(n, word="question"):
    return [{"prompt": f"{word} {i}", "answer": str(i)} for i in range(n)]


def run(tmp_path, recipe, name="prompts"):
    stage = stage_in(tmp_path / name, "prompts")
    prompts(stage, recipe)
    return (read_table(stage.dir / "prompts.parquet").to_pylist(), read_table(stage.dir / "drops.parquet").to_pylist(),
            stage)


def user(row):
    return row["messages"][-1]["content"]


def test_rows_come_out_with_their_template_system_prompt_and_metadata(tmp_path):
    rows = [*questions(20), {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}],
                             "answer": 4, "level": 3}]
    path = jsonl(tmp_path / "p.jsonl", rows)
    recipe = recipe_of(source(path, system_prompt="Be brief.", prompt_template="Q: {prompt}?"))
    found, drops, stage = run(tmp_path, recipe)
    assert len(found) == 21 and not drops
    assert stage.counts["prompts"] == 21 and stage.counts["test"] == 5 and stage.counts["validation"] == 3
    first, last = found[0], found[-1]
    assert first["messages"] == [{"role": "system", "content": "Be brief."},
                                 {"role": "user", "content": "Q: question 0?"}]
    assert last["messages"][0]["content"] == "Be brief.\n\nown" and last["answer"] == "4"
    assert json.loads(last["metadata"]) == {"level": 3}
    assert (first["conversational"], last["conversational"]) == (False, True)


def test_formats_give_the_same_prompts(tmp_path):
    rows = questions(20)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "p.parquet")
    (tmp_path / "saved").mkdir()
    file = str(tmp_path / "saved" / "data.arrow")
    with pa.OSFile(file, "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    paths = [jsonl(tmp_path / "p.jsonl", rows), tmp_path / "p.parquet", tmp_path / "saved"]
    results = [run(tmp_path, recipe_of(source(path)), str(i))[0] for i, path in enumerate(paths)]
    assert results[0] == results[1] == results[2] and len(results[0]) == 20


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_folder_that_datasets_saved(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "answer": str(i)} for i in range(20)]
    saved = Dataset.from_list(rows).select(range(10, 20))  # an index mapping, which saving resolves
    saved.save_to_disk(tmp_path / "one")
    assert [r.data["answer"] for r in read_rows(tmp_path / "one")] == [str(i) for i in range(10, 20)]
    DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "many")
    with pytest.raises(UserError, match=r"several splits \(test, train\)"):
        list(read_rows(tmp_path / "many"))


def test_ids_know_content_only(tmp_path):
    one = jsonl(tmp_path / "a.jsonl", questions(20))
    two = jsonl(tmp_path / "b.jsonl", [{"q": f"  question\n{i} ", "solution": str(i)} for i in range(20)])
    a, _, _ = run(tmp_path, recipe_of(source(one)), "a")
    b, _, _ = run(tmp_path, recipe_of(source(two, "other", prompt_column="q", answer_column="solution")), "b")
    assert [r["prompt_id"] for r in a] == [r["prompt_id"] for r in b]
    assert [r["split"] for r in a] == [r["split"] for r in b]
    c, _, _ = run(tmp_path, recipe_of(source(one, system_prompt="x")), "c")
    assert not {r["prompt_id"] for r in a} & {r["prompt_id"] for r in c}
    assert [r["split"] for r in a] == [r["split"] for r in c]


def test_duplicates_are_dropped_and_counted(tmp_path):
    rows = [*questions(20), {"prompt": "question  1\n", "answer": "1"}, {"prompt": "question 2", "answer": "another"}]
    found, drops, stage = run(tmp_path, recipe_of(source(jsonl(tmp_path / "p.jsonl", rows))))
    assert len(found) == 20 and stage.counts["dropped/duplicate"] == 2
    assert [d["detail"].split(":")[-1] for d in drops] == ["21", "22, with another answer"]
    assert found[1]["answer"] == "1"
    assert [d["prompt_id"] for d in drops] == [found[1]["prompt_id"], found[2]["prompt_id"]]


PAIRS = [("x²", "x2"), ("a", "A"), ("H₂O", "H2O"), ("CO", "Co"), ("①", "1"), ("𝐱", "x"), ("m²", "m2"), ("pH", "PH"),
         ("ℝ", "R")]
SPELLINGS = [("½ cup", "1⁄2 cup"), ("Ⅳ", "IV"), ("ﬀ", "ff"), ("The End", "THE END"), ("Tea", "tea")]  # of the same


@pytest.mark.parametrize("asked", ["{}?", "What is the meaning of {} in the text that stands above this question?"])
def test_case_and_compatibility_forms_make_other_prompts(tmp_path, asked):
    """They share a split, so that spellings of one question are not on both sides."""
    rows = [{"prompt": asked.format(form), "answer": "1"} for pair in PAIRS + SPELLINGS for form in pair]
    words = ("river", "cold hills", "seven gates", "a bridge", "the old town", "my cat", "nine doors", "red wine")
    rows += [{"prompt": f"How far is {a} from {b}?", "answer": "1"} for a in words for b in words if a != b]
    recipe = recipe_of(source(jsonl(tmp_path / "p.jsonl", rows))).model_copy(update={"filter": Filter(decontaminate=0)})
    found, drops, _ = run(tmp_path, recipe)
    split = {user(r): r["split"] for r in found}
    assert {asked.format(form) for pair in PAIRS for form in pair} <= split.keys()
    assert not {asked.format(second) for _, second in SPELLINGS} & split.keys()
    assert [d["reason"] for d in drops] == ["near_duplicate"] * len(SPELLINGS)
    assert len({r["prompt_id"] for r in found} | {d["prompt_id"] for d in drops}) == len(rows)
    for one, other in PAIRS:
        assert normalize(one) != normalize(other) or split[asked.format(one)] == split[asked.format(other)]


def test_composed_and_decomposed_letters_are_one_prompt(tmp_path):
    rows = [*questions(20), *({"prompt": f"{word} or tea?", "answer": "1"} for word in ("caf\u00e9", "cafe\u0301"))]
    found, drops, _ = run(tmp_path, recipe_of(source(jsonl(tmp_path / "p.jsonl", rows))))
    assert len(found) == 21 and [d["reason"] for d in drops] == ["duplicate"]


def contents(rows, split):
    return {normalize(user(r)) for r in rows if r["split"] == split}


@pytest.mark.parametrize("seed", range(5))
def test_splits_do_not_overlap_though_sources_share_prompts(tmp_path, seed):
    one = jsonl(tmp_path / "a.jsonl", questions(40))
    two = jsonl(tmp_path / "b.jsonl", questions(60)[20:])
    found, _, _ = run(tmp_path, recipe_of(source(one), source(two, "t", system_prompt="Answer briefly."), test=15,
                                          validation=10, seed=seed), str(seed))
    assert len(found) == 80  # the system prompt makes them different prompts of the same content
    train, validation, test = (contents(found, s) for s in ("train", "validation", "test"))
    assert not train & test and not train & validation and not validation & test
    assert sum(r["split"] == "test" for r in found) >= 15 and sum(r["split"] == "validation" for r in found) >= 10


def test_splits_follow_shares_seed_and_content_not_order(tmp_path):
    one, two = jsonl(tmp_path / "a.jsonl", questions(100)), jsonl(tmp_path / "b.jsonl", questions(100, "riddle"))
    sources = source(one), source(two, "t", share=3.0)
    found, _, _ = run(tmp_path, recipe_of(*sources, test=40, validation=20), "x")
    held = Counter((r["split"], r["source"]) for r in found if r["split"] != "train")
    assert held == {("test", "s"): 10, ("test", "t"): 30, ("validation", "s"): 5, ("validation", "t"): 15}
    assert run(tmp_path, recipe_of(*sources, test=40, validation=20), "again")[0] == found
    jsonl(one, reversed(questions(100)))
    turned, _, _ = run(tmp_path, recipe_of(*sources, test=40, validation=20), "turned")
    assert {r["prompt_id"]: r["split"] for r in turned} == {r["prompt_id"]: r["split"] for r in found}
    other, _, _ = run(tmp_path, recipe_of(*sources, test=40, validation=20, seed=1), "other")
    assert contents(other, "test") != contents(found, "test")


def test_too_few_prompts(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", questions(8))
    with pytest.raises(UserError, match=r"data\.test=5 and data\.validation=3 .* 8 distinct prompts \(s 8\); give"):
        run(tmp_path, recipe_of(source(path)))


@given(st.integers(0, 60), st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 40)), min_size=1, max_size=6))
def test_allot_gives_all_and_never_more_than_there_is(total, sources):
    shares = {str(i): s for i, (s, _) in enumerate(sources)}
    room = {str(i): n for i, (_, n) in enumerate(sources)}
    total = min(total, sum(room.values()))
    given_ = allot(total, shares, room)
    assert sum(given_.values()) == total and all(0 <= given_[k] <= room[k] for k in room)


# ---- what users get wrong

BAD = {
    "not json": ('{"prompt": "x", ', "not JSON"),
    "not utf-8": (b'{"prompt": "\xff", "answer": "1"}', "not UTF-8 at byte 12"),
    "no object": ("[1, 2]", "must be a JSON object, is a list"),
    "missing column": ('{"question": "x", "answer": "1"}',
                       r"column 'prompt' is missing \(there are: question, answer\); set prompt_column of source s"),
    "number as prompt": ('{"prompt": 3, "answer": "1"}',
                         "column 'prompt' must hold a string or a list of messages, is a number"),
    "null prompt": ('{"prompt": null, "answer": "1"}', "is null"),
    "answer is a list": ('{"prompt": "x", "answer": ["1"]}', "'answer' must hold a string or a number, is a list"),
    "answer is a boolean": ('{"prompt": "x", "answer": true}', "is a boolean"),
    "no answer": ('{"prompt": "x"}', r"needs an answer, and there is none \(column 'answer'\)"),
    "no messages": ('{"prompt": [], "answer": "1"}', "column 'prompt' must hold a list of messages, is empty"),
    "no role": ('{"prompt": [{"content": "x"}], "answer": "1"}', r"prompt\[0\]\.role must be a string, is null"),
    "no content": ('{"prompt": [{"role": "user"}], "answer": "1"}', r"prompt\[0\]\.content must be a string, is null"),
    "assistant last": ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}', "must be the user's"),
    "surrogate": (r'{"prompt": "\ud800", "answer": "1"}', "lone surrogate"),
    "deep": ("[" * 100000, "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_row_stops_the_run_with_file_and_line(tmp_path, name):
    line, match = BAD[name]
    path = tmp_path / "p.jsonl"
    rows = [json.dumps(r).encode() for r in questions(20)]
    path.write_bytes(b"\n".join([*rows[:3], line if isinstance(line, bytes) else line.encode(), *rows[3:]]) + b"\n")
    with pytest.raises(UserError, match=match) as e:
        run(tmp_path, recipe_of(source(path)))
    assert str(e.value).startswith(f"{path}:4: ") and "data.max_bad_rows=0" in str(e.value) and "\n" not in str(e.value)
    assert len(str(e.value)) < 600


def test_malformed_rows_are_set_aside_up_to_the_limit(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [*questions(20), "{", "", "[]"])
    found, drops, stage = run(tmp_path, recipe_of(source(path), max_bad_rows=2))
    quarantined = [json.loads(line) for line in (stage.dir / "quarantine.jsonl").read_text().splitlines()]
    assert len(found) == 20 and stage.counts["dropped/malformed"] == 2
    assert [q["where"].split(":")[-1] for q in quarantined] == ["21", "23"]
    assert [d["detail"].startswith(f"{path}:{n}: ") for d, n in zip(drops, (21, 23), strict=True)] == [True, True]
    with pytest.raises(UserError, match=r"p\.jsonl:23: .*1 bad rows before it \(data\.max_bad_rows=1"):
        run(tmp_path, recipe_of(source(path), max_bad_rows=1), "stopped")


def test_the_limit_holds_per_file(tmp_path):
    paths = [jsonl(tmp_path / f"{w}.jsonl", [*questions(20, w), "{"]) for w in "ab"]
    recipe = recipe_of(source(paths[0]), source(paths[1], "t"), max_bad_rows=1)
    assert run(tmp_path, recipe)[2].counts["dropped/malformed"] == 2


def test_blank_prompts_are_dropped_as_empty(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [*questions(20), {"prompt": " \n", "answer": "1"}])
    assert run(tmp_path, recipe_of(source(path)))[2].counts["dropped/empty"] == 1


@pytest.mark.parametrize("name,content,match", [
    ("p.jsonl", None, "no such file"), ("p.jsonl", b"", "holds no rows"), ("p.jsonl", b"\n \n", "holds no rows"),
    ("p.jsonl", b'[{"prompt": "x"}]', "one JSON array"), ("p.csv", b"a,b", "unknown format"),
    ("p.parquet", b"PAR1 cut off", "not readable"), ("p.parquet", b"", "not readable")])
def test_unreadable_files(tmp_path, name, content, match):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=match) as e:
        run(tmp_path, recipe_of(source(path)))
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"not a folder saved by `datasets`"):
        list(read_rows(tmp_path))


def test_unicode_line_ends_inside_strings_do_not_split_rows(tmp_path):
    rows = [{"prompt": f"a\u2028b\x85 {i}", "answer": "1"} for i in range(20)]
    path = tmp_path / "p.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows), encoding="utf-8")
    assert len(run(tmp_path, recipe_of(source(path)))[0]) == 20


def test_wrong_verifier_arguments_name_the_source(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", questions(20))
    with pytest.raises(UserError, match=r"data\.sources, s: verifier_args\.pattern is missing"):
        run(tmp_path, recipe_of(source(path, verifier="regex")))


# ---- reasoning-gym

gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym")


@gym
def test_reasoning_gym_source(tmp_path):
    keys = {"name": "sums", "reasoning_gym": "chain_sum", "size": 60, "reasoning_gym_config": {"max_digits": 2}}
    found, _, _ = run(tmp_path, recipe_of(keys), "a")
    assert found and not any(r["conversational"] for r in found)
    entry = json.loads(found[0]["metadata"])
    assert entry["metadata"]["source_dataset"] == "chain_sum" and entry["answer"] == found[0]["answer"]
    assert user(found[0]) == entry["question"]
    assert run(tmp_path, recipe_of(keys), "b")[0] == found
    assert run(tmp_path, recipe_of(keys, seed=1), "c")[0] != found
    pinned = keys | {"reasoning_gym_config": {"seed": 5}}
    a, b = (run(tmp_path, recipe_of(pinned, seed=s), f"pinned{s}")[0] for s in (0, 1))
    assert {r["prompt_id"] for r in a} == {r["prompt_id"] for r in b}


@gym
@pytest.mark.parametrize("keys,match", [
    ({"reasoning_gym": "chain_sums"}, "did you mean chain_sum"),
    ({"reasoning_gym": "chain_sum", "reasoning_gym_config": {"digits": 2}}, r"chain_sum refuses .*digits"),
    ({"reasoning_gym": "chain_sum", "reasoning_gym_config": {"min_digits": 0}}, "refuses"),
    ({"reasoning_gym": "chain_sum", "reasoning_gym_config": {"size": 5}}, "set size of the source")])
def test_reasoning_gym_mistakes(tmp_path, keys, match):
    with pytest.raises(UserError, match=match) as e:
        run(tmp_path, recipe_of({"name": "s", "size": 20} | keys))
    assert "\n" not in str(e.value)


@gym
def test_entries_whose_own_answer_fails_are_dropped(tmp_path):
    keys = {"name": "arc", "reasoning_gym": "rearc", "size": 3}  # its scorer needs tuples, which JSON does not keep
    stage = stage_in(tmp_path / "prompts", "prompts")
    with pytest.raises(UserError, match="0 distinct prompts"):
        prompts(stage, recipe_of(keys))
