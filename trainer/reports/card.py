"""The model card of a run's final weights: license, results, lineage, data and recipe."""

import json
import re
from collections import Counter
from pathlib import Path

import jinja2
import yaml

from strop.trainer.config import Recipe
from strop.trainer.reports.reading import RunRecord
from strop.trainer.reports.statistics import percent, wilson
from strop.trainer.run.artifacts import versions
from strop.trainer.run.tables import read_table

TEMPLATES = Path(__file__).parent / "templates"
GGUF_NOTE = (
    "The start weights were dequantized from a GGUF file. Part of any gain over them may be repair of what the "
    "quantization lost, not something newly learned."
)


def model_card(info: dict) -> str:
    """README.md of a model folder. Everything except `name` and `base_model` is optional.

    info:
      name: the run's; base_model: name of the start weights; base_from_gguf: bool; base_hash: their content hash;
      revision: the base's commit on the hub; revisions: {model or dataset, as in the recipe: commit}
      license: of the base, in Hugging Face's spelling ("apache-2.0"); language: list of str; tags: list of str
      recipe: the resolved recipe, a dict; seed: int
      rounds: [{"round": "round-00", "promoted": "dpo", "stages": {"sft": {"hash": .., "counts": {..}, "seconds": ..}}}]
      sources: [{"name", "origin", "verifier", "prompts"}], origin: name of a file or dataset
      results: [{"candidate", "split", "source", "n", "pass_rate"}], rates in [0, 1], source None for all
      gains: [{"candidate", "over", "split", "gain", "low", "high"}], rates in [-1, 1]
      hashes: {what: content hash}; versions: {package: version}
    """
    front = {"license": info.get("license"), "base_model": one_line(info["base_model"]),
             "library_name": "transformers", "pipeline_tag": "text-generation",
             "tags": info.get("tags") or ["strop", "rejection-sampling", "sft", "dpo"],
             "language": info.get("language"), "datasets": sorted(
                 {found[1] for name in info.get("revisions", {}) if (found := re.match("hf:([^/]+/[^/@:]+)", name))})}
    steps = list(dict.fromkeys(stage for r in info.get("rounds", []) for stage in r["stages"])) or ["training"]
    base = {"base weights": info["base_hash"]} if info.get("base_hash") else {}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": text, "code": code, "percent": percent, "signed": lambda v: f"{100 * v:+.1f}",
                            "counts": numbers}
    return environment.get_template("card.md.j2").render({"rounds": []} | info | {
        "front": dump({k: v for k, v in front.items() if v}), "recipe": dump(info.get("recipe") or {}, "```"),
        "hashes": base | info.get("hashes", {}), "gguf_note": GGUF_NOTE, "wilson": wilson,
        "steps": ", ".join(steps[:-1]) + (" and " if steps[1:] else "") + text(steps[-1])})


def dump(value: dict, without: str = "") -> str:
    """YAML of plain data, "" for an empty dict. Occurrences of `without` are split with spaces."""
    found = yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True) if value else ""
    return found.replace(without, " ".join(without)) if without else found


def card_info(recipe: Recipe, run: RunRecord, results: list[dict], promotions: list[dict]) -> dict:
    """The `info` of `model_card` for a run, without the keys of its base model."""
    rounds = []
    for p in promotions:
        done = {s["stage"].split("/")[-1]: run.manifests[s["stage"]] for s in run.stages
                if s["round"] == p["round"] and s["stage"] in run.manifests}
        rounds.append({"round": f"round-{p['round']:02}", "promoted": p["promoted"], "stages": {
            name: {"hash": m["key"], "counts": m["counts"], "seconds": m["seconds"]} for name, m in done.items()}})
    counts = Counter()
    for s in (run.of_kind("prompts") + run.of_kind("synthetic prompts"))[-1:]:  # the last one holds those before it
        counts.update(read_table(run.dir / s["stage"] / "prompts.parquet", ["source"])["source"].to_pylist())
    named = [("base" if r["round"] is None else f"round {r['round']} {r['stop']}", r) for r in results]
    return {
        "name": recipe.name, "seed": recipe.seed, "method": recipe.method,
        "recipe": recipe.model_dump(mode="json", exclude={"output_dir"}), "rounds": rounds, "versions": versions(),
        "results": [{"candidate": name, "split": split, "n": r[split]["n"], "pass_rate": r[split]["pass_rate"]}
                    for name, r in named for split in ("validation", "test")],
        "gains": [{"candidate": name, "over": over, **r[key]} for name, r in named if "part" in r
                  for key, over in (("over_base", "base"), ("part", r["before"]))],
        "sources": [{"name": s.name, "prompts": counts[s.name], "origin": s.reasoning_gym or origin(s.path)
                     if s in recipe.data.sources else f"synthetic, after {recipe.seed_source.name}",
                     "verifier": ", ".join(scorer.name for scorer in s.scoring)} for s in recipe.sources] +
                   [{"name": d.name, "origin": origin(d.path)} for d in recipe.data.sft + recipe.data.preferences],
        "hashes": {f"round {p['round']} promoted": p["hash"] for p in promotions},
    }


def origin(path: str) -> str:
    """A file's name, or the whole name of a dataset on the hub."""
    return path if path.startswith("hf:") else Path(path).name


def one_line(value: str) -> str:
    return " ".join(str(value).split())


def text(value: str) -> str:
    """A value as one line of Markdown, without markup."""
    return re.sub(r"([\\|`*_\[\]#])", r"\\\1", one_line(value)).replace("<", "&lt;").replace(">", "&gt;")


def code(value: str) -> str:
    return "`" + one_line(value).replace("`", "'") + "`"


def numbers(counts: dict) -> str:
    """Counts as a table cell."""
    return text(", ".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
                          for name, value in counts.items()))
