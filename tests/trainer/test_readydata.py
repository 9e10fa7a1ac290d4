import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from strop.trainer.config import Filter, ReadyData
from strop.trainer.data.chat import encode_completion, encode_conversation, encode_prompt, encode_text
from strop.trainer.data.ready import check_ready, ready_pairs, ready_rated, ready_sft
from strop.trainer.data.rows import Quarantine
from strop.trainer.errors import UserError
from strop.trainer.run.tables import Drops

sys.path.insert(0, str(Path(__file__).parent))
from chats import tokenizer_of, turns
from training import stage_in

QUESTION = turns("what is 2+2?")


def says(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of("chatml")


def read(tmp_path, tokenizer, rows, make, max_bad_rows=0, weight=1.0, filters=None, held=None):
    path = tmp_path / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    drops = Drops(stage_in(tmp_path, "select"))
    quarantine = Quarantine(max_bad_rows)
    data = ReadyData(name="mine", path=str(path), weight=weight)
    found = make(tokenizer, data, filters or Filter(), held, drops, quarantine)
    return found, drops.rows


# ---- SFT

def test_messages_prompt_completion_and_plain_text(tmp_path, tokenizer):
    rows = [{"messages": turns("2+2", "4", "3+3", "6")}, {"prompt": QUESTION, "completion": says("4")},
            {"prompt": "the sky is", "completion": " blue"}]
    found, drops = read(tmp_path, tokenizer, rows, ready_sft, weight=0.5)
    wanted = [encode_conversation(tokenizer, rows[0]["messages"]),
              (encode_prompt(tokenizer, QUESTION), encode_completion(tokenizer, QUESTION, says("4"))),
              encode_text(tokenizer, "the sky is", " blue")]
    assert not drops
    for i, (row, (prompt, encoded)) in enumerate(zip(found, wanted, strict=True), 1):
        assert row["prompt_tokens"] == prompt and row["completion_tokens"] == encoded.tokens
        assert row["loss_mask"] == encoded.loss_mask and row["row_id"] == f"mine/{i}"
        assert row["weight"] == 0.5 and row["origin"] == row["source"] == "mine"
        assert row["prompt_id"] is None and row["score"] is None
    assert not all(found[0]["loss_mask"])
    assert tokenizer.decode(found[2]["prompt_tokens"] + found[2]["completion_tokens"]) == "the sky is blue<|im_end|>"


def test_columns_of_tools_and_template_keywords_reach_the_template(tmp_path):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ tools[0].name if tools else '' }}{{ mood }}" + tokenizer.chat_template
    row = {"messages": turns("2+2", "4"), "tools": json.dumps([{"name": "calculator"}]),
           "chat_template_kwargs": {"mood": "calm"}}
    found, _ = read(tmp_path, tokenizer, [row], ready_sft)
    assert tokenizer.decode(found[0]["prompt_tokens"]).startswith("calculatorcalm<|im_start|>")


def test_parquet_that_pads_messages_with_nulls(tmp_path, tokenizer):
    import pyarrow as pa

    calls = [*turns("a"), {"role": "tool", "content": "3", "name": "x"}, *says("b")]
    rows = [{"messages": turns("2+2", "4")}, {"messages": calls}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    drops = Drops(stage_in(tmp_path, "select"))
    data = ReadyData(name="p", path=str(tmp_path / "d.parquet"))
    found = ready_sft(tokenizer, data, Filter(), None, drops, Quarantine(0))
    assert (found[0]["prompt_tokens"], found[0]["completion_tokens"]) == (
        encode_prompt(tokenizer, turns("2+2")), encode_completion(tokenizer, turns("2+2"), says("4")).tokens)


@pytest.mark.parametrize("row,reason", [
    ({"messages": turns("2+2", " ")}, "empty"), ({"prompt": "a", "completion": ""}, "empty"),
    ({"prompt": QUESTION, "completion": says("")}, "empty")])
def test_rows_without_an_answer_are_dropped(tmp_path, tokenizer, row, reason):
    found, drops = read(tmp_path, tokenizer, [row, {"prompt": "a", "completion": "b"}], ready_sft)
    assert len(found) == 1 and [d["reason"] for d in drops] == [reason] and ":1: " in drops[0]["detail"]


def test_duplicates_are_dropped(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] * 2 + [{"prompt": "a", "completion": "c"}]
    found, drops = read(tmp_path, tokenizer, rows, ready_sft)
    assert [r["row_id"] for r in found] == ["mine/1", "mine/3"] and [d["reason"] for d in drops] == ["duplicate"]


@pytest.mark.parametrize("row,match", [
    ({"text": "x"}, r"column 'prompt' is missing \(there are: text\); give messages, or prompt and completion"),
    ({"prompt": "x"}, "column 'completion' is missing"),
    ({"prompt": QUESTION, "completion": "4"}, "'completion' must hold a list of messages like the others"),
    ({"prompt": 1, "completion": "4"}, "'prompt' must hold a string or messages, is a number"),
    ({"messages": "x"}, "'messages' must hold a list of messages, is a string"),
    ({"messages": turns("2+2")}, "no assistant message"),
    ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content must be a string, is a number"),
    ({"messages": turns("2+2", "4"), "tools": "{"}, "'tools' is not JSON"),
    ("{", "not JSON")])
def test_malformed_rows(tmp_path, tokenizer, row, match):
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match=match) as e:
        read(tmp_path, tokenizer, [good, row], ready_sft)
    assert str(e.value).startswith(f"{tmp_path / 'data.jsonl'}:2: ")
    found, drops = read(tmp_path, tokenizer, [good, row], ready_sft, max_bad_rows=1)
    assert len(found) == 1 and [d["reason"] for d in drops] == ["malformed"]


# ---- preferences

def test_explicit_and_implicit_prompt_give_the_same_pair(tmp_path, tokenizer):
    rows = [{"prompt": QUESTION, "chosen": says("4"), "rejected": says("5")}]
    explicit, _ = read(tmp_path, tokenizer, rows, ready_pairs)
    rows = [{"chosen": QUESTION + says("4"), "rejected": QUESTION + says("5")}]
    implicit, _ = read(tmp_path, tokenizer, rows, ready_pairs)
    assert explicit == implicit and len(explicit) == 1
    row = explicit[0]
    assert row["prompt_tokens"] == encode_prompt(tokenizer, QUESTION)
    for side, text in (("chosen", "4"), ("rejected", "5")):
        encoded = encode_completion(tokenizer, QUESTION, says(text))
        assert row[f"{side}_tokens"] == encoded.tokens and row[f"{side}_mask"] == encoded.loss_mask
        assert row[f"{side}_template"] == encoded.template_mask == [False] * (len(encoded.tokens) - 1) + [True]
        assert row[f"{side}_score"] is None


def test_plain_strings(tmp_path, tokenizer):
    rows = [{"prompt": "the sky is", "chosen": " blue", "rejected": " black"}]
    explicit, _ = read(tmp_path, tokenizer, rows, ready_pairs)
    rows = [{"chosen": "the sky is blue", "rejected": "the sky is black"}]
    implicit, _ = read(tmp_path, tokenizer, rows, ready_pairs)
    assert explicit == implicit
    assert tokenizer.decode(implicit[0]["prompt_tokens"]) == "the sky is"
    assert tokenizer.decode(implicit[0]["rejected_tokens"]) == " black<|im_end|>"


def test_boundary_is_the_same_for_chosen_and_rejected_although_one_merges(tmp_path):
    tokenizer = tokenizer_of("merging")
    rows = [{"prompt": QUESTION, "chosen": says("\n\n4"), "rejected": says("5")}]
    row = read(tmp_path, tokenizer, rows, ready_pairs)[0][0]
    assert row["prompt_tokens"] == encode_prompt(tokenizer, QUESTION)
    for side, text in (("chosen", "\n\n4"), ("rejected", "5")):
        whole = tokenizer.apply_chat_template(QUESTION + says(text), tokenize=False).rstrip("\n")
        assert tokenizer.decode(row["prompt_tokens"] + row[f"{side}_tokens"]) == whole


@pytest.mark.parametrize("row,reason", [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical"),
    ({"prompt": QUESTION, "chosen": says("4"), "rejected": says("4")}, "identical"),
    ({"chosen": QUESTION + says("4"), "rejected": QUESTION + says("4")}, "identical"),
    ({"chosen": "same text", "rejected": "same text"}, "identical"),
    ({"prompt": "a", "chosen": "b", "rejected": "b<|im_end|>"}, "identical"),  # equal only as tokens
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty"),
    ({"prompt": QUESTION, "chosen": says(" "), "rejected": says("4")}, "empty"),
    ({"chosen": QUESTION, "rejected": QUESTION + says("4")}, "empty")])
def test_pairs_that_teach_nothing_are_dropped(tmp_path, tokenizer, row, reason):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    found, drops = read(tmp_path, tokenizer, [row, good], ready_pairs)
    assert [r["row_id"] for r in found] == ["mine/2"] and [d["reason"] for d in drops] == [reason]


@pytest.mark.parametrize("row,match", [
    ({"chosen": "x"}, "column 'rejected' is missing"),
    ({"chosen": turns("a", "b"), "rejected": turns("c", "d")}, "do not begin with the same messages"),
    ({"prompt": "a", "chosen": says("b"), "rejected": says("c")}, "'prompt' must hold a list of messages"),
])
def test_malformed_pairs(tmp_path, tokenizer, row, match):
    with pytest.raises(UserError, match=match):
        read(tmp_path, tokenizer, [row], ready_pairs)


# ---- labels and lists

def labels(*args):
    return ready_rated(*args[:2], "labels", *args[2:])


def lists(*args):
    return ready_rated(*args[:2], "lists", *args[2:])


def test_labeled_completions_in_trls_columns(tmp_path, tokenizer):
    rows = [{"prompt": "the sky is", "completion": " blue", "label": True},
            {"prompt": QUESTION, "completion": says("5"), "label": False},
            {"prompt": QUESTION, "completion": says("5"), "label": 0},  # the same as the one before
            {"chosen": QUESTION + says("4"), "rejected": QUESTION + says("22")},
            {"prompt": QUESTION, "completion": says("no no no no no no no no"), "label": False}]  # bad, as labeled
    found, drops = read(tmp_path, tokenizer, rows, labels, weight=0.5)
    assert [(r["row_id"], r["desirable"], r["score"]) for r in found] == [
        ("mine/1/0", True, 1), ("mine/2/0", False, 0), ("mine/4/0", True, 1), ("mine/4/1", False, 0),
        ("mine/5/0", False, 0)]
    assert [d["reason"] for d in drops] == ["duplicate"] and {r["weight"] for r in found} == {0.5}
    encoded = encode_completion(tokenizer, QUESTION, says("5"))
    assert found[1]["prompt_tokens"] == encode_prompt(tokenizer, QUESTION)
    assert (found[1]["completion_tokens"], found[1]["loss_mask"], found[1]["template"]) == (
        encoded.tokens, encoded.loss_mask, encoded.template_mask)


def test_completions_of_other_labels_are_no_near_duplicates(tmp_path, tokenizer):
    long = "the quick brown fox jumps over the lazy dog and runs away through the field"
    rows = [{"prompt": long, "completion": long + end, "label": label}
            for end, label in (("", True), ("s", True), ("es", False))]
    found, drops = read(tmp_path, tokenizer, rows, labels)
    assert [r["row_id"] for r in found] == ["mine/1/0", "mine/3/0"]
    assert [d["reason"] for d in drops] == ["near_duplicate"]


def test_lists_come_best_first_by_scores_or_ranks(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completions": ["x", "y", "z"], "scores": [0.5, 2, 0.5]},
            {"prompt": QUESTION, "completions": [says("5"), says("4")], "ranks": [2, 1]},
            {"prompt": "b", "completions": ["x", "y"], "scores": [1, 1]},
            {"prompt": "c", "completions": ["x", " "], "scores": [1, 0]}]
    found, drops = read(tmp_path, tokenizer, rows, lists)
    first = [r for r in found if r["list_id"] == "mine/1"]
    decoded = [(tokenizer.decode(r["completion_tokens"])[0], r["score"]) for r in first]
    assert decoded == [("y", 2), ("x", 0.5), ("z", 0.5)]
    second = [r for r in found if r["list_id"] == "mine/2"]
    assert [r["score"] for r in second] == [-1, -2] and all(r["desirable"] is None for r in found)
    assert second[0]["completion_tokens"] == encode_completion(tokenizer, QUESTION, says("4")).tokens
    assert [d["reason"] for d in drops] == ["tie", "empty"] and len(found) == 5


@pytest.mark.parametrize("make, row, match", [
    (labels, {"prompt": "a", "completion": "b"}, "column 'label' must hold true"),
    (labels, {"prompt": "a", "completion": "b", "label": "yes"}, "column 'label' must hold true"),
    (labels, {"prompt": "a", "label": True}, "column 'completion' is missing"),
    (labels, {"prompt": "a", "completion": "b", "label": True, "score": 3}, "column 'score' is not read"),
    (lists, {"prompt": "a", "completions": ["b", "c"]}, "give one of the columns 'scores' and 'ranks'"),
    (lists, {"prompt": "a", "completions": ["b", "c"], "scores": [1]}, "lists of the same length"),
    (lists, {"prompt": "a", "completions": "b", "scores": [1]}, "lists of the same length"),
    (lists, {"prompt": "a", "completions": ["b", "c"], "scores": [1, None]}, "must hold finite numbers"),
    (lists, {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2], "ranks": [1, 2]}, "give one of the columns"),
    (lists, {"prompt": "a", "completions": ["b", says("c")], "scores": [1, 2]}, "must hold"),
    (lists, {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2], "margin": 1}, "column 'margin' is not read")])
def test_malformed_ratings(tmp_path, tokenizer, make, row, match):
    with pytest.raises(UserError, match=match):
        read(tmp_path, tokenizer, [row], make)


KINDS = {"pairs": {"prompt": "a", "chosen": "b", "rejected": "c"}, "labels": {
    "prompt": "a", "completion": "b", "label": True}, "lists": {"prompt": "a", "completions": ["b"], "scores": [1]}}


@pytest.mark.parametrize("rows, who, kind, words", [
    ("pairs", "dpo.loss=sigmoid", "labels", "has the columns completion, label, prompt, but dpo.loss=sigmoid learns "
     "from prompt, chosen and rejected; give such data, or set dpo.loss=kto or bco"),
    ("pairs", "method reward", "lists", "but method reward learns from prompt, chosen and rejected; give such data$"),
    ("labels", "dpo.loss=bco", "lists", "but dpo.loss=bco learns from prompt, completion and label, or pairs; give "
     "such data, or set dpo.loss=listwise"),
    ("lists", "dpo.loss=listwise", "labels", "set dpo.loss=kto or bco"),
    ("pairs", "dpo.loss=rpo", "pairs", "has no column margin"),
    ("labels", "dpo.loss=kto", "pairs", ""), ("lists", "dpo.loss=listwise", "pairs", ""),
    ("labels", "dpo.loss=kto", "labels", ""), ("lists", "dpo.loss=listwise", "lists", ""),
    ("pairs", "dpo.loss=ipo", "pairs", "")])
def test_a_kind_of_data_that_the_loss_cannot_use_is_one_line(tmp_path, rows, who, kind, words):
    path = tmp_path / "data.jsonl"
    path.write_text("not a row\n" + json.dumps(KINDS[kind]) + "\n")
    data = ReadyData(name="mine", path=str(path))
    if words:
        with pytest.raises(UserError, match=words) as e:
            check_ready(data, rows, who)
        assert str(path) in str(e.value) and "data.preferences mine" in str(e.value)
    else:
        check_ready(data, rows, who)
