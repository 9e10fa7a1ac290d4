"""The model card of a run's final weights: what it is, what made it, what was measured."""

import json
import re
from collections import Counter
from pathlib import Path

import yaml

from strop.trainer.config import Recipe
from strop.trainer.reports.reading import RunRecord
from strop.trainer.reports.statistics import percent, wilson
from strop.trainer.run.artifacts import versions
from strop.trainer.run.tables import read_table

GGUF_NOTE = (
    "The start weights were dequantised from a GGUF file. Part of any gain over them may be repair of what the "
    "quantisation lost, not something newly learned."
)


def model_card(info: dict) -> str:
    """README.md of a model folder. Everything but `name` and `base_model` may be absent.

    info:
      name: the run's; base_model: name of the start weights; base_from_gguf: bool; base_hash: their content hash;
      revision: the base's commit on the hub; revisions: {model or dataset, as the recipe names it: commit}
      license: the base's, as Hugging Face spells it ("apache-2.0"); language: list of str; tags: list of str
      recipe: the resolved recipe, a dict; seed: int
      rounds: [{"round": "round-00", "promoted": "dpo", "stages": {"sft": {"hash": .., "counts": {..}, "seconds": ..}}}]
      sources: [{"name", "origin", "verifier", "prompts"}], origin being a file's name or a dataset's
      results: [{"candidate", "split", "source", "n", "pass_rate"}], rates in [0, 1], source None for all
      gains: [{"candidate", "over", "split", "gain", "low", "high"}], rates in [-1, 1]
      hashes: {what: content hash}; versions: {package: version}
    """
    front = {"base_model": one_line(info["base_model"]), "library_name": "transformers",
             "pipeline_tag": "text-generation",
             "tags": info.get("tags") or ["strop", "rejection-sampling", "sft", "dpo"]}
    commits = info.get("revisions", {})
    if used := sorted({re.match("hf:([^/]+/[^/@:]+)", name)[1] for name in commits if name.startswith("hf:")}):
        front["datasets"] = used
    n = len(info.get("rounds", []))
    rounds = f"{n or 'some'} round{'' if n == 1 else 's'}"
    if info.get("license"):
        front = {"license": info["license"]} | front
    if info.get("language"):
        front["language"] = info["language"]
    parts = ["---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---", f"# {text(info['name'])}",
             f"Post-trained from {code(info['base_model'])}{at_commit(info.get('revision'))} with Strop: "
             f"{rounds} of sampling, scoring, SFT, DPO and merging."]
    parts += usage() + licence(info) + results(info) + lineage(info) + appendix(info)
    return "\n\n".join(parts) + "\n"


def card_info(recipe: Recipe, run: RunRecord, results: list[dict], promotions: list[dict]) -> dict:
    """What `model_card` shows of a run, except for its base model."""
    rounds = []
    for p in promotions:
        done = [(s, run.manifests[s["stage"]]) for s in run.stages
                if s["round"] == p["round"] and s["stage"] in run.manifests]
        rounds.append({"round": f"round-{p['round']:02}", "promoted": p["promoted"], "stages": {
            s["stage"].split("/")[-1]: {"hash": m["key"], "counts": m["counts"], "seconds": m["seconds"]}
            for s, m in done}})
    counts = Counter()
    for s in run.of_kind("prompts"):
        counts.update(read_table(run.dir / s["stage"] / "prompts.parquet")["source"].to_pylist())
    named = [("base" if r["round"] is None else f"round {r['round']} {r['stop']}", r) for r in results]
    return {
        "name": recipe.name, "seed": recipe.seed, "method": recipe.method,
        "recipe": recipe.model_dump(mode="json", exclude={"output_dir"}), "rounds": rounds, "versions": versions(),
        "results": [{"candidate": name, "split": split, "n": r[split]["n"], "pass_rate": r[split]["pass_rate"]}
                    for name, r in named for split in ("validation", "test")],
        "gains": [{"candidate": name, "over": over, **r[key]} for name, r in named if "part" in r
                  for key, over in (("over_base", "base"), ("part", r["before"]))],
        "sources": [{"name": s.name, "origin": s.reasoning_gym or origin(s.path), "prompts": counts[s.name],
                     "verifier": s.verifier or "reasoning_gym"} for s in recipe.data.sources] +
                   [{"name": d.name, "origin": origin(d.path)} for d in recipe.data.sft + recipe.data.preferences],
        "hashes": {f"round {p['round']} promoted": p["hash"] for p in promotions},
    }


def origin(path: str) -> str:
    """A file's name, or the whole name of a dataset on the hub."""
    return path if path.startswith("hf:") else Path(path).name


def at_commit(commit: str | None) -> str:
    return f" at commit {commit}" if commit else ""


def usage() -> list[str]:
    return ["## Use", "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\nmodel = AutoModelForCausalLM.from_pretrained(folder)\n"
            "```\n\n`folder` is the folder of this file. Prompts go through `tokenizer.apply_chat_template`."]


def licence(info: dict) -> list[str]:
    """What the parents allow; the prompts and ready data have licences of their own."""
    base = code(info["base_model"])
    said = f"The licence of the start weights {base} is not known; look it up before you pass this model on."
    if info.get("license"):
        said = f"The start weights {base} are licensed under {text(info['license'])}; its terms apply to what " \
               "derives from them."
    return ["## Licence", said + " Prompts and other training data keep licences of their own."]


def results(info: dict) -> list[str]:
    parts = []
    if info.get("results"):
        rows = [[r["candidate"], r["split"], r.get("source") or "all", f"{r['n']:,}", percent(r["pass_rate"]),
                 interval(*wilson(r["pass_rate"], r["n"]), percent)] for r in info["results"]]
        parts += ["## Results", "Pass rate with greedy decoding: share of prompts whose completion stopped by itself "
                  "with the right answer.",
                  table(["weights", "split", "source", "prompts", "pass rate", "95 % interval"], rows)]
    if info.get("gains"):
        columns = ["weights", "over", "split", "gain (signed)", "95 % interval"]
        rows = [[g["candidate"], g["over"], g["split"], signed(g["gain"]), interval(g["low"], g["high"], signed)]
                for g in info["gains"]]
        parts += ["Gains, paired by prompt:", table(columns, rows)]
    if info.get("base_from_gguf"):
        parts.append(GGUF_NOTE)
    if parts:
        parts.append("The validation split decided which weights were promoted; the test split decided nothing.")
    return parts


def lineage(info: dict) -> list[str]:
    parts = []
    if info.get("rounds"):
        rows = [[r["round"], name, short(s.get("hash")), numbers(s.get("counts", {})),
                 f"{s['seconds']:,.0f}" if "seconds" in s else "", "yes" if r.get("promoted") == name else ""]
                for r in info["rounds"] for name, s in r.get("stages", {}).items()]
        parts += ["## Lineage", table(["round", "stage", "hash", "counts", "seconds", "promoted"], rows)]
    if info.get("sources"):
        commits = info.get("revisions", {})
        rows = [[s["name"], s.get("origin", "") + at_commit(commits.get(s.get("origin"))), s.get("verifier", ""),
                 f"{s['prompts']:,}" if "prompts" in s else ""] for s in info["sources"]]
        parts += ["## Data", table(["source", "origin", "verifier", "prompts"], rows)]
    return parts


def appendix(info: dict) -> list[str]:
    parts = []
    base = {"base weights": info["base_hash"]} if info.get("base_hash") else {}
    if hashes := base | info.get("hashes", {}):
        rows = [[name, code(value)] for name, value in hashes.items()]
        parts += ["## Hashes", table(["what", "content hash"], rows, raw=1)]
    if info.get("recipe"):
        recipe = yaml.safe_dump(json.loads(json.dumps(info["recipe"])), sort_keys=False, allow_unicode=True)
        parts += ["## Recipe", f"```yaml\n{recipe.replace('```', '` ` `')}```"]
    if info.get("versions"):
        parts.append("Made with " + ", ".join(f"{k} {v}" for k, v in info["versions"].items()) + ".")
    return parts


def table(columns: list[str], rows: list[list], raw: int | None = None) -> str:
    """A Markdown table; cells are escaped, but for column `raw`."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(c if i == raw else text(str(c)) for i, c in enumerate(row)) + " |")
    return "\n".join(lines)


def one_line(value: str) -> str:
    return " ".join(str(value).split())


def text(value: str) -> str:
    """A value as Markdown shows it: no markup, one line."""
    return re.sub(r"([\\|`*_\[\]#])", r"\\\1", one_line(value)).replace("<", "&lt;").replace(">", "&gt;")


def code(value: str) -> str:
    return "`" + one_line(value).replace("`", "'") + "`"


def signed(rate: float) -> str:
    return f"{100 * rate:+.1f}"


def interval(low: float, high: float, form) -> str:
    return f"{form(low)} to {form(high)}"


def short(digest: str | None) -> str:
    return (digest or "")[:12]


def numbers(counts: dict) -> str:
    return ", ".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
                     for name, value in counts.items())
