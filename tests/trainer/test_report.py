import json
import math
import random
import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest
import yaml
from browser import BINARY, DRIVER, chromium

from strop.trainer.reports.charts import Dot, Line, bar_chart, column_chart, dot_chart, line_chart, ticks
from strop.trainer.reports.html import write_report
from strop.trainer.run.artifacts import content_hash, list_files
from strop.trainer.run.files import write_json
from strop.trainer.run.tables import DROPS, write_table

SOURCES = ("sums", "products")
EVIL = '</div><script>alert("x")</script><b onclick=x>&amp; {{ 7*7 }}'


def make_run(run_dir, rounds=2, until=None):
    """A run directory with the files and numbers of a small finished run; it ends after stage `until`."""
    rng = random.Random(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {"name": "demo", "seed": 3, "rounds": rounds, "model": {"path": "package:some_model"},
              "evaluate": {"bootstrap": 500}, "sft": {"enabled": True}, "dpo": {"enabled": True}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    made = {}

    class Stop(Exception):
        pass

    def finish(stage, inputs, seconds, counts=None):
        files = list_files(run_dir / stage)
        made[stage] = content_hash(files)
        write_json(run_dir / stage / "manifest.json", {
            "stage": stage, "key": "k", "inputs": {n: made.get(h, h) for n, h in inputs.items()}, "config": {},
            "files": files, "counts": counts or {}, "seconds": seconds, "versions": {"strop": "0.1.0"},
            "created": f"2026-01-01T00:{len(made):02}:00+00:00"})
        if stage == until:
            raise Stop

    def table(stage, name, rows, schema=None):
        (run_dir / stage).mkdir(parents=True, exist_ok=True)
        write_table(run_dir / stage / name, pa.Table.from_pylist(rows, schema=schema))

    prompts = [{"prompt_id": f"{s}-{i:03}", "source": s, "split": "test" if i < 80 else "validation" if i < 110 else
                "train", "messages": [{"role": "system", "content": "Be brief."}, {
                    "role": "user", "content": f"What is {i} {'+' if s == 'sums' else '*'} {i}?"}],
                "answer": str(2 * i if s == "sums" else i * i)} for s in SOURCES for i in range(150)]
    prompts[0]["messages"][1]["content"] = EVIL

    def evaluate(stage, candidates):
        rows, summary = [], {}
        for name, rate in candidates.items():
            held = [p for p in prompts if p["split"] != "train"]
            mine = [{"candidate": name, "split": p["split"], "source": p["source"], "prompt_id": p["prompt_id"],
                     "completion": EVIL if n == 0 else f"The answer is {p['answer']}.", "completion_tokens": 12,
                     "finish": "stop", "score": float(ok), "correct": ok} for n, p in enumerate(held)
                    for ok in [rng.random() < rate * (1.3 if p["source"] == "sums" else 0.7)]]
            rows += mine
            summary[name] = {}
            for split in ("validation", "test"):
                part = [r for r in mine if r["split"] == split]
                by = {s: [r["correct"] for r in part if r["source"] == s] for s in SOURCES}
                summary[name][split] = {
                    "pass_rate": sum(r["correct"] for r in part) / len(part), "n": len(part), "mean_length": 12.0,
                    "cut_share": 0.05, "by_source": {s: {"pass_rate": sum(c) / len(c), "n": len(c)}
                                                     for s, c in by.items()}}
        table(stage, "results.parquet", rows)
        write_json(run_dir / stage / "summary.json", summary)

    def train(stage, metrics):
        lines = []
        for step in range(1, 41):
            values = {name: round(f(step) + rng.gauss(0, 0.02), 4) for name, f in metrics.items()}
            values["tokens_per_second"] = 1500 + rng.gauss(0, 60)
            lines.append({"stage": stage, "step": step, "time": 1.8e9 + step} | values)
        with (run_dir / "metrics.jsonl").open("a") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        folder = run_dir / stage / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(stage.encode())

    def dropped(stage, reasons):
        rows = [{"stage": stage, "prompt_id": None, "sample_index": None, "source": "sums", "reason": r, "detail": EVIL}
                for r, n in reasons.items() for _ in range(n)]
        table(stage, "drops.parquet", rows, DROPS)
        return {f"dropped/{r}": n for r, n in reasons.items()}

    try:
        table("prompts", "prompts.parquet", prompts)
        finish("prompts", {}, 2.5, {"prompts": 300} | dropped("prompts", {"duplicate": 7}))
        evaluate("baseline", {"base": 0.12})
        finish("baseline", {"prompts": "prompts", "candidates.base": "b" * 32}, 31.0, {"prompts": 220})
        promotions, weights, at = [], "b" * 32, ["baseline", "base"]
        for r in range(rounds):
            name = f"round-{r:02}"
            train_prompts = [p for p in prompts if p["split"] == "train"]
            samples = [(p, k, rng.random() < 0.2 + 0.2 * r) for p in train_prompts for k in range(8)]
            table(f"{name}/sample", "shard-00000.parquet", [
                {"prompt_id": p["prompt_id"], "sample_index": k, "completion_tokens": [1] * rng.randint(4, 40),
                 "completion": (f"It is {p['answer']}." if ok else EVIL), "finish": "stop" if ok else "length"}
                for p, k, ok in samples])
            finish(f"{name}/sample", {"prompts": "prompts", "model": weights}, 75.0,
                   {"samples": len(samples), "tokens": 27000})
            table(f"{name}/score", "scores.parquet", [
                {"prompt_id": p["prompt_id"], "sample_index": k, "score": float(ok), "correct": ok}
                for p, k, ok in samples])
            finish(f"{name}/score", {"sample": f"{name}/sample"}, 1.2)
            counts = dropped(f"{name}/select", {"tie": 12, "unsolved": 30})
            finish(f"{name}/select", {"scores": f"{name}/score"}, 0.8, {"sft rows": 50, "pairs": 44} | counts)
            train(f"{name}/sft", {"loss": lambda s: 1.5 * math.exp(-s / 15) + 0.4, "mean_token_accuracy":
                                  lambda s: 0.9 - 0.4 * math.exp(-s / 12), "grad_norm": lambda s: 1 + 2 / s,
                                  "learning_rate": lambda s: 0})
            finish(f"{name}/sft", {"select": f"{name}/select", "start": weights}, 85.0,
                   {"rows": 50, "steps": 40, "tokens": 5000})
            table(f"{name}/reference", "reference.parquet", [{"row_id": "a"}])
            finish(f"{name}/reference", {"select": f"{name}/select"}, 9.0)
            train(f"{name}/dpo", {"loss": lambda s: 0.69 * math.exp(-s / 60), "rewards/margins": lambda s: s / 50,
                                  "rewards/accuracies": lambda s: 1 - 0.5 * math.exp(-s / 10),
                                  "rewards/chosen": lambda s: s / 120, "rewards/rejected": lambda s: -s / 90,
                                  "something_new": lambda s: s})
            finish(f"{name}/dpo", {"select": f"{name}/select"}, 60.0, {"pairs": 44})
            train(f"{name}/merge", {})
            finish(f"{name}/merge", {"start": weights}, 2.0)
            (run_dir / name / "evaluate").mkdir(parents=True)
            write_json(run_dir / name / "evaluate" / "kl.json", {s: {
                "kl": 0.05 * (r + 1) * (i + 1), "stderr": 0.01, "prompts": 16, "tokens": 320}
                for i, s in enumerate(("sft", "dpo", "merge"))})
            evaluate(f"{name}/evaluate", {"sft": 0.25 + 0.1 * r, "dpo": 0.3 + 0.12 * r, "merge": 0.29 + 0.1 * r})
            stops = {"start": at} | {s: [f"{name}/evaluate", s] for s in ("sft", "dpo", "merge")}
            promotions.append({"round": r, "promoted": "dpo", "hash": "c", "candidates": stops})
            weights, at = made[f"{name}/dpo"], stops["dpo"]
            write_json(run_dir / "promotions.json", promotions)
            finish(f"{name}/evaluate", {"prompts": "prompts"}, 62.0)
        (run_dir / "final").mkdir()
        finish("final", {"weights": weights}, 0.4)
    except Stop:
        pass
    return run_dir


class Page(HTMLParser):
    """Counts tags and keeps text; fails on tags that do not close."""

    VOID = ("meta", "input", "br")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.links = [], {}, set(), "", set()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        assert not any(name.startswith("on") for name, _ in attributes)
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.links |= {attributes["href"]} if "href" in attributes else set()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    html = write_report(make_run(tmp_path_factory.mktemp("runs") / "demo")).read_text()
    return html, Page(html)


def test_a_finished_run_has_every_section(finished):
    _, page = finished
    assert {"progress", "pass", "sampling", "training", "held-out", "sampled", "time", "drops", "lineage",
            "recipe"} <= page.ids
    assert page.links == {f"#{i}" for i in page.ids if i}
    assert "Finished: 2 of 2 rounds" in page.text and "Not readable" not in page.text


def test_it_stands_alone_and_runs_no_script_but_its_own(finished):
    html, page = finished
    assert page.tags["script"] == 1 and "link" not in page.tags and "img" not in page.tags
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert "script-src 'sha256-" in html


def test_what_models_wrote_is_shown_as_text(finished):
    html, page = finished
    assert "<script>alert" not in html and "<b onclick" not in html
    assert EVIL in page.text


def test_results_are_those_of_the_artifacts(finished, tmp_path):
    _, page = finished
    run = make_run(tmp_path / "demo")
    base = json.loads((run / "baseline/summary.json").read_text())["base"]["test"]["pass_rate"]
    dpo = json.loads((run / "round-01/evaluate/summary.json").read_text())["dpo"]["test"]["pass_rate"]
    assert f"{100 * base:.1f} % → {100 * dpo:.1f} %" in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert f"{100 * (dpo - base):+.1f} points" in page.text
    assert "quantisation lost" in page.text


def test_kl_length_and_throughput_are_those_of_the_artifacts(finished):
    html, _ = finished
    assert {"KL to the start weights, nats a token", "tokens a completion, test split",
            "completions cut by length, test split"} <= set(re.findall(r"<h3>([^<]*)</h3>", html))
    assert "round 1 dpo: 0.2 (0.18 to 0.22) over 320 tokens of 16 prompts" in html  # 0.2 with 1.96 x 0.01 either way
    row = re.search(r">round-01/sample</td>(.*?)</tr>", html).group(1)
    assert re.findall(r'class="n">([^<]*)<', row)[:3] == ["75.0", "27,000", "360"]


def test_drops_stages_and_panels_are_listed(finished):
    html, page = finished
    assert re.search(r"round-00/select</td><td class=\"k\">tie</td><td class=\"k\">sums</td><td class=\"n\">12<", html)
    assert "sft rows 50 · pairs 44" in page.text and "something_new" in page.text
    assert "weights ← round-01/dpo" in page.text and "candidates.base ← from outside" in page.text


@pytest.mark.parametrize("until", ["prompts", "baseline", "round-00/sample", "round-00/dpo", "round-00/evaluate"])
def test_a_run_half_done(tmp_path, until):
    run = make_run(tmp_path / "demo", until=until)
    (run / "round-01" / "sample.partial").mkdir(parents=True)
    page = Page(write_report(run).read_text())
    assert "Not finished" in page.text and "partly made" in page.text and "Not readable" not in page.text
    assert ("pass" in page.ids) == (until not in ("prompts",))


def test_an_empty_folder_and_no_folder(tmp_path):
    assert "Not finished: 0 of 0 rounds" in Page(write_report(tmp_path).read_text()).text
    with pytest.raises(ValueError, match="no such run directory"):
        write_report(tmp_path / "none")


def test_a_damaged_artifact_is_named_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "demo", rounds=1)
    (run / "round-00/score/scores.parquet").write_bytes(b"not parquet")
    (run / "round-00/merge/manifest.json").write_text("{")
    page = Page(write_report(run).read_text())
    assert "Not readable" in page.text and "scores.parquet" in page.text and "merge/manifest.json" in page.text
    assert "pass" in page.ids and "training" in page.ids


def test_stale_promotions_do_not_stop_the_report(tmp_path):
    run = make_run(tmp_path / "demo")
    (run / "round-01/evaluate").rename(run / "round-01/evaluate.partial")
    assert "1 of 2 rounds" in Page(write_report(run).read_text()).text


def test_charts_skip_what_is_not_a_number():
    chart = line_chart([Line("a<b", [1, 2, 3, 4, 5], [1.0, None, 2.0, 3.0, math.nan]), Line("b", [1], [math.inf])])
    assert chart.count("<circle") == 1 and chart.count("<polyline") == 1 and "a&lt;b" in chart and "nan" not in chart
    assert line_chart([Line("a", [1], [None])]) == "" and bar_chart([]) == "" and dot_chart([]) == ""


def test_charts_draw_to_scale():
    bars = re.findall(r'<rect x="170" y="\d+" width="([\d.]+)"', bar_chart([("a", 10, "10"), ("b", 5, "5")]))
    assert float(bars[0]) == pytest.approx(2 * float(bars[1]), abs=0.2)
    heights = re.findall(r'height="([\d.]+)" fill', column_chart(["0", "1"], [("r", [4.0, 1.0])]))
    assert float(heights[0]) == pytest.approx(4 * float(heights[1]), abs=0.5)
    chart = dot_chart([Dot("start", "base", 0.0, 0.0, 0.1), Dot("sft", "round 0", 0.2, 0.1, 0.3, True)])
    low, high = re.findall(r'cy="([\d.]+)"', chart)
    assert float(low) > float(high)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.69, 0.6931), (-3, 250), (5, 5), (0, 0), (-2e-9, 1e-9)])
def test_ticks_enclose_the_range(low, high):
    found = ticks(low, high, 4)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8


@pytest.mark.skipif(not (BINARY and DRIVER), reason="chromium and chromedriver are not installed")
def test_in_a_browser(tmp_path):
    """Filters work by click, nothing overflows a laptop's screen, no script or policy complains, and it prints."""
    path = write_report(make_run(tmp_path / "demo"))
    with chromium(tmp_path) as page:
        page.open(path.as_uri())
        assert page.text("#sampled [data-shown]") == "120 of 120 shown"
        page.type("#sampled input", "What is 117 ")
        assert page.text("#sampled [data-shown]") == "4 of 120 shown"  # two sources, two rounds
        page.click("#sampled select[name=source] option:nth-child(2)")
        assert page.text("#sampled [data-shown]") == "2 of 120 shown"
        rows = page.run("return [...document.querySelectorAll('#sampled tbody tr')].filter(r => r.offsetParent)"
                        ".map(r => r.innerText)")
        assert len(rows) == 2 and all("What is 117 " in r for r in rows)
        page.click("#held-out select[name=state] option:nth-child(2)")
        states = page.run("return [...new Set([...document.querySelectorAll('#held-out tbody tr')]"
                          ".filter(r => r.offsetParent).map(r => r.dataset.state))]")
        assert len(states) == 1
        page.click("nav a[href='#lineage']")
        assert page.run("return document.querySelector('#lineage').getBoundingClientRect().top < innerHeight")
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        assert page.call("se/log", {"type": "browser"}) == []
        assert page.pdf().startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", page.pdf())) < 25
