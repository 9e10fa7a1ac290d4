"""Select: best of K to SFT, best and worst of K to pairs, plus ready data; the rest is dropped with a reason.

Every sample ends up in sft.parquet, pairs.parquet (rated.parquet for losses that need no pairs) or drops.parquet;
difficulty.parquet has each prompt's pass rate by round.
"""

import hashlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import pstdev
from typing import NamedTuple

import pyarrow as pa

from strop.trainer.config import Filter, Part, Score, Select
from strop.trainer.data.chat import stop_ids
from strop.trainer.data.contamination import held_out_of
from strop.trainer.data.quality import unfit_tokens
from strop.trainer.data.ready import ready_pairs, ready_rated, ready_sft
from strop.trainer.data.rows import Quarantine
from strop.trainer.data.samples import Judging, read_scored, read_unscored
from strop.trainer.data.semantic import ranked, semantic_duplicates
from strop.trainer.errors import UserError
from strop.trainer.models.embedder import Embedder
from strop.trainer.models.loading import DTYPES, ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table, write_table

TOKENS, MASK = pa.list_(pa.int32()), pa.list_(pa.bool_())
SFT = pa.schema([("row_id", pa.string()), ("source", pa.string()), ("prompt_id", pa.string()),
                 ("sample_index", pa.int32()), ("prompt_tokens", TOKENS), ("completion_tokens", TOKENS),
                 ("loss_mask", MASK), ("score", pa.float64()), ("weight", pa.float64()), ("origin", pa.string()),
                 ("writer", pa.string())])
PAIRS = pa.schema([("row_id", pa.string()), ("source", pa.string()), ("prompt_id", pa.string()),
                   ("prompt_tokens", TOKENS), ("chosen_tokens", TOKENS), ("rejected_tokens", TOKENS),
                   ("chosen_mask", MASK), ("rejected_mask", MASK), ("chosen_template", MASK),
                   ("rejected_template", MASK), ("chosen_score", pa.float64()), ("rejected_score", pa.float64()),
                   ("margin", pa.float64()), ("decided_by", pa.string()), ("weight", pa.float64()),
                   ("origin", pa.string()), ("chosen_writer", pa.string()), ("rejected_writer", pa.string()),
                   ("chosen_writer_hash", pa.string()), ("rejected_writer_hash", pa.string()),
                   ("chosen_logp", pa.float64()), ("rejected_logp", pa.float64())])
RATED = pa.schema([("row_id", pa.string()), ("list_id", pa.string()), ("source", pa.string()),
                   ("prompt_id", pa.string()), ("sample_index", pa.int32()), ("prompt_tokens", TOKENS),
                   ("completion_tokens", TOKENS), ("loss_mask", MASK), ("template", MASK), ("score", pa.float64()),
                   ("desirable", pa.bool_()), ("weight", pa.float64()), ("origin", pa.string()),
                   ("writer", pa.string()), ("writer_hash", pa.string()), ("logp", pa.float64())])
JUDGED = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()), ("score", pa.float64()),
                    ("correct", pa.bool_())])
COUNTS = pa.list_(pa.int32())
DIFFICULTY = pa.schema([("prompt_id", pa.string()), ("source", pa.string()), ("rounds", COUNTS), ("samples", COUNTS),
                        ("correct", COUNTS), ("pass_rate", pa.float64())])


class Rules(NamedTuple):
    """The sections select and filter, the seed of random ties, what makes a score of values, which rows are not made,
    what the preference loss learns from (pairs, labels or lists), and whether pairs are of revisions and what they
    revise."""

    select: Select
    filter: Filter
    seed: int
    judging: Judging
    without: str | None = None
    rows: str = "pairs"
    corrections: bool = False


def select(stage: Stage, *, select: Select, score: Score | None, weights: dict[str, dict[str, float]], filter: Filter,
           data: Part, model: Part, sources: dict[str, dict], seed: int, round: int, prompts: Path | None,
           history: list[tuple[Path, Path | None]], tokenizer: Path, files: dict[str, dict[str, Path]],
           embedder: Path | None = None, compute: Part | None = None, without: str | None = None,
           only: dict[str, float] | None = None, rows: str = "pairs", corrections: bool = False,
           topics: dict[str, str | None] | None = None) -> None:
    """Writes sft.parquet, pairs.parquet, rated.parquet, judged.parquet, difficulty.parquet, drops.parquet and
    quarantine.jsonl.

    history: the (sample, score) folders of rounds 0..round, oldest first, or (sample, None) where nothing scores the
    samples and all that stopped by themselves are as good; without select.accumulate only the newest is
    used. tokenizer: the model folder whose tokenizer encodes ready data. data: its keys sft, preferences and
    max_bad_rows; files: the rows of those that are used, by key and name. sources: name -> prompt_template and
    templated. weights: source -> scorer -> its weight in the score. score: None if nothing says what is correct.
    embedder and compute (the recipe's dtype): with filter.semantic. without: "sft" or "pairs", which are not made of
    samples. only: the sources whose rows are made, each with a factor of their weights and of those of ready data; by
    default all. rows: what the preference loss learns from, pairs, or labels or lists of rated.parquet; the other table
    stays empty. corrections: pair correct revisions with the completions that they revise, not the best with the worst.
    topics: with select.topic_share, the scorer of each source that tells the topic. Raises UserError if nothing is
    left.
    """
    folder = ModelFolder(tokenizer, model)
    tokenizer = folder.tokenizer()
    stops = stop_ids(tokenizer, folder.path)
    drops, quarantine = Drops(stage), Quarantine(data.max_bad_rows)
    judging = Judging(weights, select.by, *((score.correct_by, score.correct_at) if score else (None, None)))
    sft_rows, pair_rows, rated_rows = [], [], []
    rules = Rules(select, filter, seed, judging, without, rows, corrections)
    pool = _pool(prompts, history, round, judging, topics)
    asked = _asked(prompts) if embedder and history else {}
    difficulty = {prompt_id: solved(prompt_id, samples) for prompt_id, samples in pool.items()}
    for prompt_id, samples in pool.items():
        counted, source = [s for s in samples if select.accumulate or s["round"] == round], samples[0]["source"]
        counted = within(select.values, counted, drops) if select.values else counted
        if counted and (only is None or source in only):
            best, pairs, rated = pick(prompt_id, source, counted, difficulty[prompt_id]["pass_rate"], rules, drops)
            for s in best:
                sft_rows.append(_sft_row(s, source) | {"topic": s.get("topic")})
                if embedder or topics:
                    sft_rows[-1] |= _rank(s, asked.get(prompt_id, ""), difficulty[prompt_id]["pass_rate"], filter)
            pair_rows += [_pair_row(c, r, source, stops, judging) for c, r in pairs]
            rated_rows += [_rated_row(s, source, stops) for s in rated]
    now = [s for samples in pool.values() for s in samples if s["round"] == round]
    if now:
        stage.counts["prompts"] = len({s["prompt_id"] for s in now})
    if now and score:
        stage.counts |= {"solved_prompts": len({s["prompt_id"] for s in now if s["correct"]}),
                         "pass_rate": sum(s["correct"] for s in now) / len(now)}
    held = held_out_of(prompts, filter.decontaminate, sources) if prompts and (data.sft or data.preferences) else None
    def rated_of(*how):
        return ready_rated(*how[:2], rows, *how[2:])

    of_preferences = (pair_rows, ready_pairs) if rows == "pairs" else (rated_rows, rated_of)
    for kind, found, read in (("sft", sft_rows, ready_sft), ("preferences", *of_preferences)):
        for ready in (d for d in getattr(data, kind) if d.name in files[kind]):
            ready = ready.model_copy(update={"path": files[kind][ready.name]})
            found += read(tokenizer, ready, filter, held, drops, quarantine)
    for row in [*sft_rows, *pair_rows, *rated_rows] if only else ():
        row["weight"] *= only[row["source"]]
    if embedder:
        kept_whole = {name for name, how in sources.items() if how["templated"]}
        kept_whole |= {ready.name for ready in data.sft if not ready.near_duplicates}
        sft_rows = drop_semantic(stage, sft_rows, kept_whole, lambda: Embedder(
            embedder, DTYPES[compute.dtype], stage.world.device), rules, drops)
    if topics:
        sft_rows = limit_topics(sft_rows, select.topic_share, drops)
    write_table(stage.dir / "sft.parquet", pa.Table.from_pylist(sft_rows, schema=SFT))
    write_table(stage.dir / "pairs.parquet", pa.Table.from_pylist(pair_rows, schema=PAIRS))
    write_table(stage.dir / "rated.parquet", pa.Table.from_pylist(rated_rows, schema=RATED))
    write_table(stage.dir / "difficulty.parquet", pa.Table.from_pylist(list(difficulty.values()), schema=DIFFICULTY))
    write_table(stage.dir / "judged.parquet", pa.Table.from_pylist(now, schema=JUDGED))
    stage.counts |= {"sft_rows": len(sft_rows)} | (
        {"pairs": len(pair_rows)} if rows == "pairs" else {"rated": len(rated_rows)})
    decided = Counter(row["decided_by"] for row in pair_rows if row["decided_by"])
    if len({name for mine in weights.values() for name in mine}) > 1:
        stage.counts |= {f"decided/{name}": n for name, n in sorted(decided.items())}
    drops.write()
    quarantine.write(stage)
    if not sft_rows and not pair_rows and not rated_rows:
        reasons = ", ".join(f"{k.removeprefix('dropped/')} {v}" for k, v in stage.counts.items() if "dropped/" in k)
        stage.nothing_to_learn(f"{stage.name}: nothing survives selection (dropped: {reasons or 'nothing'}); raise "
                               "sample.k or sample.prompts, give easier prompts, or lower select.sft_min_score and "
                               "select.pair_margin")


def within(limits: dict[str, tuple], samples: list[dict], drops: Drops) -> list[dict]:
    """The samples whose values are within select.values; one that lacks a value is not."""
    kept = []
    for s in samples:
        for name, (low, high) in limits.items():
            value = s.get("values", {}).get(name, (None, None))[0]
            if name in s.get("values", {}) and (value is None or (low is not None and value < low)
                                        or (high is not None and value > high)):
                drops.add("value", prompt_id=s["prompt_id"], source=s["source"], sample_index=s["sample_index"],
                          detail=f"{_origin(s)}: {name} " + ("has no value" if value is None else f"{value:g}"))
                break
        else:
            kept.append(s)
    return kept


def limit_topics(rows: list[dict], share: float, drops: Drops) -> list[dict]:
    """Drops SFT rows until no topic has more than `share` of those with a topic, the worst first, by quality x
    difficulty. Raises UserError if there are too few topics for that."""
    told = [i for i, row in enumerate(rows) if row.get("topic") is not None]
    counts = Counter(rows[i]["topic"] for i in told)

    def holds(most: int) -> bool:
        return most <= share * sum(min(n, most) for n in counts.values()) + 1e-9

    if not counts:
        return rows
    if not holds(1):
        raise UserError(f"select.topic_share={share:g}: the SFT rows have {len(counts)} topics, so one has at least "
                        f"{1 / len(counts):.3g} of them; raise it, or give more topics")
    most = bisect_right(range(1, max(counts.values()) + 1), False, key=lambda n: not holds(n))
    gone, seen = set(), Counter()
    for i in (told[i] for i in ranked(*([rows[i].get(name) for i in told] for name in ("quality", "difficulty")))):
        seen[rows[i]["topic"]] += 1
        if seen[rows[i]["topic"]] > most:
            gone.add(i)
            drops.add("topic", prompt_id=rows[i]["prompt_id"], sample_index=rows[i]["sample_index"],
                      source=rows[i]["source"],
                      detail=f"{rows[i]['row_id']}: {rows[i]['topic']} has {counts[rows[i]['topic']]}, {most} kept")
    return [row for i, row in enumerate(rows) if i not in gone]


def _pool(prompts: Path | None, history: list, newest: int, judging: Judging,
          topics: dict[str, str | None] | None) -> dict[str, list[dict]]:
    """{prompt_id: its samples of all rounds, with `round` and what read_scored adds}, sorted by prompt_id. newest: the
    last round of `history`."""
    if not history:
        return {}
    table = read_table(prompts / "prompts.parquet").select(["prompt_id", "source", "split"])
    sources = {row["prompt_id"]: row["source"] for row in table.to_pylist() if row["split"] == "train"}
    pool = defaultdict(list)
    for r, (sample, scored) in enumerate(history, start=newest + 1 - len(history)):
        for row in (read_unscored(sample, sources, prompts) if scored is None
                    else read_scored(sample, scored, sources, judging, prompts, topics)):
            pool[row["prompt_id"]].append(row | {"round": r})
    return {prompt_id: pool[prompt_id] for prompt_id in sorted(pool)}


def _asked(prompts: Path) -> dict[str, str]:
    """{prompt_id: the user's turns}"""
    return {row["prompt_id"]: "\n".join(m["content"] for m in row["messages"] if m["role"] == "user")
            for row in read_table(prompts / "prompts.parquet", ["prompt_id", "messages"]).to_pylist()}


def _rank(s: dict, asked: str, pass_rate: float | None, filter: Filter) -> dict:
    """What drop_semantic knows of a sample: its text, quality and difficulty."""
    named = {kind: s["values"].get(name, (None, None))[0]
             for kind, name in (("quality", filter.quality), ("difficulty", filter.difficulty))
             if name in s["values"]}
    return {"text": f"{asked}\n{s['completion']}", "quality": s["score"], "difficulty": 1 - (pass_rate or 0.0)} | named


def drop_semantic(stage: Stage, rows: list[dict], kept_whole: set[str], load: Callable[[], Embedder],
                  rules: Rules, drops: Drops) -> list[dict]:
    """Drops SFT rows whose embedding is within filter.semantic of a better row of their cluster. Rows of the sources
    and ready data in `kept_whole` are not compared: they keep near duplicates."""
    compared = [i for i, row in enumerate(rows) if row["source"] not in kept_whole]
    mine = [rows[i] for i in compared]
    stage.counts["semantic_compared"] = len(mine)
    if len(mine) < 2:
        return rows
    embedder = load()
    with stage.console.progress(f"{stage.name}: embedding", len(mine), unit="rows") as bar:
        embeddings = embedder.embed([row["text"] for row in mine], lambda n: bar.advance(n, 0))
    order = ranked([row.get("quality") for row in mine], [row.get("difficulty") for row in mine])
    gone = set()
    for i, j, cosine in semantic_duplicates(embeddings, rules.filter.semantic, order, rules.seed):
        gone.add(compared[i])
        drops.add("semantic_duplicate", prompt_id=mine[i]["prompt_id"], sample_index=mine[i]["sample_index"],
                  source=mine[i]["source"], detail=f"{mine[i]['row_id']}: {cosine:.3f} like {mine[j]['row_id']}")
    return [row for i, row in enumerate(rows) if i not in gone]


def solved(prompt_id: str, samples: list[dict]) -> dict:
    """A row of difficulty.parquet: correct samples of a prompt by round, and its pass rate over all rounds."""
    rounds = sorted({s["round"] for s in samples})
    drawn = [[s["correct"] for s in samples if s["round"] == r] for r in rounds]
    if samples[0]["correct"] is None:
        return {"prompt_id": prompt_id, "source": samples[0]["source"], "rounds": rounds,
                "samples": [len(d) for d in drawn], "correct": None, "pass_rate": None}
    return {"prompt_id": prompt_id, "source": samples[0]["source"], "rounds": rounds,
            "samples": [len(d) for d in drawn], "correct": [sum(d) for d in drawn],
            "pass_rate": sum(map(sum, drawn)) / len(samples)}


def pick(prompt_id: str, source: str, samples: list[dict], pass_rate: float | None, rules: Rules,
         drops: Drops) -> tuple[list[dict], list[tuple[dict, dict]], list[dict]]:
    """One prompt's samples for SFT, its pairs (chosen, rejected), and those for losses that need no pairs.

    pass_rate: of the prompt over all rounds so far, None if nothing says what is correct. SFT takes the best of all
    `samples`; the two sides of a pair, or the samples of a list, come from the same round. Samples in none are dropped
    with the first reason that applies.
    """
    ids = {"prompt_id": prompt_id, "source": source}
    if pass_rate is not None and not rules.select.pass_rate_min <= pass_rate <= rules.select.pass_rate_max:
        for s in samples:
            drops.add("pass_rate", **ids, sample_index=s["sample_index"],
                      detail=f"{_origin(s)}: {pass_rate:.3f} over all rounds")
        return [], [], []
    fates: dict[tuple[int, int], str] = {}
    unscored, samples = [s for s in samples if s["score"] is None], [s for s in samples if s["score"] is not None]
    for s in unscored:
        error = next((error for _, error in s["values"].values() if error), "no scorer applies to it")
        drops.add("unscored", **ids, sample_index=s["sample_index"], detail=f"{_origin(s)}: {error}")
    if not samples:
        return [], [], []
    best = _best(samples, rules, fates)
    if rules.without == "sft":
        fates, best = {_id(s): fates.get(_id(s), "not_best") for s in samples}, []
    elif not best:
        top = max(s["score"] for s in samples)
        drops.add("unsolved", **ids, detail=f"best score {top:g} of {len(samples)} samples")
    pairs: dict[tuple, tuple[dict, dict]] = {}  # by tokens
    rated: list[dict] = []
    learned: set[tuple] = set()  # labeled completions, by tokens
    for r in sorted({s["round"] for s in samples}) if rules.without != "pairs" else ():
        mine = [s for s in samples if s["round"] == r]
        if rules.rows != "pairs":
            kept = _rated(mine, rules)
            if rules.rows == "labels":
                kept = [s for s in kept if tuple(s["completion_tokens"]) not in learned]
                learned |= {tuple(s["completion_tokens"]) for s in kept}
            elif len({s["score"] for s in kept}) < 2:
                drops.add("tie", **ids, detail=f"round-{r:02}: no list, {len(kept)} completions have no two scores")
                continue
            rated += kept
            continue
        found, reason, detail = _pairs(mine, rules)
        if not found:
            drops.add(reason, **ids, detail=f"round-{r:02}: no pair, {detail}")
        for pair in found:
            if pairs.setdefault(tuple(tuple(s["completion_tokens"]) for s in pair), pair) is not pair:
                drops.add("duplicate", **ids, detail=f"{_origin(pair[0])}: same pair as in an earlier round")
    used = {_id(s) for s in [*best, *rated]} | {_id(s) for pair in pairs.values() for s in pair}
    for s in samples:
        if _id(s) not in used:
            drops.add(fates[_id(s)], **ids, sample_index=s["sample_index"],
                      detail=f"{_origin(s)}: score {s['score']:g}, {s['finish']}")
    return best, list(pairs.values()), rated


def _best(samples: list[dict], rules: Rules, fates: dict) -> list[dict]:
    """The best sft_per_prompt distinct samples; `fates` gets the drop reason of every other one."""
    section, best, seen = rules.select, [], set()
    for s in sorted(samples, key=lambda s: (-s["score"], *_tie(s, rules))):
        tokens = tuple(s["completion_tokens"])
        if not s["completion"].strip():
            fates[_id(s)] = "empty"
        elif tokens in seen:
            fates[_id(s)] = "duplicate"
        elif s["finish"] != "stop" and not section.sft_cut:
            fates[_id(s)] = "cut"
        elif section.sft_min_score is not None and s["score"] < section.sft_min_score:
            fates[_id(s)] = "low_score"
        elif unfit := unfit_tokens(s["completion_tokens"], rules.filter)[0]:
            fates[_id(s)] = unfit
        elif len(best) == section.sft_per_prompt:
            fates[_id(s)] = "not_best"
        else:
            best.append(s)
        seen.add(tokens)
    return best


def _pairs(samples: list[dict], rules: Rules) -> tuple[list[tuple[dict, dict]], str, str]:
    """(pairs, reason, detail) of one prompt in one round; reason and detail say why there is no pair.

    Chosen must have stopped by itself, since a cut completion would teach not to stop, and must pass the filters.
    Rejected is the worst of the samples that score at least pair_margin less (in units of the standard deviation over
    `samples` with pair_margin_unit=z); stopped samples go first, so that
    stopping does not separate the two, and ties go by tie_break. A sample is in at most one pair.
    """
    section, distinct = rules.select, {}
    for s in sorted(samples, key=lambda s: _tie(s, rules)):
        if s["completion"].strip():
            distinct.setdefault(tuple(s["completion_tokens"]), s)
    left = list(distinct.values())  # by tie_break
    chosen = sorted((s for s in left if s["finish"] == "stop"), key=lambda s: -s["score"])
    if not chosen:
        return [], "cut", "no completion stopped by itself"
    gap = chosen[0]["score"] - min(s["score"] for s in left)
    if gap <= 0:
        return [], "tie", f"no score is below the best, {chosen[0]['score']:g}"
    margin = section.pair_margin
    if section.pair_margin_unit == "z":
        margin *= pstdev(s["score"] for s in samples)
    if gap < margin:
        return [], "margin", f"best minus worst is {gap:g}, less than {margin:g}"
    if rules.corrections:
        return _corrected(samples, margin, rules)
    reasons = [unfit_tokens(s["completion_tokens"], rules.filter)[0] for s in chosen]
    pairs: list[tuple[dict, dict]] = []
    for best in (s for s, reason in zip(chosen, reasons, strict=True) if not reason):
        worse = [s for s in left if 0 < best["score"] - s["score"] >= margin]
        if best not in left or not worse or len(pairs) == section.pairs_per_prompt:
            continue
        worst = min(worse, key=lambda s: (s["finish"] != "stop", s["score"]))
        pairs.append((best, worst))
        left = [s for s in left if s is not best and s is not worst]
    if not pairs:  # the best sample has a partner, so it did not pass the filters
        return [], reasons[0], "no completion that passes the filters is enough better"
    return pairs, "", ""


def _corrected(samples: list[dict], margin: float, rules: Rules) -> tuple[list[tuple[dict, dict]], str, str]:
    """As _pairs: correct revisions that pass the filters, each with the completion that it revises, if that is not
    correct and its score is `margin` lower."""
    drawn, pairs = {s["sample_index"]: s for s in samples if not s.get("revised_from")}, []
    for s in sorted((s for s in samples if s.get("revised_from")), key=lambda s: (-s["score"], *_tie(s, rules))):
        first = drawn.get(s["revised_from"]["sample_index"])
        if (first and s["correct"] and not first["correct"] and 0 < s["score"] - first["score"] >= margin
                and first["completion"].strip() and not unfit_tokens(s["completion_tokens"], rules.filter)[0]):
            pairs.append((s, first))
    if not pairs:
        return [], "uncorrected", "no revision corrects the completion that it revises"
    return pairs[:rules.select.pairs_per_prompt], "", ""


def _rated(samples: list[dict], rules: Rules) -> list[dict]:
    """The distinct samples of one round, best first; correct ones must pass the filters."""
    distinct: dict[tuple, dict] = {}
    for s in sorted(samples, key=lambda s: (-s["score"], *_tie(s, rules))):
        if s["completion"].strip() and not (s["correct"] and unfit_tokens(s["completion_tokens"], rules.filter)[0]):
            distinct.setdefault(tuple(s["completion_tokens"]), s)
    return list(distinct.values())


def _tie(s: dict, rules: Rules) -> tuple:
    """Sort key of samples with equal scores: a revision before what it may revise, then earlier rounds first."""
    drawn = not s.get("revised_from")
    if rules.select.tie_break == "shortest":
        return drawn, len(s["completion_tokens"]), s["round"], s["sample_index"]
    if rules.select.tie_break == "first":
        return drawn, s["round"], s["sample_index"]
    text = f"{rules.seed}:tie:{s['prompt_id']}:{s['round']}:{s['sample_index']}"
    return drawn, hashlib.blake2b(text.encode(), digest_size=16).digest()


def _id(s: dict) -> tuple[int, int]:
    return s["round"], s["sample_index"]


def _origin(s: dict) -> str:
    return f"round-{s['round']:02}"


def _sft_row(s: dict, source: str) -> dict:
    return {"row_id": f"{_origin(s)}/{s['prompt_id']}/{s['sample_index']}", "source": source, "weight": 1.0,
            "prompt_id": s["prompt_id"], "sample_index": s["sample_index"], "prompt_tokens": s["prompt_tokens"],
            "completion_tokens": s["completion_tokens"], "loss_mask": [True] * len(s["completion_tokens"]),
            "score": s["score"], "origin": _origin(s), "writer": s.get("writer")}


def _rated_row(s: dict, source: str, stops: set[int]) -> dict:
    tokens, name = s["completion_tokens"], f"{_origin(s)}/{s['prompt_id']}"
    return {"row_id": f"{name}/{s['sample_index']}", "list_id": name, "source": source, "weight": 1.0,
            "loss_mask": [True] * len(tokens), "template": [t in stops for t in tokens], "desirable": s["correct"],
            "origin": _origin(s)} | {k: s.get(k) for k in (
                "prompt_id", "sample_index", "prompt_tokens", "completion_tokens", "score", "writer", "writer_hash",
                "logp")}


def _pair_row(chosen: dict, rejected: dict, source: str, stops: set[int], judging: Judging) -> dict:
    if chosen["prompt_tokens"] != rejected["prompt_tokens"]:
        raise UserError(f"prompt {chosen['prompt_id']}: its samples of {_origin(chosen)} have different prompt "
                         "tokens; delete the folder of that sample stage to re-run it")
    row = {"row_id": f"{_origin(chosen)}/{chosen['prompt_id']}/{chosen['sample_index']}-{rejected['sample_index']}",
           "source": source, "prompt_id": chosen["prompt_id"], "prompt_tokens": chosen["prompt_tokens"], "weight": 1.0,
           "decided_by": judging.decided(source, chosen["values"], rejected["values"]), "origin": _origin(chosen),
           "margin": None}
    for side, s in (("chosen", chosen), ("rejected", rejected)):
        tokens = s["completion_tokens"]
        row |= {f"{side}_tokens": tokens, f"{side}_mask": [True] * len(tokens), f"{side}_score": s["score"],
                f"{side}_template": [t in stops for t in tokens], f"{side}_writer": s.get("writer"),
                f"{side}_writer_hash": s.get("writer_hash"), f"{side}_logp": s["logp"]}
    return row
