import json
import math
import re
from html.parser import HTMLParser

import pytest
from browser import BINARY, DRIVER, chromium
from runs import EVIL, Size, make_run

from strop.trainer.errors import UserError
from strop.trainer.reports import browse, html, statistics
from strop.trainer.reports.charts import MOST, Dot, Line, bar_chart, column_chart, dot_chart, line_chart, ticks
from strop.trainer.reports.html import write_report
from strop.trainer.run.tables import find_rows, read_table, write_table


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
    assert "quantization lost" in page.text


def test_kl_length_and_throughput_are_those_of_the_artifacts(finished):
    html, _ = finished
    assert {"KL to the start weights, nats per token", "tokens per completion, test split",
            "completions cut by length, test split"} <= set(re.findall(r"<h3>([^<]*)</h3>", html))
    assert "round 1 dpo: 0.2 (0.18 to 0.22) over 320 tokens of 16 prompts" in html  # 0.2 with 1.96 x 0.01 either way
    row = re.search(r">round-01/sample</td>(.*?)</tr>", html).group(1)
    assert re.findall(r'class="n">([^<]*)<', row)[:3] == ["75.0", "27,000", "360"]


def test_drops_stages_and_panels_are_listed(finished):
    html, page = finished
    assert re.search(r"round-00/select</td><td class=\"k\">tie</td><td class=\"k\">sums</td><td class=\"n\">12<", html)
    assert "sft rows 50 · pairs 44" in page.text and "something_new" in page.text
    assert "weights ← round-01/dpo" in page.text and "candidates.base ← from outside" in page.text


def test_the_report_is_bounded_and_reads_the_texts_of_its_own_rows_only(tmp_path, monkeypatch):
    """Ten times as many prompts, long texts, steps and drops make it no larger."""
    read, found = [], []

    def recorded(path, columns=None):
        read.append(columns)
        return read_table(path, columns)

    def counted(path, columns, ids):
        found.append(find_rows(path, columns, ids))
        return found[-1]

    for module in (browse, html, statistics):
        monkeypatch.setattr(module, "read_table", recorded)
    monkeypatch.setattr(browse, "find_rows", counted)
    sizes, rows = [], []
    for factor in (1, 10):
        found.clear()
        size = Size(test=80 * factor, validation=10, train=70 * factor, k=4, words=400, steps=500 * factor,
                    drops=factor)
        report = write_report(make_run(tmp_path / str(factor), size=size)).read_text()
        sizes.append(len(report))
        rows.append(sum(map(len, found)))
    assert None not in read and not {name for columns in read for name in columns} & {
        "completion", "completion_tokens", "messages"}
    assert rows[0] == rows[1] == 120 * (1 + 4) + 150 * (1 + 1 + 3)  # a prompt with 4 samples, 1 and 3 candidates
    assert sizes[1] < 1.05 * sizes[0] < 2e6
    assert "120 of 2,800 prompts of all rounds" in report and "150 of 1,600 test prompts" in report


def test_many_sources_of_drops_and_a_long_recipe_are_counted(tmp_path):
    run = make_run(tmp_path / "demo", until="prompts")
    with (run / "config.yaml").open("a") as f:
        f.write("# more\n" * 20_000)
    table = read_table(run / "prompts/drops.parquet")
    sources = [f"s{i:03}" for i in range(300)]
    rows = [table.slice(0, 1).to_pylist()[0] | {"source": s} for s in sources for _ in range(2)]
    write_table(run / "prompts/drops.parquet", table.from_pylist(rows, schema=table.schema))
    report = write_report(run).read_text()
    assert report.count('<td class="k">duplicate</td>') == 200 and "The first 200 of 300 rows" in report
    assert "s199" in report and "s200" not in report and len(report) < 200_000
    assert re.search(r"[\d,]+ more characters are in <code>config.yaml", report)


def test_a_table_without_a_column_is_named(tmp_path):
    run = make_run(tmp_path / "demo", until="baseline")
    with pytest.raises(UserError, match=r"prompts\.parquet: has no column nothing"):
        read_table(run / "prompts/prompts.parquet", ["nothing"])
    ids = ["sums-003", "products-149", "none"]
    assert [r["prompt_id"] for r in find_rows(run / "prompts/prompts.parquet", ["answer"], ids)] == ids[:2]
    assert find_rows(run / "prompts/prompts.parquet", ["answer"], ["none"]) == []


def test_long_curves_keep_their_extremes():
    ys = [math.sin(i / 5000) for i in range(100_000)]
    ys[70_003], ys[20_000:21_200] = 9.0, [None] * 1200
    chart = line_chart([Line("a", list(range(100_000)), ys)])
    points = [tuple(map(float, p.split(","))) for line in re.findall(r'points="([^"]*)"', chart) for p in line.split()]
    assert len(points) <= MOST and len(chart) < 20 * MOST
    assert chart.count("<polyline") == 2, "the gap is left"
    top = min(points, key=lambda p: p[1])
    assert sorted(p[1] for p in points)[1] - top[1] > 50, "the spike is drawn"


@pytest.mark.parametrize("until", ["prompts", "baseline", "round-00/sample", "round-00/dpo", "round-00/evaluate"])
def test_a_run_half_done(tmp_path, until):
    run = make_run(tmp_path / "demo", until=until)
    (run / "round-01" / "sample.partial").mkdir(parents=True)
    page = Page(write_report(run).read_text())
    assert "Not finished" in page.text and "partly done" in page.text and "Not readable" not in page.text
    assert ("pass" in page.ids) == (until not in ("prompts",))


def test_an_empty_folder_and_no_folder(tmp_path):
    assert "Not finished: 0 of 0 rounds" in Page(write_report(tmp_path).read_text()).text
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "none")


def test_a_damaged_artifact_is_named_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "demo", rounds=1)
    (run / "round-00/select/judged.parquet").write_bytes(b"not parquet")
    (run / "round-00/merge/manifest.json").write_text("{")
    page = Page(write_report(run).read_text())
    assert "Not readable" in page.text and "judged.parquet" in page.text and "merge/manifest.json" in page.text
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
