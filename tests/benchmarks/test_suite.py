"""The benchmark suite's own logic: what it checks, counts and writes. No test here looks at how fast anything is."""

import importlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import in_a_fork

from benchmarks import __main__, dpo, gather, head, measure, preference, suite
from benchmarks.shapes import TINY, Head, head_inputs, heads
from benchmarks.suite import Case

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
RATES = {"copy": 1e9, "bf16": 1e12, "fp32": 1e11}
UNCAPPED = Head("tiny", 24, 130)
TINY_CASES = [
    (head, Case("head", TINY, head.TRAINED, 12)),
    (head, Case("head", TINY, head.FROZEN, 12)),
    (head, Case("head", TINY, head.SCORING, 12)),
    (gather, Case("gather", UNCAPPED, gather.FORWARD, 16)),
    (gather, Case("gather", UNCAPPED, gather.BOTH, 16)),
    (dpo, Case("dpo", UNCAPPED, "8 pairs x 3", 48)),
    (preference, Case("preference", preference.NO_HEAD, "sigmoid, 4 pairs x 256", 2048, "fp32")),
    (preference, Case("preference", preference.NO_HEAD, "ipo_norm, 4 pairs x 256", 2048, "fp32")),
]


def record(family, case, names, **options):
    return suite.measure_case(family, case, names, CPU, RATES, **{"rounds": 3, "seconds": 0.1} | options)


@pytest.mark.parametrize(("family", "case"), TINY_CASES, ids=[case.name for _, case in TINY_CASES])
def test_contenders_agree(family, case):
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    # What compiles takes seconds; the whole suite runs it.
    names = [name for name in family.CONTENDERS if not re.search("compile|cut-cross", name)]
    found = record(family, case, names)["contenders"]
    assert list(found) == names
    cpu = {"Strop", "PyTorch", "TRL", "Strop, Liger's interface", "Strop, reference from a table"} & set(names)
    cpu |= {"Liger"} if family is dpo else set()
    for name in cpu:
        assert "failed" not in found[name], (name, found[name])
        assert found[name]["seconds"] > 0 and found[name]["peak_bytes"] >= 0
    assert found["PyTorch"]["errors"] == {"loss": 0.0, "gradient": 0.0}
    for name in set(names) - cpu:
        assert "seconds" in found[name] or not re.match(r"\w*(Error|Exception)", found[name]["failed"]), found[name]


def broken_family(**contenders):
    def call(scale):
        weight = torch.ones(4, 3)
        return lambda case, x: lambda: (torch.tensor(2.0), scale * weight, weight)

    def raising(case, x):
        raise suite.Unavailable("not for this machine")

    def failing(case, x):
        return lambda: torch.ones(2) @ torch.ones(3)

    known = {
        "PyTorch": call(1.0),
        "right": call(1.01),
        "no gradient": lambda case, x: lambda: (torch.tensor(2.0),),
        "half the gradient": call(0.5),
        "NaN": call(float("nan")),
        "absent": raising,
        "failing": failing,
    }
    return SimpleNamespace(
        NAME="x",
        REFERENCE="PyTorch",
        CONTENDERS=known | contenders,
        inputs=lambda case, device: None,
        flat=lambda result, inputs: result,
        floor=lambda case: (1e6, 2e3),
    )


def test_wrong_and_absent_contenders_are_recorded_and_not_timed():
    family = broken_family()
    found = record(family, Case("x", TINY, "", 4), family.CONTENDERS)["contenders"]
    reasons = {name: f["failed"] for name, f in found.items() if "failed" in f}
    assert set(reasons) == {"no gradient", "half the gradient", "NaN", "absent", "failing"}
    assert reasons["absent"] == "not for this machine"
    assert reasons["failing"].startswith("RuntimeError: ")
    assert "gradient by 5.0e-01" in reasons["half the gradient"]
    assert all("seconds" not in found[name] for name in reasons)
    assert found["right"]["errors"]["gradient"] == pytest.approx(0.01, rel=1e-3)


def test_the_reference_is_computed_but_not_timed_unless_selected():
    family = broken_family()
    found = record(family, Case("x", TINY, "", 4), ["right", "half the gradient"])["contenders"]
    assert list(found) == ["right", "half the gradient"] and "failed" in found["half the gradient"]
    family.CONTENDERS["PyTorch"] = family.CONTENDERS["failing"]
    with pytest.raises(RuntimeError):
        record(family, Case("x", TINY, "", 4), ["right"])


def test_a_first_call_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(suite, "FIRST_CALL", 0.05)
    family = broken_family(endless=lambda case, x: lambda: time.sleep(20))
    began = time.monotonic()
    found = record(family, Case("x", TINY, "", 4), ["endless", "right"])["contenders"]
    assert time.monotonic() - began < 10
    assert found["endless"]["failed"] == "TimeoutError: its first call took over 0.05 s"
    assert found["right"]["seconds"] > 0


def test_floor_and_fraction():
    family = broken_family()
    found = record(family, Case("x", TINY, "", 4), ["PyTorch"])
    # 2e3 bytes at 1e9 a second take longer than 1e6 FLOPs at 1e12.
    assert found["floor"]["seconds"] == pytest.approx(2e-6)
    timed = found["contenders"]["PyTorch"]
    assert timed["fraction_of_floor"] == pytest.approx(2e-6 / timed["seconds"])
    flops, moved = head.floor(Case("head", Head("", 4096, 151936), head.TRAINED, 8192))
    assert flops == pytest.approx(3 * 10.2e12, rel=0.01)  # a head product there is 10.2 TFLOP
    assert moved == 2 * 4096 * 151936 * 2
    assert gather.floor(Case("gather", Head("", 0, 1000), gather.BOTH, 10)) == (0.0, 3 * 10 * 1000 * 2)
    assert gather.floor(Case("gather", Head("", 0, 1000), gather.FORWARD, 10)) == (0.0, 10 * 1000 * 2)
    assert dpo.floor(Case("dpo", Head("", 10, 100), "", 7))[0] == 4 * 2 * 7 * 10 * 100


def test_variants_differ_in_what_needs_a_gradient():
    wants = {variant: head.inputs(Case("head", TINY, variant, 4), CPU) for variant in ("trained", "frozen", "scoring")}
    found = {variant: (x.hidden.requires_grad, x.weight.requires_grad) for variant, x in wants.items()}
    assert found == {"trained": (True, True), "frozen": (True, False), "scoring": (False, False)}


def test_presets_are_the_models_own():
    shapes = {head.name: (head.hidden, head.vocab, head.softcap) for head in heads(CPU)}
    assert shapes == {
        "SmolLM2-135M": (576, 49152, None),
        "Qwen2.5-0.5B": (896, 151936, None),
        "Llama-3.2-1B": (2048, 128256, None),
        "Gemma-2-2B": (2304, 256000, 30.0),
        "Llama-3.1-8B": (4096, 128256, None),
    }
    on_gpu = [case for family in (head, gather, dpo, preference) for case in family.cases(GPU)]
    assert len({case.name for case in on_gpu}) == len(on_gpu)
    widest = head.cases(GPU)[0]
    assert (widest.tokens, widest.head.hidden, widest.head.vocab, widest.variant) == (8192, 4096, 151936, "trained")
    (case,) = dpo.cases(CPU)
    assert (case.tokens, case.head.name, case.dtype) == (8 * 2 * 256, "SmolLM2-135M", "bf16")


def test_logits_are_peaked_like_a_model():
    hidden, weight, target = head_inputs(Head("", 256, 8192), 400, CPU, torch.float32)
    probability = (hidden @ weight.T).softmax(-1)
    assert 0.2 < probability.amax(-1).mean() < 0.9
    assert 0.4 < (probability.argmax(-1) == target).float().mean() < 0.8
    again = head_inputs(Head("", 256, 8192), 400, CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again, (hidden, weight, target), strict=True))


def test_contenders_take_turns(monkeypatch):
    order, seconds = [], {"fast": 0.02, "close": 0.05, "far": 4.0}

    def sample(call, device, calls=1):
        call()
        return seconds[order[-1]]

    monkeypatch.setattr(measure, "sample", sample)
    contenders = {name: lambda name=name: order.append(name) for name in seconds}
    found = measure.interleaved(contenders, CPU, rounds=4, warmup=2)
    assert order[:9] == [*(name for name in seconds for _ in range(2)), *seconds]
    assert order[9:] == ["fast", "close", "far", "far", "close", "fast", "fast", "close", "close", "fast"]
    assert {name: len(timing.samples) for name, timing in found.items()} == {"fast": 4, "close": 4, "far": 2}
    assert found["far"].seconds == 4.0 and found["far"].iqr == 0.0
    order.clear()
    measure.interleaved(contenders, CPU, rounds=100, warmup=0, seconds=0.36, once=seconds)
    assert order.count("fast") == 5 and order.count("far") == 2


def test_short_calls_are_timed_many_at_once():
    count = 0

    def call():
        nonlocal count
        count += 1

    timing = measure.interleaved({"call": call}, CPU, rounds=3, warmup=0, once={"call": 1e-4})["call"]
    assert count == 300 and timing.seconds < 1e-3
    spread = measure.summary([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (spread.seconds, spread.iqr, spread.fastest) == (3.0, 2.0, 1.0)


def test_peak_memory():
    size = 64 << 20
    temporary = measure.peak_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    twice = measure.peak_bytes(lambda: torch.ones(size // 4).add_(1).clone(), CPU)
    nothing = measure.peak_bytes(lambda: torch.ones(8), CPU)
    assert 0.95 * size < temporary < 1.2 * size
    assert 1.95 * size < twice < 2.2 * size
    assert nothing < 0.1 * size


def test_results_are_merged_by_case(tmp_path):
    path = tmp_path / "device" / "2026-01-01.json"
    suite.merge(path, {"device": "a", "commit": "1"}, {"a": {"seconds": 1}, "b": {"seconds": 2}})
    suite.merge(path, {"device": "a", "commit": "2"}, {"b": {"seconds": 3}})
    found = json.loads(path.read_text())
    assert found["cases"] == {"a": {"seconds": 1, "commit": "1"}, "b": {"seconds": 3, "commit": "2"}}
    assert found["environment"]["commit"] == "2"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_device_and_environment():
    folder = measure.results_folder(CPU, Path("there"))
    assert folder.parent == Path("there") and re.fullmatch(r"[a-z0-9-]+-\d+-threads", folder.name)
    found = measure.environment(CPU)
    assert found["torch"] == torch.__version__ and found["device"].endswith("threads")
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", found["commit"])
    assert not [value for value in found.values() if str(value).startswith("/")]


def test_the_command(tmp_path, monkeypatch):
    def check():
        assert __main__.main(["preference/.*sigmoid", "--rounds", "2", "--results", str(tmp_path)]) == 0

    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(preference.CONTENDERS, "torch.compile")  # it takes seconds
    in_a_fork(check)
    (path,) = tmp_path.glob("*/????-??-??.json")
    cases = json.loads(path.read_text())["cases"]
    assert len(cases) == 2
    for case in cases.values():
        assert list(case["contenders"]) == ["Strop", "PyTorch"]
        assert len(case["contenders"]["Strop"]["samples"]) == 3  # never fewer than three
        assert 0 < case["contenders"]["Strop"]["fraction_of_floor"] < 1


class TestDocuments:
    @pytest.fixture
    def docs(self):
        pytest.importorskip("matplotlib")
        return importlib.import_module("benchmarks.docs")

    def test_sections(self, docs):
        text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n<!-- begin y -->\n<!-- end y -->\n"
        once = docs.replace_section(text, "x", "new \\1\n")
        assert once == "a\n<!-- begin x -->\n\nnew \\1\n\n<!-- end x -->\nb\n<!-- begin y -->\n<!-- end y -->\n"
        assert docs.replace_section(once, "x", "new \\1\n") == once
        for wrong in ("z", "x y"):
            with pytest.raises(ValueError, match="0 sections"):
                docs.replace_section(text, wrong, "")
        with pytest.raises(ValueError, match="2 sections"):
            docs.replace_section(text + text, "x", "")

    def test_from_results(self, docs, tmp_path, monkeypatch):
        monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(docs, "PAGE", tmp_path / "docs" / "performance.md")
        old, new = (tmp_path / "results" / "cpu" / f"2026-01-0{day}.json" for day in (1, 2))
        found = {
            "Strop": {"seconds": 0.5, "peak_bytes": 90 << 20, "fraction_of_floor": 0.4},
            "Liger": {"seconds": 3.0, "peak_bytes": 500 << 20, "fraction_of_floor": 0.07},
            "Liger, compiled": {"seconds": 2.0, "peak_bytes": 300 << 20, "fraction_of_floor": 0.1},
            "QuACK": {"failed": "its kernels are for GPUs"},
        }
        case = {
            "family": "dpo",
            "preset": "m",
            "variant": "v",
            "dtype": "bf16",
            "shape": {"N": 1, "D": 2, "V": 3},
            "floor": {"seconds": 0.2, "rates": RATES},
            "contenders": found,
        }
        environment = {"device": "a processor", "python": "3.12", "torch": "2.11", "trl": "not installed"}
        suite.merge(old, environment | {"commit": "1"}, {"dpo/m/v": case | {"preset": "old"}})
        suite.merge(new, environment | {"commit": "1"}, {"dpo/m/v": case})
        docs.PAGE.parent.mkdir()
        sections = "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in docs.SECTIONS)
        docs.PAGE.write_text(sections)
        docs.main([])
        page = docs.PAGE.read_text()
        assert "| Strop | 500 ms | 0.25 | 40% | 90 MiB | 0.30 |" in page
        assert "- Not run: QuACK: its kernels are for GPUs." in page
        assert "old" not in page and "**a processor**, 2026-01-02" in page
        assert "**H100**: not yet measured." in page
        assert "trl" not in page
        plot = docs.PAGE.parent / "plots" / "cpu-dpo.svg"
        first = plot.read_bytes()
        assert "(plots/cpu-dpo.svg)" in page and first.startswith(b"<?xml") and len(first) < 60_000
        docs.main([])
        assert docs.PAGE.read_text() == page and plot.read_bytes() == first

    def test_the_page_is_what_the_results_say(self, docs, tmp_path, monkeypatch):
        page = ROOT / "docs" / "performance.md"
        copy = tmp_path / page.name
        copy.write_text(page.read_text())
        monkeypatch.setattr(docs, "PAGE", copy)
        docs.main([])
        assert copy.read_text() == page.read_text(), "python -m benchmarks.docs was not run after the last results"
