"""Values and verdicts by content, in append-only files: what one stage computes another one finds."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from strop.trainer.run.files import hash_json, writing
from strop.trainer.scoring.base import Item

VALUES, VERDICTS = "values", "verdicts"  # kinds of records


class Lines:
    """Records by their `key`, a line of JSON each, in files KIND-WHO.jsonl of a folder, one for each who writes: ranks,
    threads, earlier processes. Half a line, of a process that was killed, does not count. Without a folder nothing is
    written."""

    def __init__(self, folder: Path | None, kind: str, who: str):
        self.folder, self.kind = folder, kind
        self.file = folder and folder / f"{kind}-{who}.jsonl"
        self.found: dict[str, dict] = {}
        self._read: dict[Path, int] = {}  # bytes read of each file
        self.catch_up()

    def catch_up(self) -> None:
        """Reads what was written since the last call."""
        for file in sorted(self.folder.glob(f"{self.kind}-*.jsonl")) if self.folder else ():
            at = self._read.get(file, 0)
            if file.stat().st_size <= at:
                continue
            with open(file, "rb") as f:
                f.seek(at)
                for line in f:
                    if not line.endswith(b"\n"):
                        break
                    at += len(line)
                    with suppress(ValueError, KeyError, TypeError):
                        record = json.loads(line)
                        self.found[record["key"]] = record
            self._read[file] = at

    def add(self, records: list[dict]) -> None:
        self.found |= {record["key"]: record for record in records}
        if self.file is None or not records:
            return
        with writing(self.file):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.file, "ab+") as f:
                size = f.seek(0, 2)
                if size:
                    f.seek(size - 1)
                    if f.read(1) != b"\n":  # the last line was cut when the run was killed
                        f.write(b"\n")
                f.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))


def key_of(version: str, item: Item) -> str:
    """Hash of all that the value of a completion by a scorer with `by_item` depends on."""
    return hash_json([version, item.messages, item.completion, item.answer, item.row, item.conversational])
