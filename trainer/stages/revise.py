"""Revise: a model criticizes completions and rewrites them (Constitutional AI, Bai et al. 2022, arXiv 2212.08073,
section 3.1; of programs by what their tests said: Llama 3, section 4.3.1)."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Part, Score
from strop.trainer.data.chat import completion_text, prompt_tokens, stop_ids
from strop.trainer.data.samples import Judging, read_samples, read_scored
from strop.trainer.data.splits import hash_int
from strop.trainer.engines import OpenAI, Revising
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table, write_table
from strop.trainer.sampling.asking import cost_of, usage
from strop.trainer.sampling.base import Completion, Settings
from strop.trainer.sampling.shards import Shard, collect_drops, run_shards
from strop.trainer.sampling.vllm import lane
from strop.trainer.sampling.writers import Job, as_tokens, open_writer

ORIGIN = pa.struct([("prompt_id", pa.string()), ("sample_index", pa.int32())])
STEP = pa.struct([("feedback", pa.string()), ("critique", pa.string()), ("revision", pa.string())])
SCHEMA = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()),
                    ("prompt_tokens", pa.list_(pa.int32())), ("completion_tokens", pa.list_(pa.int32())),
                    ("completion", pa.string()), ("logp", pa.float32()), ("finish", pa.string()),
                    ("writer", pa.string()), ("writer_hash", pa.string()), ("from_text", pa.bool_()),
                    ("revised_from", ORIGIN), ("steps", pa.list_(STEP))])
UNUSABLE = ("refused", "empty")
SLACK = 64  # tokens of headers around the turns of a critique


def revise(stage: Stage, *, revise: Revising, model: Part, compute: Part, seed: int, round: int, weights: Path,
           prompts: Path, sample: Path, student: Path, writer_hash: str | None = None, scores: Path | None = None,
           score: Score | None = None, judging: dict | None = None, selection: Path | None = None) -> None:
    """Writes shard-00000.parquet, ... and drops.parquet, in the schema of samples with where each row comes from.

    A revision's sample_index follows those of all completions: theirs plus the largest, plus one. weights: the model
    that writes. student: the folder whose tokens are wanted. scores, score and judging (weights of scorers): with
    revise.feedback=errors, whose feedback on a completion that is not correct is the detail of its scores. selection:
    only what its pairs chose is revised. Runs on every rank and resumes by shard. Raises UserError if no revision can
    be used.
    """
    folder, student_folder = ModelFolder(weights, model), ModelFolder(student, model)
    tokenizer = student_folder.tokenizer()
    asked = {row["prompt_id"]: row for row in read_table(prompts / "prompts.parquet").to_pylist()}
    samples = read_samples(sample) if scores is None else read_scored(
        sample, scores, {i: row["source"] for i, row in asked.items()},
        Judging(judging, None, score.correct_by, score.correct_at), prompts)
    offset = 1 + max(s["sample_index"] for s in samples)
    said = {} if scores is None else details(scores)
    tasks = chosen(samples if selection is None else in_pairs(samples, selection), revise, said, seed)
    if not tasks and stage.world.first:
        stage.console.warn(f"{stage.name}: no completion is to be revised")
    context = student_folder.context_length()
    if not isinstance(revise, OpenAI):
        context = min(context, folder.context_length())

    def turn(task: dict, t: int, completion: str, critique: str | None = None) -> dict:
        """A row whose completion is a critique of `completion`, or with `critique` its revision."""
        row, feedback = asked[task["prompt_id"]], task["feedback"][t]
        messages = [*row["messages"], {"role": "assistant", "content": completion},
                    {"role": "user", "content": revise.critique.replace("{feedback}", feedback)}]
        if critique is not None:
            messages += [{"role": "assistant", "content": critique},
                         {"role": "user", "content": revise.revision.replace("{feedback}", feedback)}]
        kind = "critique" if critique is None else "revision"
        return row | {"messages": messages,
                      "prompt_id": f"{task['prompt_id']}/{task['sample_index']}/{kind}-{t + 1}"}

    number = {prompt_id: n for n, prompt_id in enumerate(dict.fromkeys(task["prompt_id"] for task in tasks))}
    grouped = [list(part) for _, part in groupby(tasks, lambda task: number[task["prompt_id"]] // revise.shard_prompts)]
    shards = [Shard(stage.dir / f"shard-{i:05}.parquet", part,
                    [(task["prompt_id"], offset + task["sample_index"]) for task in part],
                    stage.work / f"drops-{i:05}.parquet") for i, part in enumerate(grouped or [[]])]
    settings = Settings(revise.max_new_tokens, revise.temperature, revise.top_k, revise.top_p,
                        frozenset(stop_ids(tokenizer, student_folder.path)), hash_int(seed, "revise", round))
    first = [fitted for task in tasks if not isinstance(fitted := _fitted(
        tokenizer, turn(task, 0, task["completion"]), context - settings.max_new_tokens), tuple)]
    turns = max((len(tokenizer(text.replace("{feedback}", f), add_special_tokens=False)["input_ids"])
                 for task in tasks for f in task["feedback"] for text in (revise.critique, revise.revision)), default=0)
    room = min(context - settings.max_new_tokens,
               max((len(row["tokens"]) for row in first), default=0) + 2 * (settings.max_new_tokens + turns + SLACK))
    # an engine that plans its memory by the longest row must know how long the later ones get
    longest = [row | {"tokens": (row["tokens"] * (1 + room // len(row["tokens"])))[:room]} for row in first[:1]]
    job = Job(stage, revise, "revise", folder, student_folder, tokenizer, settings, compute, [*first, *longest])
    name = revise.model if isinstance(revise, OpenAI) else "current"

    def write(engine, rows: list[dict], on_progress) -> list[Completion]:
        """A completion of each row; `finish` says why if there is none."""
        fit = [_fitted(tokenizer, row, room) for row in rows]
        there = [row for row in fit if not isinstance(row, tuple)]
        found = iter(engine.write(there, 1, 0, on_progress)) if there else iter(())
        return [Completion(finish=row[0], detail=row[1]) if isinstance(row, tuple) else next(found)[0] for row in fit]

    def text_of(c: Completion) -> str:
        return (completion_text(tokenizer, c.tokens) if c.text is None else c.text).strip()

    def to_table(engine, part: list[dict], on_progress, drops: Drops) -> pa.Table:
        texts, steps = [task["completion"] for task in part], [[] for _ in part]
        gone: dict[int, tuple[str, str]] = {}
        for t in range(revise.times):
            critiques: dict[int, str] = {}
            for kind in ("critique", "revision"):
                live = [i for i in range(len(part)) if i not in gone]
                rows = [turn(part[i], t, texts[i], critiques.get(i)) for i in live]
                for i, c in zip(live, write(engine, rows, lambda n, tokens: on_progress(0, tokens)), strict=True):
                    text, cut = text_of(c), kind == "revision" and c.finish == "length"
                    if not text or cut or c.finish in UNUSABLE or (c.text is None and not c.tokens):
                        gone[i] = ("cut" if cut else c.finish if c.finish not in ("stop", "length") else "empty",
                                   f"{kind} {t + 1}: {c.detail or c.finish}")
                    elif kind == "critique":
                        critiques[i] = text
                    else:
                        steps[i].append({"feedback": part[i]["feedback"][t], "critique": critiques[i],
                                         "revision": text})
                        texts[i] = text
        made = []
        for i, task in enumerate(part):
            row, ids = asked[task["prompt_id"]], {"prompt_id": task["prompt_id"],
                                                  "sample_index": offset + task["sample_index"]}
            if i not in gone:
                c = as_tokens(job, row | {"tokens": task["prompt_tokens"]}, Completion([], None, "stop", texts[i]))
                if c.finish != "stop":
                    gone[i] = c.finish, c.detail
            if i in gone:
                drops.add(gone[i][0], **ids, source=row["source"], detail=f"of sample {task['sample_index']}: "
                          f"{gone[i][1]}")
                continue
            made.append(ids | {"prompt_tokens": task["prompt_tokens"], "completion_tokens": c.tokens,
                               "completion": texts[i], "logp": None, "finish": "stop", "writer": f"revise-{name}",
                               "writer_hash": writer_hash, "from_text": True, "steps": steps[i],
                               "revised_from": {k: task[k] for k in ("prompt_id", "sample_index")}})
        on_progress(len(part), 0)
        return pa.Table.from_pylist(made, schema=SCHEMA)

    if tasks:
        run_shards(stage, stage.name, shards, ("prompt_id", "sample_index"), SCHEMA, lambda: open_writer(job),
                   to_table, lane(stage.world, revise))
    elif stage.world.first:
        write_table(shards[0].path, SCHEMA.empty_table())
    if stage.world.first:
        drops = Drops(stage)
        collect_drops(shards, drops)
        drops.write()
        revised = sum(read_table(shard.path).num_rows for shard in shards)
        stage.counts |= {"completions": len(samples), "chosen": len(tasks), "revised": revised}
        if isinstance(revise, OpenAI):
            stage.counts |= cost_of(usage(stage), revise)
        if tasks and not revised:
            reasons = ", ".join(f"{k.removeprefix('dropped/')} {n}" for k, n in stage.counts.items() if "dropped/" in k)
            raise UserError(f"{stage.name}: none of {len(tasks)} revisions can be used ({reasons}); raise "
                            "revise.max_new_tokens if they are cut, else change the model or the templates")


def chosen(samples: list[dict], section: Revising, said: dict[tuple, str], seed: int) -> list[dict]:
    """The first section.per_prompt completions of each prompt that have something to be criticized by, each with its
    `feedback`: a text for each of the section.times steps. said: of errors, by (prompt_id, sample_index)."""
    found, taken = [], defaultdict(int)
    for s in samples:
        key = s["prompt_id"], s["sample_index"]
        if section.feedback == "errors":
            feedback = [said[key]] if key in said and not s["correct"] else []
        else:
            n = len(section.principles)
            feedback = [section.principles[(hash_int(seed, "principle", *key) + t) % n] for t in range(section.times)]
        if feedback and s["completion"].strip() and taken[s["prompt_id"]] < section.per_prompt:
            taken[s["prompt_id"]] += 1
            found.append(s | {"feedback": feedback})
    return found


def in_pairs(samples: list[dict], selection: Path) -> list[dict]:
    """The samples that pairs of the selection chose."""
    pairs = read_table(selection / "pairs.parquet", ["prompt_id", "chosen_tokens"]).to_pylist()
    wanted = {(row["prompt_id"], tuple(row["chosen_tokens"])) for row in pairs}
    return [s for s in samples if (s["prompt_id"], tuple(s["completion_tokens"])) in wanted]


def details(scores: Path) -> dict[tuple, str]:
    """{(prompt_id, sample_index): what scorers say about it}"""
    found = defaultdict(list)
    for row in read_table(scores / "scores.parquet").to_pylist():
        if row["detail"]:
            found[row["prompt_id"], row["sample_index"]].append(row["detail"])
    return {key: "\n".join(texts) for key, texts in found.items()}


def _fitted(tokenizer, row: dict, room: int) -> dict | tuple[str, str]:
    """The row with its `tokens`, or (reason, detail) why the model cannot be asked."""
    try:
        tokens = prompt_tokens(tokenizer, row)
    except UserError as e:  # a template may leave reasoning out of earlier turns
        return "template", str(e)
    return row | {"tokens": tokens} if len(tokens) <= room else ("overlong", f"{len(tokens)} tokens, {room} fit")
