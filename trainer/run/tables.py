"""Parquet tables of a run, and the record of rows that a stage drops."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from strop.trainer.errors import UserError
from strop.trainer.run.files import reason_of, write_atomic

if TYPE_CHECKING:  # readers of run directories need no torch
    from strop.trainer.run.store import Stage


DROPS = pa.schema([(c, pa.string()) for c in ("stage", "prompt_id")] + [("sample_index", pa.int32())]
                  + [(c, pa.string()) for c in ("source", "reason", "detail")])
BATCH = 256  # rows


def write_table(path: Path, table: pa.Table) -> None:
    """Writes Parquet atomically, with page checksums; equal tables give equal bytes."""
    write_atomic(path, lambda p: pq.write_table(table, p, compression="zstd", write_page_checksum=True))


@contextmanager
def reading(path: Path) -> Iterator[pq.ParquetFile]:
    """An open Parquet file; errors while it is read are UserErrors."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path}: not readable as Parquet ({reason_of(e)}); delete its folder to re-run the "
                         "stage") from e


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, or only some columns of it: the others are not read. Raises UserError if the file is missing, not
    Parquet or damaged, or lacks a column."""
    with reading(path) as file:
        if missing := set(columns or ()) - set(file.schema_arrow.names):
            raise UserError(f"{path}: has no column {min(missing)}; delete its folder to re-run the stage")
        return file.read(columns)


def find_rows(path: Path, columns: Sequence[str], ids: Collection[str]) -> list[dict]:
    """The rows of a table whose prompt_id is in `ids`, as prompt_id and `columns`. Reads `columns` only if there are
    such rows, and by batch, so that no more than a batch is in memory. Raises UserError as `read_table` does."""
    wanted, found = pa.array(ids, pa.string()), []
    if not compute.any(compute.is_in(read_table(path, ["prompt_id"])["prompt_id"], wanted)).as_py():
        return []
    with reading(path) as file:
        for batch in file.iter_batches(BATCH, columns=["prompt_id", *columns]):
            found += batch.filter(compute.is_in(batch["prompt_id"], wanted)).to_pylist()
    return found


def read_part(path: Path, schema: pa.Schema) -> pa.Table | None:
    """A table that an earlier process may have written; None if it is missing, damaged or has another schema."""
    with suppress(UserError):
        table = read_table(path)
        return table if table.schema == schema else None
    return None


class Drops:
    """Rows that a stage drops, each with a reason; written to drops.parquet and counted."""

    def __init__(self, stage: Stage):
        self.stage, self.rows = stage, []

    def add(self, reason: str, *, prompt_id=None, sample_index=None, source=None, detail="") -> None:
        self.rows.append({"stage": self.stage.name, "prompt_id": prompt_id, "sample_index": sample_index,
                          "source": source, "reason": reason, "detail": str(detail)})

    def write(self) -> None:
        write_table(self.stage.dir / "drops.parquet", pa.Table.from_pylist(self.rows, schema=DROPS))
        for row in self.rows:
            name = f"dropped/{row['reason']}"
            self.stage.counts[name] = self.stage.counts.get(name, 0) + 1
