"""Write prompts: a model writes new training prompts after examples (Self-Instruct, Wang et al. 2023, arXiv 2212.10560;
with topics as in Nemotron-4, arXiv 2406.11704, section 3.2), which are filtered, and their answers put to the vote."""

from __future__ import annotations

import random
import re
from collections import Counter
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from strop.trainer.config import Filter, Part, Writing
from strop.trainer.data.chat import completion_text, prompt_tokens, stop_ids
from strop.trainer.data.contamination import held_out, said, with_texts
from strop.trainer.data.dedup import near_duplicates
from strop.trainer.data.quality import repetition
from strop.trainer.data.sources import apply_template, content_hash
from strop.trainer.data.splits import hash_int
from strop.trainer.data.text import words
from strop.trainer.engines import OpenAI
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table, write_table
from strop.trainer.sampling.asking import cost_of, usage
from strop.trainer.sampling.base import Settings
from strop.trainer.sampling.shards import Shard, fitting, run_shards
from strop.trainer.sampling.vllm import lane
from strop.trainer.sampling.writers import Job, open_writer
from strop.trainer.scoring import choice
from strop.trainer.scoring.answers import spoken
from strop.trainer.scoring.rules import check, needs_answer, verify, why_not

FORMAT = "Reply with the prompt between <prompt> and </prompt>, and nothing else."
FORMAT_WITH_ANSWER = ("It must have one answer that can be checked. Reply with the prompt between <prompt> and "
                      "</prompt>, and then its final answer, without the way to it, between <answer> and </answer>.")
REPLIES = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()), ("text", pa.string()),
                     ("finish", pa.string()), ("detail", pa.string())])
ASKS = pa.schema([("ask", pa.int32()), ("topic", pa.string()), ("examples", pa.list_(pa.string())),
                  ("reply", pa.string()), ("prompt_id", pa.string()), ("answer", pa.string()), ("votes", pa.int32()),
                  ("reason", pa.string())])


def write_prompts(stage: Stage, *, write: Writing, source: Part, rules: list, sources: dict[str, dict],
                  filter: Filter | Part, model: Part, compute: Part, seed: int, round: int, weights: Path,
                  prompts: Path) -> None:
    """Writes prompts.parquet (the rows of `prompts` and the new ones, with a column `synthetic`), asks.parquet (what
    was asked and what became of it) and drops.parquet. Replies are resumed by shard.

    source: the source of the examples; rules: (rule, args) of its scorers; sources: of all sources and of the new one
    prompt_template and templated; weights: the model that writes. Raises UserError if there are no examples, or no ask
    fits the model's context.
    """
    for rule, args in rules:
        check(rule, args)
    folder, drops = ModelFolder(weights, model), Drops(stage)
    tokenizer, table = folder.tokenizer(), read_table(prompts / "prompts.parquet")
    known = with_texts(table.to_pylist(), sources)
    examples = sorted((row for row in known if row["source"] == source.name and row["split"] == "train"),
                      key=lambda row: row["prompt_id"])
    if not examples:
        raise UserError(f"{stage.name}: source {source.name} has no training prompts to show as examples; name another "
                        "as write_prompts.source")
    compared = [(rule, args) for rule, args in rules if needs_answer(rule, args)]
    options = choice.labeled(next((args.get("choices") for rule, args in rules if rule == "choice"), None))
    asks = [ask_of(write, examples, bool(compared), number, seed, round) for number in range(write.asks)]
    room = folder.context_length() - write.max_new_tokens
    fits = fitting(tokenizer, asks, room, drops)
    if not fits:
        raise UserError(f"{stage.name}: no ask leaves room for write_prompts.max_new_tokens={write.max_new_tokens} in "
                        f"the context of {folder.context_length()} tokens; lower it or write_prompts.examples")
    empty = fits[0] | {"messages": apply_template(source, _user(""), {}, options)[1]}
    around = len(prompt_tokens(tokenizer, empty))
    solvable = min(room, around + write.max_tokens)
    longest = {"tokens": (fits[0]["tokens"] * solvable)[:solvable]}  # an engine makes room for prompts to come
    settings = Settings(write.max_new_tokens, write.temperature, 0, write.top_p,
                        frozenset(stop_ids(tokenizer, folder.path)), hash_int(seed, "write_prompts", round))
    kept: list[dict] = []
    done: list[dict] = []
    with closing(Replies(Job(stage, write, "write_prompts", folder, folder, tokenizer, settings, compute,
                             [*fits, longest]))) as replies:
        checks = Checks(write, source, rules, options, filter, sources, known, tokenizer)
        while len(kept) < write.prompts and len(done) < len(fits):
            missing = write.prompts - len(kept)
            wave = fits[len(done):len(done) + -(-missing // write.shard_asks) * write.shard_asks]
            for ask, (reply,) in zip(wave, replies.to(wave, 1), strict=True):
                ask |= {"reply": reply["text"]} | checks(reply, bool(compared))
            checks.drop_near_duplicates(wave, kept)
            if compared:
                vote(replies, [ask for ask in wave if ask["reason"] is None], compared, write.votes, solvable)
            for ask in wave:
                if ask["reason"] is None and len(kept) == write.prompts:
                    ask |= {"reason": "surplus", "detail": f"write_prompts.prompts={write.prompts}"}
                elif ask["reason"] is None:
                    kept.append(ask["row"])
            done += wave
    if stage.world.first:
        for ask in done:
            if ask["reason"]:
                drops.add(ask["reason"], prompt_id=ask.get("row", {}).get("prompt_id"), source=write.name,
                          detail=f"ask {ask['ask']}: {ask['detail']}")
        finish(stage, write, table, kept, done, drops)


def finish(stage: Stage, write: Writing, table: pa.Table, kept: list[dict], done: list[dict], drops: Drops) -> None:
    """Writes the tables and counts."""
    if "synthetic" not in table.column_names:
        table = table.append_column("synthetic", pa.array([False] * len(table), pa.bool_()))
    new = pa.Table.from_pylist([{k: row.get(k) for k in table.column_names} for row in kept], schema=table.schema)
    table = pa.concat_tables([table, new])
    write_table(stage.dir / "prompts.parquet", table)
    rows = [ask | {"prompt_id": ask.get("row", {}).get("prompt_id"), "answer": ask.get("row", {}).get("answer")}
            for ask in done]
    write_table(stage.dir / "asks.parquet", pa.Table.from_pylist(
        [{name: row.get(name) for name in ASKS.names} for row in rows], schema=ASKS))
    drops.write()
    stage.counts |= {"prompts": len(kept), "asks": len(done), "synthetic": sum(table["synthetic"].to_pylist())}
    if isinstance(write, OpenAI):
        stage.counts |= cost_of(usage(stage), write)
    if len(kept) < write.prompts:
        why = ", ".join(f"{reason} {n}" for reason, n in Counter(row["reason"] for row in drops.rows).items())
        stage.console.warn(f"{stage.name}: {len(kept)} of {write.prompts} prompts after {len(done)} asks (dropped: "
                           f"{why}); raise write_prompts.asks, or have another model write")


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask_of(write: Writing, examples: list[dict], with_answer: bool, number: int, seed: int, round: int) -> dict:
    """Ask `number` of a round: its examples and topic, drawn by the seed, and its messages."""
    draw = random.Random(hash_int(seed, "ask", round, number))
    shown, topic = draw.sample(examples, min(write.examples, len(examples))), draw.choice(write.topics)
    texts = [f"<prompt>{row['text']}</prompt>" + (f"\n<answer>{row['answer']}</answer>" if with_answer else "")
             for row in shown]
    filled = {"examples": "\n\n".join(texts), "topic": topic,
              "format": FORMAT_WITH_ANSWER if with_answer else FORMAT}
    text = re.sub(r"\{(examples|topic|format)\}", lambda found: filled[found[1]], write.template)
    return {"ask": number, "prompt_id": f"ask-{number:06}", "source": write.name, "topic": topic,
            "messages": _user(text), "examples": [row["prompt_id"] for row in shown]}


def parse(text: str, with_answer: bool) -> tuple[str, str | None] | None:
    """(prompt, answer) of a reply, outside of its thinking; None unless it has exactly one of each."""
    found = [[part.strip() for part in re.findall(rf"<{tag}>(.*?)</{tag}>", spoken(text), re.DOTALL)]
             for tag in ("prompt", "answer")]
    if len(found[0]) != 1 or not found[0][0] or (with_answer and len(found[1]) != 1):
        return None
    return found[0][0], found[1][0] if with_answer else None


class Checks:
    """What a written prompt must pass. Called with a reply, the new row, or the reason why there is none and its
    detail."""

    def __init__(self, write: Writing, source: Part, rules: list, options: dict, filter: Filter | Part,
                 sources: dict[str, dict], known: list[dict], tokenizer):
        self.write, self.source, self.rules, self.options, self.filter = write, source, rules, options, filter
        self.tokenizer, self.known, self.templated = tokenizer, known, sources[source.name]["templated"]
        self.seen = {row["prompt_id"] for row in known}
        self.held = held_out(known, filter.decontaminate, {name for name, s in sources.items() if s["templated"]}
                             ) if filter.decontaminate else None

    def __call__(self, reply: dict, with_answer: bool) -> dict:
        if reply["finish"] != "stop":
            return {"reason": "cut" if reply["finish"] == "length" else reply["finish"], "detail": reply["detail"]}
        parsed = parse(reply["text"], with_answer)
        if parsed is None:
            return {"reason": "unparsed", "detail": f"{reply['text'][:200]!r}"}
        text, answer = parsed
        _, messages = apply_template(self.source, _user(text), {}, self.options)
        row = {"prompt_id": content_hash(messages), "source": self.write.name, "split": "train", "messages": messages,
               "conversational": False, "answer": answer, "metadata": "{}", "synthetic": True,
               "text": said(_user(text))}
        reason, detail = self._unfit(row)
        self.seen.add(row["prompt_id"])
        return {"row": row, "reason": reason, "detail": detail}

    def _unfit(self, row: dict) -> tuple[str | None, str]:
        length = len(self.tokenizer(row["text"], add_special_tokens=False)["input_ids"])
        if not self.write.min_tokens <= length <= self.write.max_tokens:
            return "too_short" if length < self.write.min_tokens else "too_long", f"{length} tokens"
        share = repetition(words(row["text"]))
        if share > self.filter.max_repetition:
            return "repetitive", f"{share:.2f} of its 4-grams are repeats"
        if why := why_not(self.rules, row["answer"], {}):
            return "unverifiable", why
        if row["prompt_id"] in self.seen:
            return "duplicate", row["prompt_id"]
        if self.held and (found := self.held.match(row["text"], self.source.name)):
            return "contaminated", f"shares {found[1]!r} with held-out prompt {found[0]}"
        return None, ""

    def drop_near_duplicates(self, wave: list[dict], kept: list[dict]) -> None:
        """Marks those asks of a wave whose prompt is similar to a known, kept or earlier one."""
        new = [ask for ask in wave if ask["reason"] is None]
        if self.templated or not self.filter.near_duplicates or not new:
            return
        before = [*self.known, *kept]
        texts = [(row["text"],) for row in [*before, *(ask["row"] for ask in new)]]
        for i, j, similarity in near_duplicates(texts, self.filter.near_duplicates, known=len(before)):
            other = (before[j] if j < len(before) else new[j - len(before)]["row"])["prompt_id"]
            new[i - len(before)] |= {"reason": "near_duplicate", "detail": f"{similarity:.2f} like prompt {other}"}


def vote(replies: Replies, asks: list[dict], rules: list, votes: int, room: int) -> None:
    """Self-consistency (Wang et al. 2022, arXiv 2203.11171): the writer solves each prompt `votes` times; more than
    half of the completions must stop by themselves and pass all rules with the answer that was written."""
    solved = []
    for ask in asks:
        tokens = prompt_tokens(replies.job.tokenizer, ask["row"])
        if len(tokens) > room:
            ask |= {"reason": "overlong", "detail": f"{len(tokens)} tokens, {room} fit"}
        else:
            solved.append((ask, ask["row"] | {"tokens": tokens}))
    found = replies.to([row for _, row in solved], votes) if solved else []
    for (ask, row), completions in zip(solved, found, strict=True):
        ask["votes"] = sum(c["finish"] == "stop" and all(
            verify(rule, c["text"], row["answer"], args, {})[0] >= 0.99 for rule, args in rules) for c in completions)
        if 2 * ask["votes"] <= votes:
            ask |= {"reason": "inconsistent", "detail": f"{ask['votes']} of {votes} solutions give its answer"}


class Replies:
    """Replies of one engine, which is opened when it is first needed, and stays open over several calls."""

    def __init__(self, job: Job):
        self.job, self.writer, self.calls = job, None, 0

    def to(self, rows: list[dict], n: int) -> list[list[dict]]:
        """`n` replies (text, finish, detail) to each row; every rank calls it, and does its share of the shards."""
        stage, size = self.job.stage, self.job.section.shard_asks
        parts = [rows[i:i + size] for i in range(0, len(rows), size)]
        shards = [Shard(stage.work / f"replies-{self.calls:03}-{i:05}.parquet", part,
                        [(row["prompt_id"], s) for row in part for s in range(n)]) for i, part in enumerate(parts)]
        self.calls += 1

        def to_table(engine, part: list[dict], on_progress, drops: Drops) -> pa.Table:
            found = engine.write(part, n, on_progress)
            return pa.Table.from_pylist(
                [{"prompt_id": row["prompt_id"], "sample_index": s, "detail": c.detail,
                  # nobody learns from a reply, so it does not matter what the chat template drops of it
                  "finish": "stop" if c.finish == "template" else c.finish,
                  "text": completion_text(self.job.tokenizer, c.tokens) if c.text is None else c.text}
                 for row, drawn in zip(part, found, strict=True) for s, c in enumerate(drawn)], schema=REPLIES)

        run_shards(stage, stage.name, shards, ("prompt_id", "sample_index"), REPLIES, lambda: Lent(self), to_table,
                   lane(stage.world, self.job.section))
        flat = [row for shard in shards for row in read_table(shard.path).to_pylist()]
        return [flat[i * n:(i + 1) * n] for i in range(len(rows))]

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Lent:
    """The engine of `replies` for one run_shards, which closes what it was given."""

    def __init__(self, replies: Replies):
        self.replies = replies

    def write(self, rows: list[dict], n: int, on_progress):
        if self.replies.writer is None:
            self.replies.writer = open_writer(self.replies.job)
        return self.replies.writer.write(rows, n, 0, on_progress)

    def close(self) -> None:
        pass
