"""What rows of users hold, however they are stored: every field is read or refused."""

import importlib.util
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.trainer.config import Filter, ReadyData, Recipe
from strop.trainer.data.columns import MEANT, to_messages
from strop.trainer.data.ready import ready_pairs, ready_sft
from strop.trainer.data.rows import Quarantine, read_rows
from strop.trainer.errors import UserError
from strop.trainer.run.tables import Drops, read_table

sys.path.insert(0, str(Path(__file__).parent))
import stagecalls
from chats import TOOLS, tokenizer_of, turns
from training import stage_in

CALLS = [
    {"messages": [*turns("weather in Oslo?"),
                  {"role": "assistant", "content": "", "tool_calls": [
                      {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}]},
                  {"role": "tool", "content": "3 C"}, {"role": "assistant", "content": "It is 3 C."}],
     "tools": [{"type": "function", "function": {"name": "weather", "parameters": {
         "type": "object", "properties": {"city": {"type": "string"}}}}}]},
    {"messages": [*turns("what is 2*3?"),
                  {"role": "assistant", "content": "", "tool_calls": [
                      {"type": "function", "function": {"name": "calc", "arguments": {"days": 2.5, "expr": "2*3"}}}]},
                  {"role": "tool", "content": "6"}, {"role": "assistant", "content": "It is 6."}],
     "tools": [{"type": "function", "function": {"name": "calc", "parameters": {
         "type": "object", "properties": {"expr": {"type": "string"}}}}}]}]
PAIR = {"prompt": turns("2+2?"), "chosen": turns("", "4")[1:], "rejected": turns("", "5")[1:]}


def write(path: Path, rows) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def ready(tmp_path, path, tokenizer=None, make=ready_sft, **keys):
    drops = Drops(stage_in(tmp_path, "select"))
    data = ReadyData(name="mine", path=str(path), near_duplicates=False, **keys)
    return make(tokenizer or tokenizer_of("chatml"), data, Filter(), None, drops, Quarantine(0))


def refused(tmp_path, row, match, make=ready_sft, tokenizer=None):
    with pytest.raises(UserError, match=match) as e:
        ready(tmp_path, write(tmp_path / "d.jsonl", [row]), tokenizer, make)
    assert str(e.value).startswith(f"{tmp_path / 'd.jsonl'}:1: ") and "\n" not in str(e.value)


def told(tokenizer, row) -> str:
    return tokenizer.decode(row["prompt_tokens"] + row["completion_tokens"])


# ---- forms of storage

def spelled(rows):
    """Rows whose objects are stored as JSON text, in the places where people do it."""
    for row in rows:
        calls = [m | {"tool_calls": [c | {"function": c["function"] | {
            "arguments": json.dumps(c["function"]["arguments"])}} for c in m["tool_calls"]]} if "tool_calls" in m else m
            for m in row["messages"]]
        yield {"messages": calls, "tools": json.dumps(row["tools"])}
        yield {"messages": [m | {"tool_calls": json.dumps(m["tool_calls"])} if "tool_calls" in m else m
                            for m in row["messages"]], "tools": row["tools"]}
        yield {"messages": json.dumps(row["messages"]), "tools": row["tools"]}
        yield {"messages": [json.dumps(m) for m in row["messages"]], "tools": row["tools"]}


def test_tool_calls_are_the_same_in_every_form_of_storage(tmp_path):
    tokenizer = tokenizer_of("tools")
    rows = ready(tmp_path, write(tmp_path / "a.jsonl", CALLS), tokenizer)
    texts = [told(tokenizer, row) for row in rows]
    assert '{"city": "Oslo", "days": 2}' in texts[0] and '{"days": 2.5, "expr": "2*3"}' in texts[1]
    assert '{"city": {"type": "string"}}' in texts[0] and "null" not in "".join(texts)
    pq.write_table(pa.Table.from_pylist(CALLS), tmp_path / "a.parquet")  # pads with nulls, and 2 is 2.0
    tokens = [(r["prompt_tokens"], r["completion_tokens"], r["loss_mask"]) for r in rows]
    stored = ready(tmp_path, tmp_path / "a.parquet", tokenizer)
    assert [(r["prompt_tokens"], r["completion_tokens"], r["loss_mask"]) for r in stored] == tokens
    for i, row in enumerate(spelled(CALLS)):
        found = ready(tmp_path, write(tmp_path / f"{i}.jsonl", [row]), tokenizer)
        assert [told(tokenizer, r) for r in found] == [texts[i // 4]]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_a_saved_dataset_of_json_gives_the_rows_of_its_file(tmp_path):
    from datasets import load_dataset

    rows = [{"messages": row["messages"]} for row in CALLS]
    data = load_dataset("json", data_files=str(write(tmp_path / "a.jsonl", rows)), split="train",
                        cache_dir=str(tmp_path / "cache"))
    data.save_to_disk(tmp_path / "saved")
    assert [row.data for row in read_rows(tmp_path / "saved")] == rows


VALUES = st.fixed_dictionaries({"n": st.integers(-9, 9)}, optional={
    "text": st.text(max_size=5), "x": st.floats(-9, 9).filter(lambda x: not x.is_integer()),
    "yes": st.booleans(), "list": st.lists(st.text(max_size=3), max_size=2),
    "inner": st.fixed_dictionaries({"k": st.integers(0, 9)}, optional={"more": st.text(max_size=3)})})


@given(st.lists(st.fixed_dictionaries({"id": st.integers(0, 9), "data": VALUES,
                                       "many": st.lists(VALUES, max_size=2)}), min_size=1, max_size=4))
def test_objects_of_different_keys_come_back_from_parquet(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    assert [row.data for row in read_rows(folder / "a.parquet")] == rows


@pytest.mark.parametrize("before", [b"\n", b"\xef\xbb\xbf\n", b"\xef\xbb\xbf", b" \r\n\n", b""])
def test_an_array_is_named_also_behind_blank_lines(tmp_path, before):
    (tmp_path / "a.json").write_bytes(before + b'[{"prompt": "q", "answer": "1"}]')
    with pytest.raises(UserError, match=r"a\.json:\d: begins with '\[', so it is one JSON array"):
        list(read_rows(tmp_path / "a.json"))


@pytest.mark.parametrize("line", ['{"prompt": "a", "prompt": "b"}', '{"prompt": "a", "meta": {"x": 1, "x": 1}}'])
def test_a_key_that_is_there_twice_is_refused(tmp_path, line):
    row, = read_rows(write(tmp_path / "a.jsonl", [line]))
    assert row.data is None and "twice" in row.error


# ---- columns and fields of ready data

@pytest.mark.parametrize("column,value", [("weight", 0), ("label", True), ("score", 0.5), ("images", ["cat.png"]),
                                          ("loss_mask", [1]), ("chosen", "x"), ("id", 1), ("train", False)])
def test_columns_that_nobody_reads_are_refused_or_ignored_on_purpose(tmp_path, column, value):
    for row, make in (({"messages": turns("2+2?", "4")}, ready_sft), ({"prompt": "a", "completion": "b"}, ready_sft),
                      (PAIR, ready_pairs), ({"prompt": "a", "chosen": "b", "rejected": "c"}, ready_pairs)):
        if column in row:
            continue
        refused(tmp_path, row | {column: value}, f"column '{column}' is not read .*ignore_columns of mine", make)
        path = write(tmp_path / "d.jsonl", [row | {column: value}])
        assert len(ready(tmp_path, path, make=make, ignore_columns=[column])) == 1
        assert len(ready(tmp_path, write(tmp_path / "e.jsonl", [row | {column: None}]), make=make)) == 1
    with pytest.raises(UserError, match="no row has the column 'id' that ignore_columns"):
        ready(tmp_path, write(tmp_path / "d.jsonl", [PAIR]), make=ready_pairs, ignore_columns=["id"])


def test_columns_beside_others_that_are_read_instead_are_refused(tmp_path):
    refused(tmp_path, {"messages": turns("2+2?", "4"), "prompt": "2+2?"}, "'prompt' is not read")
    refused(tmp_path, {"prompt": "a", "completion": "b", "tools": [{"name": "x"}]}, "'tools' is not read")


@pytest.mark.parametrize("field,value", [("weight", 0), ("train", False), ("loss", True), ("name", "Ann"),
                                         ("reasoning_content", "two and two"), ("images", ["a.png"])])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_fields_of_messages_that_the_template_leaves_out_are_refused(tmp_path, field, value, at):
    messages = turns("2+2?", "4", "3+3?", "6")
    messages[at][field] = value
    wanted = f"leaves out {field} of message {at} "
    refused(tmp_path, {"messages": messages}, wanted)
    pair = {"prompt": messages[:3], "chosen": messages[3:], "rejected": turns("", "5")[1:]}
    refused(tmp_path, pair, wanted, ready_pairs)
    messages[at][field] = None  # as tables store an absent field
    assert len(ready(tmp_path, write(tmp_path / "e.jsonl", [{"messages": messages}]))) == 1


@pytest.mark.parametrize("family", ["chatml", "llama3", "plain"])
def test_a_template_without_tools_refuses_them(tmp_path, family):
    tokenizer = tokenizer_of(family)
    refused(tmp_path, {"messages": CALLS[0]["messages"]}, "leaves out tool_calls of message 1", tokenizer=tokenizer)
    refused(tmp_path, {"messages": turns("a", "b"), "tools": TOOLS}, "leaves out the tools", tokenizer=tokenizer)


def test_every_tool_call_and_its_arguments_must_be_rendered(tmp_path):
    tokenizer = tokenizer_of("tools")
    messages = [*turns("a"), {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"name": "g", "arguments": {"y": 2}}}]}]
    text = told(tokenizer, ready(tmp_path, write(tmp_path / "e.jsonl", [{"messages": messages}]), tokenizer)[0])
    assert '"x": 1' in text and '"y": 2' in text
    tokenizer.chat_template = tokenizer.chat_template.replace("m['tool_calls'] or []", "(m['tool_calls'] or [])[:1]")
    refused(tmp_path, {"messages": messages}, r"leaves out tool_calls\[1\] of message 1", tokenizer=tokenizer)
    tokenizer = tokenizer_of("tools")
    tokenizer.chat_template = tokenizer.chat_template.replace("call['arguments'] | tojson", "'{}'")
    refused(tmp_path, {"messages": messages}, r"leaves out tool_calls\[0\]\.function\.arguments", tokenizer=tokenizer)


def test_arguments_are_text_for_a_template_that_adds_them_to_text(tmp_path):
    tokenizer = tokenizer_of("tools")
    plain = tokenizer_of("tools")
    plain.chat_template = plain.chat_template.replace("call['arguments'] | tojson", "'' + call['arguments']")
    path = write(tmp_path / "e.jsonl", CALLS)
    assert ready(tmp_path, path, plain) == ready(tmp_path, path, tokenizer)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_template_that_leaves_out_a_roles_content_is_refused(tmp_path, role):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", f"(m['content'] if m['role'] != '{role}'"
                                                              " else '')")
    chat = [{"role": "system", "content": "a"}, *turns("a"), {"role": "tool", "content": "a"}, *turns("", "a")[1:]]
    i = [m["role"] for m in chat].index(role)
    refused(tmp_path, {"messages": chat}, f"leaves out content of message {i} .{role}", tokenizer=tokenizer)
    chat[i]["content"] = ""
    if role != "assistant":
        assert ready(tmp_path, write(tmp_path / "e.jsonl", [{"messages": chat}]), tokenizer)


@pytest.mark.parametrize("kwargs,match", [
    ({"tokenize": True}, "chat_template_kwargs.tokenize"), ({"chat_template": "x"}, "chat_template_kwargs.chat_templ"),
    ({"enable_thinking": False}, "reads no variable of this name"), ({"role": "x"}, "reads no variable of this name")])
def test_template_keywords_that_the_template_does_not_read_are_refused(tmp_path, kwargs, match):
    refused(tmp_path, {"messages": turns("2+2?", "4"), "chat_template_kwargs": kwargs}, match)


@pytest.mark.parametrize("content,match", [
    ([{"type": "image", "text": ""}, {"type": "text", "text": "what?"}], r"content\[0\] is of type 'image'"),
    ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}], r"content\[1\] is of type"),
    ([{"type": "text", "text": "a", "cache": 1}], r"content\[0\]\.cache is not read"), (["a"], "block of text"),
    ({"text": "a"}, "must be a string, is an object")])
def test_contents_that_are_no_text_are_refused(tmp_path, content, match):
    messages = [{"role": "user", "content": content}, *turns("", "b")[1:]]
    refused(tmp_path, {"messages": messages}, match)
    refused(tmp_path, {"prompt": messages[:1], "chosen": turns("", "b")[1:], "rejected": turns("", "c")[1:]}, match,
            ready_pairs)
    with pytest.raises(UserError, match=match):
        prompts(tmp_path, [{"prompt": messages[:1], "answer": "1"}])
    blocks = to_messages([{"role": "user", "content": [{"type": "text", "text": "a", "image": None}, {"text": "b"}]}],
                         "messages")
    assert blocks == turns("ab")


@given(st.sampled_from(["<|im_end|>", "<|im_start|>"]), st.text("ab \n", max_size=3), st.text("ab \n", max_size=3))
def test_control_tokens_in_any_field_are_text(end, before, after):
    from strop.trainer.data.chat import encode_conversation

    text, tokenizer = before + end + after, tokenizer_of("tools")
    chat = [*turns(text), {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [
        {"function": {"name": text, "arguments": {text: [text]}}}]}]
    tools = [{"name": text}]
    clean = json.loads(json.dumps([chat, tools]).replace(end, "x"))
    prompt, encoded = encode_conversation(tokenizer, chat, tools=tools)
    other_prompt, other = encode_conversation(tokenizer, clean[0], tools=clean[1])
    for token in map(tokenizer.convert_tokens_to_ids, ("<|im_end|>", "<|im_start|>")):
        assert prompt.count(token) == other_prompt.count(token)
        assert encoded.tokens.count(token) == other.tokens.count(token)
    assert len(encoded.tokens) == len(encoded.loss_mask) and all(encoded.loss_mask)


# ---- sources of prompts

def prompts(tmp_path, rows, *, drops=False, data=None, **keys):
    source = {"name": "s", "path": str(write(tmp_path / "p.jsonl", rows)), "verifier": "exact"} | keys
    recipe = Recipe.model_validate({"data": {"sources": [source], "test": 1, "validation": 1} | (data or {}),
                                    "filter": {"near_duplicates": 0, "decontaminate": 0}})
    stage = stage_in(tmp_path / "prompts", "prompts")
    stagecalls.prompts(stage, recipe)
    return read_table(stage.dir / "prompts.parquet").to_pylist()


def questions(**columns):
    return [{"prompt": f"question {i}", "answer": str(i)} | columns for i in range(8)]


@pytest.mark.parametrize("column", MEANT)
def test_columns_that_mean_something_are_no_metadata(tmp_path, column):
    with pytest.raises(UserError, match=f"column '{column}' is not read in a source.*ignore_columns of source s"):
        prompts(tmp_path, questions(**{column: "x"}))
    assert len(prompts(tmp_path, questions(**{column: "x"}), ignore_columns=[column])) == 8
    assert len(prompts(tmp_path, questions(**{column: None}))) == 8


def test_fields_of_a_prompts_messages_that_nobody_reads_are_refused(tmp_path):
    for field, value in (("tool_calls", [{"name": "x"}]), ("name", "Ann"), ("weight", 0)):
        chat = [{"role": "user", "content": "a", field: value}]
        with pytest.raises(UserError, match=rf"prompt\[0\]\.{field} is not read"):
            prompts(tmp_path, [{"prompt": chat, "answer": "1"}])


@pytest.mark.parametrize("key", ["answer_column", "ignore_columns"])
def test_keys_that_name_no_column_are_refused(tmp_path, key):
    value = "truth" if key == "answer_column" else ["truth"]
    with pytest.raises(UserError, match=f"no row has the column 'truth' that {key} of source s"):
        prompts(tmp_path, questions(), verifier="regex", verifier_args={"pattern": "x"}, **{key: value})


def test_template_keywords_of_prompts_reach_the_template(tmp_path):
    from strop.trainer.data.chat import prompt_tokens

    tokenizer = tokenizer_of("tools")
    rows = [{"prompt": f"{i}+{i}?", "answer": str(2 * i), "chat_template_kwargs": {"enable_thinking": False},
             "tools": TOOLS} for i in range(8)]
    found = prompts(tmp_path, [*rows, rows[0] | {"chat_template_kwargs": None}])
    assert len(found) == 9 and len({row["prompt_id"] for row in found}) == 9
    text = tokenizer.decode(prompt_tokens(tokenizer, found[0]))
    assert text.endswith("<think>\n\n</think>\n\n") and '"weather"' in text
    assert not tokenizer.decode(prompt_tokens(tokenizer, found[8])).endswith("</think>\n\n")
    with pytest.raises(UserError, match="enable_thinking: the chat template reads no variable"):
        prompt_tokens(tokenizer_of("chatml"), found[0])


CHOICES = [{"prompt": "Which of these statements is true?", "answer": "AB"[i % 2],
            "choices": [f"{i} is even", f"{i} is odd", "neither", "both"]} for i in range(8)]


def test_options_are_shown_or_refused(tmp_path):
    keys = {"verifier": "choice", "prompt_template": "{prompt}\n{choices}\nOne letter."}
    found = prompts(tmp_path, CHOICES, **keys)
    assert [row["messages"][0]["content"] for row in found] == [
        f"Which of these statements is true?\nA. {i} is even\nB. {i} is odd\nC. neither\nD. both\nOne letter."
        for i in range(8)]
    for verifier in ("choice", "exact"):
        with pytest.raises(UserError, match=r"option '0 is even' .* not in the prompt; add \{choices\}"):
            prompts(tmp_path, CHOICES, verifier=verifier)
    listed = [row | {"prompt": "Which? " + ", ".join(row["choices"])} for row in CHOICES]
    assert len(prompts(tmp_path, listed, verifier="choice")) == 8
    args = {"verifier": "choice", "verifier_args": {"choices": ["yes", "no"]}}
    with pytest.raises(UserError, match=r"'yes' .* is not in the prompt"):
        prompts(tmp_path, [{"prompt": f"Is it {i}?", "answer": "no"} for i in range(8)], **args)
    found = prompts(tmp_path, [{"prompt": f"Is it {i}?", "answer": "no"} for i in range(8)], **args,
                    prompt_template="{prompt} {choices}")
    assert found[0]["messages"][0]["content"].endswith("A. yes\nB. no")


def test_placeholders_of_a_prompt_template_are_filled_or_refused(tmp_path):
    found = prompts(tmp_path, questions(topic="sums", level=2), prompt_template=r"{topic}, {level}: {prompt} \boxed{x}")
    assert found[0]["messages"][0]["content"] == r"sums, 2: question 0 \boxed{x}"
    for template, match in (("{prompt} {subject}", "names no column of the row"), ("{prompt} {answer}", "true answer"),
                            ("{prompt} {topic}", "holds a list")):
        with pytest.raises(UserError, match=match):
            prompts(tmp_path, questions(topic=["a"]), prompt_template=template)
    literal = prompts(tmp_path, questions(), prompt_template=r"{prompt} in \boxed{answer} or {2, 3}")
    assert literal[0]["messages"][0]["content"] == r"question 0 in \boxed{answer} or {2, 3}"


def test_whole_numbers_are_answers_without_a_point(tmp_path):
    pq.write_table(pa.table({"prompt": [f"q{i}" for i in range(8)], "answer": [4.0, None, 2.5, *[1.0] * 5]}),
                   tmp_path / "p.parquet")
    found = prompts(tmp_path, [], path=str(tmp_path / "p.parquet"), verifier="regex", verifier_args={"pattern": "x"})
    assert [row["answer"] for row in found][:4] == ["4", None, "2.5", "1"]
