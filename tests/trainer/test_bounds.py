"""Files that never end, or that grow beyond all bounds when they are read or rendered, are one line."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHATML, character_tokenizer

from strop.trainer.config import Model, read_text
from strop.trainer.data import chat, rendering
from strop.trainer.data.rows import LONGEST, read_rows
from strop.trainer.errors import UserError
from strop.trainer.models.checks import check_model
from strop.trainer.reports.reading import read_run
from strop.trainer.run.artifacts import external
from strop.trainer.run.console import Console
from strop.trainer.run.store import Store
from strop.trainer.run.world import World

HELLO = [{"role": "user", "content": "hello"}]
TEMPLATES = {  # name: (template, what is said)
    "endless": ("{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}"
                "{% endfor %}{% endfor %}x", "takes more than 0.3 s of CPU time"),
    "endless arithmetic": ("{{ 10 ** (10 ** 9) }}", "takes more than 0.3 s of CPU time"),
    "calls itself": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "doubles": ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
                "{{ ns.x }}", "needs more than 0.75 GiB of memory"),
    "doubles by joining": ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
                           "{% endfor %}{{ ns.x }}", "needs more than 0.75 GiB of memory"),
    "wide": ("{{ '%99999999999d' % 1 }}", "needs more than 0.75 GiB of memory"),
    "centered": ("{{ 'x' | center(10 ** 11) }}", "needs more than 0.75 GiB of memory"),
    "says nothing": ("{% if false %}x{% endif %}", "renders nothing"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_has_bounds(name, monkeypatch):
    monkeypatch.setattr(rendering, "RENDERING", 0.3 if "endless" in name else 3.0)
    tokenizer = character_tokenizer()
    tokenizer.chat_template, said = TEMPLATES[name]
    with pytest.raises(UserError, match=said) as error:
        chat.encode_prompt(tokenizer, HELLO)
    assert "template" in str(error.value) and "\n" not in str(error.value)
    tokenizer.chat_template = CHATML  # the bounds are gone
    assert chat.encode_prompt(tokenizer, HELLO)


IN_A_NEW_PROCESS = """
from strop.trainer.errors import UserError
from strop.trainer.run.bounds import bounded
try:
    with bounded("the block", gibibytes=0.25):
        bytearray(1 << 29)
except UserError as e:
    print(e)
assert len(bytearray(1 << 29)) == 1 << 29
with bounded("the block", seconds=60):
    pass
"""


def test_bounds_hold_inside_a_block_only():
    """In a process whose heap has no holes: what was freed before can be had again within any bound."""
    done = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "the block needs more than 0.25 GiB" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_only_files_are_read(kind, tmp_path, tiny_model):
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"rows\.jsonl: is a pipe, a socket or a device"):
        next(read_rows(path))
    with pytest.raises(UserError, match=r"rows\.jsonl: is a pipe, a socket or a device"):
        external(path)
    with pytest.raises(UserError, match=r"model\.chat_template=.*rows\.jsonl: is not a file"):
        read_text("model.chat_template", path)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    path.rename(folder / "added_tokens.json")
    with pytest.raises(UserError, match=r"added_tokens\.json: is a pipe, a socket or a device"):
        check_model(folder, Model(path=str(folder)), read_all=True)


def test_a_row_has_a_largest_size(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a"}, {"prompt": "b" * LONGEST}, {"prompt": "c" * (LONGEST - 100)}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "x" * 3 * LONGEST)
    found = list(read_rows(path))
    assert [row.where.split(":")[1] for row in found] == ["1", "2", "3", "4"]
    assert [row.data for row in found] == [rows[0], None, rows[2], None]
    assert all("has more than 4,194,304 bytes" in row.error and len(row.text) < 2000 for row in found[1::2])


def repeated(path, size: int, rows: int) -> None:
    """A Parquet file of a few kilobytes whose every prompt has `size` bytes."""
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["word " * (size // 5)]))
    pq.write_table(pa.table({"prompt": prompts, "answer": ["1"] * rows}), path, compression="zstd")


def test_a_small_file_with_large_rows(tmp_path):
    repeated(tmp_path / "x.parquet", 2 * LONGEST, 20)
    found = list(read_rows(tmp_path / "x.parquet"))
    assert len(found) == 20 and all(row.data is None and "has more than" in row.error for row in found)
    repeated(tmp_path / "y.parquet", 100_000, 200)
    assert sum(row.data is not None for row in read_rows(tmp_path / "y.parquet")) == 200


def test_a_small_file_with_huge_rows(tmp_path):
    repeated(tmp_path / "x.parquet", 50_000_000, 64)  # 3 GB, if read at once
    with pytest.raises(UserError, match=r"x\.parquet: reading its rows needs more than 0.75 GiB"):
        list(read_rows(tmp_path / "x.parquet"))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "plan.json", "promotions.json", "a/manifest.json"])
def test_a_run_directory_holds_files_only(name, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{path}: is a pipe"):
        Store(tmp_path / "run", World(), Console(enabled=False)).lock()
    try:
        assert [f"{path}: is a pipe" in problem for problem in read_run(tmp_path / "run").problems] == [True]
    except UserError as e:
        assert f"{path}: is a pipe" in str(e)
