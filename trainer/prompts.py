"""Prompts: read or generated, hashed, filtered, and split by content into train, validation and test."""

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from strop.trainer import verifiers
from strop.trainer.chat import encode_prompt
from strop.trainer.config import Recipe, Source
from strop.trainer.filters import HeldOut, near_duplicates, normalise, repetition, words
from strop.trainer.rows import Quarantine, Row, kind, read_rows, to_messages
from strop.trainer.store import Drops, Stage, read_table, write_table

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema([("prompt_id", pa.string()), ("source", pa.string()), ("split", pa.string()),
                    ("messages", MESSAGES), ("answer", pa.string()), ("verifier", pa.string()),
                    ("verifier_args", pa.string()), ("metadata", pa.string())])
HELD_OUT = ("test", "validation")
REPORT_SECONDS = 10.0
MUCH = 0.2  # of a source


def prompts(stage: Stage, recipe: Recipe) -> None:
    """Writes prompts.parquet, drops.parquet and quarantine.jsonl.

    Raises ValueError on sources that cannot be read, more bad rows than data.max_bad_rows in a file, or fewer distinct
    prompts than data.test and data.validation need.
    """
    drops, quarantine = Drops(stage), Quarantine(recipe.data.max_bad_rows)
    rows, seen = [], {}
    for source in recipe.data.sources:
        verifier = source.verifier or "reasoning_gym"
        try:
            verifiers.check(verifier, source.verifier_args)
        except ValueError as e:
            raise ValueError(f"data.sources, {source.name}: {e}") from e
        shown = time.monotonic()
        for row in _source_rows(source, recipe.seed, drops, quarantine):
            if time.monotonic() - shown > REPORT_SECONDS:
                shown = time.monotonic()
                stage.console.line(f"{stage.name}: {source.name}, read up to {row['where']}, {len(rows):,} prompts")
            first = seen.setdefault(row["prompt_id"], row)
            if first is not row:
                detail = row.pop("where") + ("" if first["answer"] == row["answer"] else ", with another answer")
                drops.add("duplicate", prompt_id=row["prompt_id"], source=source.name, detail=detail)
            else:
                rows.append(row | {"verifier": verifier, "verifier_args": dumps(source.verifier_args)})
    rows = drop_near_duplicates(drop_repetitive(rows, recipe, drops), recipe, drops)
    try:
        assign_splits(rows, recipe)
    except ValueError as e:
        gone = ", ".join(f"{reason} {n}" for reason, n in Counter(row["reason"] for row in drops.rows).items())
        raise ValueError(f"{e} (dropped: {gone})" if gone else str(e)) from e
    rows = drop_contaminated(rows, recipe, drops)
    warn_of_templates(stage, recipe, rows, drops)
    write_table(stage.dir / "prompts.parquet", pa.Table.from_pylist(rows, schema=SCHEMA))
    drops.write()
    quarantine.write(stage.dir / "quarantine.jsonl")
    splits = Counter(row["split"] for row in rows)
    stage.counts |= {"prompts": len(rows), **{s: splits[s] for s in ("train", "validation", "test")}}
    if quarantine.rows:
        worst = quarantine.rows[0]
        stage.console.warn(f"{len(quarantine.rows)} malformed rows set aside in {stage.name}/quarantine.jsonl; the "
                           f"first is {worst['where']}: {worst['error']}")


def prompt_tokens(tokenizer, row: dict) -> list[int]:
    """Token ids of a row of prompts.parquet. Raises ValueError, naming the prompt, if the chat template refuses it."""
    try:
        return encode_prompt(tokenizer, row["messages"])
    except ValueError as e:
        raise ValueError(f"prompt {row['prompt_id']} of source {row['source']}: {e}") from e


def content_hash(messages: list[dict]) -> str:
    """Hash of the normalised messages; it knows no source."""
    content = [[m["role"], normalise(m["content"])] for m in messages]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def dumps(value) -> str:
    """JSON with sorted keys; what JSON does not know becomes its text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _source_rows(source: Source, seed: int, drops: Drops, quarantine: Quarantine) -> Iterator[dict]:
    generated = source.path is None
    for row in _generate(source, seed) if generated else read_rows(source.path):
        try:
            if row.data is None:
                raise ValueError(row.error)
            asked, answer, metadata = _read(source, row.data)
            if not asked[-1]["content"].strip():
                drops.add("empty", source=source.name, detail=row.where)
                continue
            why = verifiers.check_answer(source.verifier or "reasoning_gym", answer, source.verifier_args, metadata)
            if why and generated:
                drops.add("unverifiable", source=source.name, detail=f"{row.where}: {why}")
                continue
            if why:
                raise ValueError(f"{why} (column {source.answer_column!r})")
        except ValueError as e:
            quarantine.add(source.path, row.where, str(e), row.text or dumps(row.data)[:500])
            drops.add("malformed", source=source.name, detail=f"{row.where}: {e}")
            continue
        messages = _dress(source, asked)
        yield {"prompt_id": content_hash(messages), "source": source.name, "messages": messages, "answer": answer,
               "metadata": dumps(metadata), "where": row.where,
               "content": content_hash([m for m in asked if m["role"] != "system"]), "text": said(asked)}


def _read(source: Source, data: dict) -> tuple[list[dict], str | None, dict]:
    """(messages, answer, metadata) of one row. Raises ValueError where a column is missing or mistyped."""
    if source.path is None:
        answer = data["answer"] if data["answer"] is None else str(data["answer"])
        return [{"role": "user", "content": data["question"]}], answer, data
    if source.prompt_column not in data:
        there = ", ".join(map(str, data)) or "none"
        raise ValueError(f"column {source.prompt_column!r} is missing (there are: {there}); set prompt_column of "
                         f"source {source.name}")
    prompt, answer = data[source.prompt_column], data.get(source.answer_column)
    if isinstance(prompt, list):
        messages = [{"role": m["role"], "content": m["content"]} for m in to_messages(prompt, source.prompt_column)]
        if messages[-1]["role"] != "user":
            raise ValueError(f"the last message of column {source.prompt_column!r} must be the user's, is of role "
                             f"{messages[-1]['role']!r}")
    elif isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        raise ValueError(f"column {source.prompt_column!r} must hold a string or a list of messages, is {kind(prompt)}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise ValueError(f"column {source.answer_column!r} must hold a string or a number, is {kind(answer)}")
    answer = answer if answer is None or isinstance(answer, str) else str(answer)
    extra = {k: v for k, v in data.items() if k not in (source.prompt_column, source.answer_column)}
    return messages, answer, json.loads(dumps(extra))


def _dress(source: Source, messages: list[dict]) -> list[dict]:
    """The messages with the source's template on the last turn and its system prompt in front of the row's own."""
    *before, last = messages
    dressed = [*before, {"role": "user", "content": source.prompt_template.replace("{prompt}", last["content"])}]
    if source.system_prompt is None:
        return dressed
    system = source.system_prompt
    if dressed[0]["role"] == "system":
        system, dressed = f"{system}\n\n{dressed[0]['content']}", dressed[1:]
    return [{"role": "system", "content": system}, *dressed]


def _generate(source: Source, seed: int) -> Iterator[Row]:
    """Rows of a reasoning-gym dataset; its seed comes from the recipe's and the source's name unless it is set."""
    name, config = source.reasoning_gym, dict(source.reasoning_gym_config)
    key = f"data.sources, {source.name}"
    if "size" in config:
        raise ValueError(f"{key}: reasoning_gym_config.size={config['size']} is not taken; set size of the source")
    digest = hashlib.blake2b(f"{seed}:{source.name}".encode(), digest_size=4).digest()
    config.setdefault("seed", int.from_bytes(digest) >> 1)
    try:
        verifiers.check("reasoning_gym", {"dataset": name})
    except ValueError as e:
        raise ValueError(f"{key}: reasoning_gym={name}: {e}") from e
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(name, size=source.size, **config)
        for i in range(source.size):
            entry = json.loads(dumps(dataset[i]))
            yield Row(f"{name}:{i}", entry)
    except (AssertionError, TypeError, ValueError, LookupError, AttributeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"{key}: reasoning_gym.{name} refuses reasoning_gym_config={source.reasoning_gym_config}: "
                         f"{reason}") from e


# ---- filters

def said(messages: list[dict]) -> str:
    """What the filters see of a prompt: all but system messages."""
    return "\n".join(m["content"] for m in messages if m["role"] != "system")


def drop_repetitive(rows: list[dict], recipe: Recipe, drops: Drops) -> list[dict]:
    """The rows whose text repeats itself no more than filter.max_repetition."""
    kept = []
    for row in rows:
        share = repetition(words(row["text"]))
        if share <= recipe.filter.max_repetition:
            kept.append(row)
        else:
            drops.add("repetitive", prompt_id=row["prompt_id"], source=row["source"],
                      detail=f"{row['where']}: {share:.2f} of its 4-grams stood before")
    return kept


def drop_near_duplicates(rows: list[dict], recipe: Recipe, drops: Drops) -> list[dict]:
    """The rows without those that are like an earlier one of their source, if it is not templated."""
    threshold, gone = recipe.filter.near_duplicates, set()
    for source in recipe.data.sources if threshold else ():
        mine = [row for row in rows if row["source"] == source.name and not source.templated]
        for i, j, similarity in near_duplicates([(row["text"],) for row in mine], threshold):
            gone.add(mine[i]["prompt_id"])
            drops.add("near_duplicate", prompt_id=mine[i]["prompt_id"], source=source.name,
                      detail=f"{mine[i]['where']}: {similarity:.2f} like {mine[j]['where']}")
    return [row for row in rows if row["prompt_id"] not in gone]


def drop_contaminated(rows: list[dict], recipe: Recipe, drops: Drops) -> list[dict]:
    """The rows without training prompts that repeat a held-out one.

    Raises ValueError if no training prompt is left."""
    if not recipe.filter.decontaminate:
        return rows
    held = held_out(rows, recipe)
    splits, kept = {row["prompt_id"]: row["split"] for row in rows}, []
    for row in rows:
        found = held.match(row["text"], row["source"]) if row["split"] == "train" else None
        if found is None:
            kept.append(row)
        else:
            drops.add("contaminated", prompt_id=row["prompt_id"], source=row["source"],
                      detail=f"{row['where']}: shares {found[1]!r} with {splits[found[0]]} prompt {found[0]}")
    if not any(row["split"] == "train" for row in kept):
        raise ValueError(f"filter.decontaminate={recipe.filter.decontaminate}: every training prompt repeats a held-"
                         "out one; give more varied prompts, raise it, or set it to 0 to train on them all the same")
    return kept


def warn_of_templates(stage: Stage, recipe: Recipe, rows: list[dict], drops: Drops) -> None:
    """Says so where the filters take much of a source: most likely its prompts come from templates."""
    left = Counter(row["source"] for row in rows)
    for i, source in enumerate(recipe.data.sources):
        gone = Counter(row["reason"] for row in drops.rows if row["source"] == source.name)
        n = gone["near_duplicate"] + gone["contaminated"]
        if not source.templated and n > MUCH * (n + left[source.name]):
            stage.console.warn(f"{stage.name}: {n:,} of {n + left[source.name]:,} prompts of source {source.name} are "
                               f"near duplicates or repeat held-out ones (drops.parquet has each); if they come from "
                               f"templates, set data.sources.{i}.templated=true to keep them")


def held_out(rows: list[dict], recipe: Recipe) -> HeldOut:
    """What prompts are compared with; `rows` have prompt_id, source, split and text."""
    texts = defaultdict(list)
    for row in rows:
        texts[row["source"]].append(row["text"])
    held = HeldOut([(row["prompt_id"], row["source"], row["text"]) for row in rows if row["split"] in HELD_OUT],
                   recipe.filter.decontaminate, {s.name for s in recipe.data.sources if s.templated})
    for of_source in texts.values():
        held.survey(of_source)
    return held


def held_out_of(prompts: Path, recipe: Recipe) -> HeldOut | None:
    """The same from a prompts artifact, for ready data; None where filter.decontaminate is off. What the source's
    template put around a prompt is taken off again."""
    if not recipe.filter.decontaminate:
        return None
    templates = {s.name: s.prompt_template.split("{prompt}") for s in recipe.data.sources}
    rows = read_table(prompts / "prompts.parquet").select(["prompt_id", "source", "split", "messages"]).to_pylist()
    for row in rows:
        before, *_, after = templates.get(row["source"], ("", ""))
        last = row["messages"][-1]
        last["content"] = last["content"].removeprefix(before).removesuffix(after)
        row["text"] = said(row["messages"])
    return held_out(rows, recipe)


# ---- splits

def assign_splits(rows: list[dict], recipe: Recipe) -> None:
    """Sets `split` of every row: data.test and data.validation prompts (or a few more), shared out over the sources by
    share, the rest train. Which rows are held out depends on content and seed only, and rows of equal content stay
    together. Raises ValueError if there are too few prompts."""
    data = recipe.data
    groups: dict[str, list[dict]] = {}
    for row in rows:
        row["split"] = "train"
        groups.setdefault(row.pop("content"), []).append(row)
    total = Counter(row["source"] for row in rows)
    room = {s.name: max(0, total[s.name] - 1) for s in data.sources}
    if sum(room.values()) < data.test + data.validation:
        has = ", ".join(f"{name} {n:,}" for name, n in sorted(total.items())) or "none"
        raise ValueError(f"data.test={data.test} and data.validation={data.validation} leave nothing to train on: "
                         f"there are {len(rows)} distinct prompts ({has}); give more (size of a reasoning_gym "
                         "source, or rows) or lower data.test and data.validation")
    shares, quota = {s.name: s.share for s in data.sources}, {}
    for split in HELD_OUT:
        quota[split] = allot(getattr(data, split), shares, room)
        room = {name: room[name] - quota[split][name] for name in room}
    order = sorted(groups, key=lambda c: hashlib.blake2b(f"{recipe.seed}:split:{c}".encode(), digest_size=16).digest())
    held: Counter = Counter()
    for source in shares:
        mine = iter([c for c in order if any(r["source"] == source for r in groups[c])])
        for split in HELD_OUT:
            while held[source, split] < quota[split][source]:
                content = next(mine, None)
                if content is None:
                    break
                if groups[content][0]["split"] == "train":
                    for row in groups[content]:
                        row["split"] = split
                        held[row["source"], split] += 1
    splits = Counter(row["split"] for row in rows)
    if not splits["train"] or any(splits[s] < getattr(data, s) for s in HELD_OUT):
        raise ValueError(f"data.test={data.test} and data.validation={data.validation} do not fit: the sources share "
                         f"so many prompts that the splits hold {dict(splits)}; lower them or give more prompts")


def allot(total: int, shares: dict[str, float], room: dict[str, int]) -> dict[str, int]:
    """`total` in whole numbers proportional to `shares`, none above its `room`; the rest goes where room is."""
    given = dict.fromkeys(shares, 0)
    while (left := total - sum(given.values())) > 0:
        open_ = [name for name in shares if given[name] < room[name]]
        assert open_, (total, room)
        weight = sum(shares[name] for name in open_)
        exact = {name: left * shares[name] / weight for name in open_}
        parts = {name: int(exact[name]) for name in open_}
        for name in sorted(open_, key=lambda n: parts[n] - exact[n])[:left - sum(parts.values())]:
            parts[name] += 1
        for name in open_:
            given[name] = min(room[name], given[name] + parts[name])
    return given
