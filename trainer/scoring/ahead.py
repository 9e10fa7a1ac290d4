"""Scores finished shards of samples while the next ones are drawn.

The values go into files beside the sample artifact, by content, and the score stage reads them instead of computing
them: its artifact is the same with and without. What depends on other completions of a call (functions that take lists,
reward models, local judges) waits for that stage.
"""

from __future__ import annotations

import threading
from pathlib import Path
from queue import SimpleQueue

from strop.trainer.config import Part, Score, Scorer
from strop.trainer.errors import UserError
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table
from strop.trainer.sampling.base import Stopped
from strop.trainer.scorers import ServedJudge
from strop.trainer.scoring.base import Columns, item_of
from strop.trainer.scoring.table import Verdicts, parts_of, refuse

PATIENCE = 5.0  # seconds for what is under way when the run stops


class Ahead:
    """A thread that scores the shards that it is given, in order, until it is closed.

    idle: whether this machine has nothing else to do; if not, only served judges are asked. whole: whether the shards
    have all completions of their prompts; if not, pairs wait. prompts: the artifact. Raises UserError if a scorer
    cannot be opened."""

    def __init__(self, stage: Stage, idle: bool, *, whole: bool, scorers: dict[str, list[Scorer]],
                 columns: dict[str, list[str]], files: dict[str, Path], score: Score | Part, prompts: Path,
                 compute: Part | None = None):
        self.stage, self.score, self.columns, self.prompts = stage, score, columns, prompts
        ready = {source: [one for scorer in mine if (one := ready_of(scorer, idle, whole))]
                 for source, mine in scorers.items()}
        self.verdicts, self.failed, self.failure = None, [], None
        self.shards: SimpleQueue[Path | None] = SimpleQueue()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        if any(ready.values()):
            self.verdicts = Verdicts(stage, ready, files, score, compute, into=stage.scored, who="-ahead")
            self.verdicts.scorers = {source: [s for s in mine if s.judge or self.verdicts.live[source, s.name].by_item]
                                     for source, mine in ready.items()}
            self.thread.start()

    def add(self, shard: Path) -> None:
        self.shards.put(shard)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind, *_) -> None:
        """Ends after what is under way, which is kept; at once if there was an error."""
        if self.verdicts is None:
            return
        self.stop.set()
        self.shards.put(None)
        for scorer in self.verdicts.live.values():
            if hasattr(scorer, "halt"):
                scorer.halt()
        if kind is not None:
            self.verdicts.close()
        self.thread.join(None if kind is None else PATIENCE)
        if kind is None:
            self.verdicts.close()
            if self.failure is not None:
                raise self.failure

    def _run(self) -> None:
        try:
            rows = {row["prompt_id"]: row for row in read_table(self.prompts / "prompts.parquet").to_pylist()}
            while (shard := self.shards.get()) is not None and not self.stop.is_set():
                self._shard(read_table(shard).to_pylist(), rows)
        except Stopped:
            pass
        except UserError as e:
            if not self.stop.is_set():
                self.stage.console.warn(f"{self.stage.name}: samples are scored only when all are drawn, because {e}")
        except BaseException as e:
            self.failure = e

    def _shard(self, samples: list[dict], rows: dict[str, dict]) -> None:
        for sample in samples:
            sample["source"] = rows[sample["prompt_id"]]["source"]

        def to_item(sample: dict):
            where = f"prompt {sample['prompt_id']}, sample {sample['sample_index']}"
            return item_of(rows[sample["prompt_id"]], Columns(*self.columns[sample["source"]]), sample["completion"],
                           sample["completion_tokens"], where)

        for part in parts_of(sorted(samples, key=lambda s: (s["prompt_id"], s["sample_index"]))):
            for *_, errors in self.verdicts.of(part, to_item):
                if self.stop.is_set():
                    raise Stopped
                self.failed += errors
                refuse(self.stage, self.failed, self.score.max_errors)


def ready_of(scorer: Scorer, idle: bool, whole: bool) -> Scorer | None:
    """The scorer, or as much of it as can be known before all samples are drawn."""
    if scorer.judge is not None:
        served = [model for model in scorer.judge.models if isinstance(model, ServedJudge)]
        if not served or (scorer.judge.mode == "pairwise" and not whole):
            return None
        return scorer.model_copy(update={"judge": scorer.judge.model_copy(update={"models": served})})
    return scorer if idle and scorer.reward_model is None else None
