"""Reads a user's rows: JSONL, Parquet, or a folder saved by `datasets`; malformed rows go to quarantine.

Rows come out as JSON would have them, whatever stores them: see `_from_arrow`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from strop.trainer.errors import UserError
from strop.trainer.run.bounds import bounded
from strop.trainer.run.files import check_file_type, reason_of, write_atomic

LONGEST = 4 << 20  # bytes of a row: about a million tokens
TOO_LONG = f"has more than {LONGEST:,} bytes, more than any context holds"


@dataclass(frozen=True)
class Row:
    """A row or, if `data` is None, its `error`. where: file:line (rows of Parquet and saved datasets count from 1), or
    a dataset's name on the hub and the row."""

    where: str
    data: dict[str, Any] | None
    error: str = ""
    text: str = ""  # content of a malformed line, for the quarantine


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yields every row of `path`, malformed ones with their error. Raises UserError if `path` is missing, damaged,
    empty, or of an unknown format."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    check_file_type(path)
    if path.is_dir():
        rows = _tables(f"{path}:", _saved_dataset(path))
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        rows = _jsonl(path)
    elif path.suffix == ".parquet":
        rows = _tables(_origin(path), _parquet(path))
    else:
        raise UserError(f"{path}: unknown format; give a .jsonl or .parquet file, or a folder saved by `datasets`")
    row = None
    for row in rows:
        yield row
    if row is None:
        raise UserError(f"{path}: holds no rows; add rows, or remove it from the recipe")


def _jsonl(path: Path) -> Iterator[Row]:
    first = True
    with open(path, "rb") as f:
        for n, (line, is_whole) in enumerate(_lines(f), 1):
            where = f"{path}:{n}"
            if not is_whole:
                yield Row(where, None, TOO_LONG, repr(line[:500]))
                continue
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as e:
                yield Row(where, None, f"not UTF-8 at byte {e.start} of the line", repr(line[:500]))
                continue
            if not text:
                continue
            if first and text.startswith("["):
                raise UserError(f"{where}: begins with '[', so it is one JSON array; write one object per line (JSONL)")
            first = False
            try:
                data = json.loads(text, object_pairs_hook=_object)
            except (json.JSONDecodeError, RecursionError, ValueError) as e:
                yield Row(where, None, f"not JSON ({e})", text[:500])
                continue
            if "\\ud" in text.lower() and not _is_text(data):
                yield Row(where, None, "holds a lone surrogate (\\ud800 to \\udfff), which is not text", text[:500])
            elif isinstance(data, dict):
                yield Row(where, data)
            else:
                yield Row(where, None, f"must be a JSON object, is {kind(data)}", text[:500])


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """(line, whether it is whole); of a line longer than LONGEST only the beginning. Lines end at \\n only, since JSON
    strings may hold other Unicode line ends."""
    while line := file.readline(LONGEST):
        is_whole, end = len(line) < LONGEST or line.endswith(b"\n"), line
        while not end.endswith(b"\n") and (end := file.readline(LONGEST)):
            is_whole = False
        yield line, is_whole


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


def _is_text(data) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _origin(path: Path) -> str:
    """What stands before a row's number: the name that a downloaded file has on the hub, else its path."""
    try:
        return pq.read_schema(path).metadata[b"strop.origin"].decode() + ", row "
    except (pa.ArrowException, OSError, KeyError, TypeError):
        return f"{path}:"


def _tables(origin: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    n = 0
    try:
        while (batch := _next(origin, batches)) is not None:
            # a row of a large batch becomes Python objects only if it is not too long
            parts = [batch] if batch.nbytes <= LONGEST else (batch.slice(i, 1) for i in range(batch.num_rows))
            for part in parts:
                for data in part.to_pylist() if part.nbytes <= LONGEST else [None]:
                    n += 1
                    yield _table_row(f"{origin}{n}", data, part.schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{origin.removesuffix(':')}: not readable after row {n} ({reason_of(e)}); write the file "
                        "again") from e


def _next(origin: str, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    """The next batch, or None. A small file can expand to any size: raises UserError where a batch needs too much."""
    with bounded(f"{origin.removesuffix(':')}: reading its rows"):
        try:
            batch = next(batches, None)
            for i, column in enumerate(batch.columns if batch else ()):
                if pa.types.is_dictionary(column.type):  # its values, each as often as it occurs
                    batch = batch.set_column(i, batch.schema.names[i], column.dictionary_decode())
            return batch
        except pa.ArrowMemoryError as e:
            raise MemoryError from e


def _table_row(where: str, data: dict | None, schema: pa.Schema) -> Row:
    if data is None:
        return Row(where, None, TOO_LONG)
    try:
        return Row(where, {field.name: _from_arrow(data[field.name], field.type) for field in schema})
    except (ValueError, RecursionError) as e:
        return Row(where, None, f"a column of type JSON holds other text ({e})", str(data)[:500])


def _from_arrow(value: Any, type: pa.DataType) -> Any:
    """An Arrow value as JSON has it: JSON text decoded, maps as objects, integers that became floats as integers
    again, and objects without the nulls that stand for keys of other rows."""
    if value is None:
        return None
    if isinstance(type, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(type):
        found = {field.name: _from_arrow(value[field.name], field.type) for field in type}
        return {key: v for key, v in found.items() if v is not None}
    if pa.types.is_map(type):
        return {key: _from_arrow(v, type.item_type) for key, v in value}
    if isinstance(value, list):
        return [_from_arrow(v, type.value_type) for v in value]
    return whole(value) if isinstance(value, float) else value


def whole(value: float) -> float | int:
    """An integer that was stored as a float, as an integer; other floats as they are."""
    return int(value) if value.is_integer() and abs(value) < 1 << 53 else value


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    # checksums where the file has them; a buffer, since a column of a row group may be larger than the memory
    with pq.ParquetFile(path, page_checksum_verification=True, buffer_size=1 << 20, pre_buffer=False) as file:
        yield from file.iter_batches(64)


def counted(path: str | Path) -> Callable[[str], bool]:
    """Which files of what holds rows are part of its content, by their paths relative to it."""
    path = Path(path).expanduser()
    return {"state.json", *files_of(path)}.__contains__ if path.is_dir() else lambda name: True


def files_of(path: Path) -> list[str]:
    """Names of the files that hold the rows of a folder saved by `datasets`, which may put caches beside them."""
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path}: holds several splits ({splits}); name one of its folders")
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not a folder saved by `datasets` (no readable state.json); create one with "
                         "Dataset.save_to_disk") from e


def _saved_dataset(path: Path) -> Iterator[pa.RecordBatch]:
    for name in files_of(path):
        with pa.memory_map(str(path / name)) as source, pa.ipc.open_stream(source) as stream:
            yield from stream


class Quarantine:
    """Malformed rows of a stage's files. Each file may have up to `max_bad_rows`."""

    def __init__(self, max_bad_rows: int):
        self.max_bad_rows, self.rows = max_bad_rows, []
        self._count: Counter = Counter()  # by file

    def add(self, path: str, where: str, error: str, text: str = "") -> None:
        """Raises UserError once a file has more than `max_bad_rows` bad rows."""
        self.rows.append({"where": where, "error": error, "row": text})
        self._count[path] += 1
        if self._count[path] > self.max_bad_rows:
            more = f"; {self._count[path] - 1} bad rows before it" if self._count[path] > 1 else ""
            raise UserError(f"{where}: {error}{more} (data.max_bad_rows={self.max_bad_rows}; fix the row, or raise "
                             "data.max_bad_rows to set such rows aside)")

    def write(self, stage) -> None:
        """Writes quarantine.jsonl and warns if it has rows."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        write_atomic(stage.dir / "quarantine.jsonl", lambda p: p.write_text(text, encoding="utf-8"))
        if self.rows:
            stage.console.warn(f"{len(self.rows)} malformed rows set aside in {stage.name}/quarantine.jsonl; the first "
                               f"is {self.rows[0]['where']}: {self.rows[0]['error']}")


def kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
