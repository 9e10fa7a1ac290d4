"""Regenerate the measured parts of docs/performance.md, and its plots, from the stored results.

    python -m benchmarks.docs

A part lies between `<!-- begin NAME -->` and `<!-- end NAME -->`; SECTIONS says what makes it. What stands outside is
written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import field, measure, plots

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
NOT_YET = "not yet measured"
# Text of a GPU's column or paragraph until it is measured.
GPU = "H100"


def replace_section(text: str, name: str, body: str) -> str:
    """text with the section between the markers of `name` replaced. Raises ValueError unless there is exactly one."""
    pattern = re.compile(rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{len(pattern.findall(text))} sections {name!r}, expected one")
    return pattern.sub(lambda found: f"{found[1]}\n{body.strip()}\n\n{found[2]}", text)


def results() -> list[dict]:
    """The newest results of each device, CPUs last."""
    dated = [sorted(folder.glob("????-??-??.json")) for folder in sorted(measure.RESULTS.glob("*")) if folder.is_dir()]
    found = [
        {"date": paths[-1].stem, "folder": paths[-1].parent.name, **json.loads(paths[-1].read_text())}
        for paths in dated
        if paths
    ]
    return sorted(found, key=lambda result: "cuda" not in result["environment"])


def family_cases(result: dict, family: str) -> dict[str, dict]:
    """The family's cases by name, small heads first."""
    found = [(name, case) for name, case in result["cases"].items() if case["family"] == family]
    return dict(sorted(found, key=lambda pair: pair[1]["shape"]["D"] * pair[1]["shape"]["V"]))


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms * 1e3:.0f} µs"


def figures(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def not_run(cases: dict[str, dict]) -> str:
    """Contenders that did not run, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    ran = contenders_of(cases)
    for case in cases.values():
        for name, found in case["contenders"].items():
            if "failed" in found and name not in ran:
                where = reasons.setdefault(found["failed"], [])
                if name not in where:
                    where.append(name)
    return "\n".join(f"- Not run: {', '.join(names)}: {reason}." for reason, names in reasons.items())


def measured_on(result: dict) -> str:
    return f"**{result['environment']['device']}**, {result['date']}"


def contenders_of(cases: dict[str, dict]) -> list[str]:
    names: list[str] = []
    for case in cases.values():
        names += [name for name, found in case["contenders"].items() if "seconds" in found and name not in names]
    return names


def family_section(family: str, label: Callable[[dict], str], memory: bool = True) -> str:
    """A row per case, a column per contender: ms (fraction of the floor) and, with `memory`, peak MiB."""
    parts = []
    for result in results():
        cases = family_cases(result, family)
        if not cases:
            continue
        names, rows = contenders_of(cases), []
        for case in cases.values():
            found = [case["contenders"].get(name, {}) for name in names]
            measured = [f["seconds"] for f in found if "seconds" in f]
            if not measured:  # its contenders are listed with their reasons
                continue
            cells = []
            for f in found:
                if "seconds" not in f:
                    cells.append("")
                    continue
                cell = f"{figures(f['seconds'] * 1e3)} ({f['fraction_of_floor']:.0%})"
                cell = f"**{cell}**" if f["seconds"] == min(measured) else cell
                cells.append(f"{cell}, {figures(f['peak_bytes'] / 2**20)}" if memory else cell)
            rows.append([label(case), figures(case["floor"]["seconds"] * 1e3), *cells])
        parts += [measured_on(result), table(["", "floor", *names], rows), not_run(cases)]
    if not any("cuda" in result["environment"] for result in results()):
        parts.append(f"**{GPU}**: {NOT_YET}.")
    return "\n\n".join(part for part in parts if part)


def head_label(case: dict) -> str:
    shape = case["shape"]
    return f"{case['preset']}, {case['variant']}: N={shape['N']} D={shape['D']} V={shape['V']}"


def gather_label(case: dict) -> str:
    return f"{case['variant']}: N={case['shape']['N']} V={case['shape']['V']}"


def dpo_section() -> str:
    parts = []
    for result in results():
        for name, case in family_cases(result, "dpo").items():
            found = {name: f for name, f in case["contenders"].items() if "seconds" in f}
            peers = [f for name, f in found.items() if name.startswith("Liger")]
            if not peers:
                continue
            rival = min(peers, key=lambda f: f["seconds"])
            rows = [
                [
                    name,
                    milliseconds(f["seconds"]),
                    f"{f['seconds'] / rival['seconds']:.2f}",
                    f"{f['fraction_of_floor']:.0%}",
                    mebibytes(f["peak_bytes"]),
                    f"{f['peak_bytes'] / rival['peak_bytes']:.2f}",
                ]
                for name, f in sorted(found.items(), key=lambda pair: pair[1]["seconds"])
            ]
            header = ["", "time", "of Liger's time", "of the floor", "peak memory", "of Liger's memory"]
            shape = case["shape"]
            title = f"{case['preset']}, {case['variant']}, D={shape['D']} V={shape['V']} {case['dtype']}"
            parts += [f"{measured_on(result)}: {title}", table(header, rows), not_run({name: case})]
        plot = plots.dpo(result, PAGE.parent / "plots")
        if plot:
            parts.append(f"![Time and peak memory of the DPO loss]({plot.relative_to(PAGE.parent).as_posix()})")
    if not any("cuda" in result["environment"] for result in results()):
        parts.append(f"**{GPU}**: {NOT_YET}.")
    return "\n\n".join(part for part in parts if part)


def head_section() -> str:
    parts = [family_section("head", head_label)]
    for result in results():
        plot = plots.head(result, PAGE.parent / "plots")
        if plot:
            parts.append(f"![Time of the head by model and peer]({plot.relative_to(PAGE.parent).as_posix()})")
    return "\n\n".join(parts)


def machines_section() -> str:
    parts = []
    for result in results():
        env = result["environment"]
        rates = next(iter(result["cases"].values()))["floor"]["rates"]
        spoken = [f"{name} matrix products {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items() if name != "copy"]
        spoken.append(f"copy {rates['copy'] / 1e9:,.1f} GB/s")
        versions = [f"{key} {env[key]}" for key in ("python", *measure.PACKAGES) if env.get(key, "not") != "not"]
        versions = [text for text in versions if not text.endswith("not installed")]
        parts.append(f"- {measured_on(result)}: {', '.join(spoken)}. {', '.join(versions)}.")
    return "\n".join(parts)


def train_step_section() -> str:
    parts = []
    for path in sorted(measure.RESULTS.glob("*/train_step.json")):
        result = json.loads(path.read_text())
        cases = list(result["cases"].values())
        for model in dict.fromkeys(case["model"] for case in cases):
            rows = [train_step_row(case) for case in cases if case["model"] == model]
            header = ["", "peer", "Strop, s", "TRL, s", "speedup", "FLOP ratio", "Strop, GiB", "TRL, GiB", "MFU"]
            parts += [f"{measured_on(result)}, {model}", table(header, rows)]
        plot = plots.train_step(result, PAGE.parent / "plots" / f"{path.parent.name}-train-step.svg")
        parts.append(f"![Seconds per step, Strop and TRL]({plot.relative_to(PAGE.parent).as_posix()})")
    if not any("h100" in path.parent.name for path in measure.RESULTS.glob("*/train_step.json")):
        parts.append(f"**{GPU}**: {NOT_YET}.")
    return "\n\n".join(parts)


def train_step_row(case: dict) -> list[str]:
    ours, theirs = case["strop"], case["peer"]
    return [
        f"{case['task'].upper()} {case['prompt']}:{case['completion']}"
        f"{', compiled' if case.get('of') == 'strop compiled' else ''}",
        case["side"].replace("trl", "TRL,"),
        *(figures(side["seconds"]) for side in (ours, theirs)),
        f"**{theirs['seconds'] / ours['seconds']:.1f}**",
        f"{case['flop_ratio']:.1f}",
        *(f"{side['peak_bytes'] / 2**30:.1f}" for side in (ours, theirs)),
        f"{case['flops'] / ours['seconds'] / case['matmul_rate']:.0%}",
    ]


def step_profile_section() -> str:
    parts = []
    for path in sorted(measure.RESULTS.glob("*/step_profile.json")):
        result = json.loads(path.read_text())
        kinds = list(dict.fromkeys(kind for case in result["cases"].values() for kind in case["seconds"]))
        rows = []
        for name, case in result["cases"].items():
            shares = [f"{case['seconds'].get(kind, 0) / case['step_seconds']:.0%}" for kind in kinds]
            label = name.split(", ")[1] + (", compiled" if name.endswith(", compiled") else "")
            rows.append([label, figures(case["step_seconds"]), *shares, figures(case["floor_seconds"])])
        models = ", ".join(dict.fromkeys(name.split(", ")[0] for name in result["cases"]))
        parts += [f"{measured_on(result)}, {models}", table(["", "step, s", *kinds, "floor, s"], rows)]
    if not any("h100" in path.parent.name for path in measure.RESULTS.glob("*/step_profile.json")):
        parts.append(f"**{GPU}**: {NOT_YET}.")
    return "\n\n".join(parts)


def sampling_section() -> str:
    """A row per case, a column per contender: tokens/s (fraction of the floor), GiB."""
    parts = []
    for path in sorted(measure.RESULTS.glob("*/sampling.json")):
        result = json.loads(path.read_text())
        cases = result["cases"]
        names, rows = list(dict.fromkeys(n for case in cases.values() for n in case["contenders"])), []
        names = [n for n in names if any("failed" not in case["contenders"].get(n, {}) for case in cases.values())]
        for name, case in cases.items():
            found = [case["contenders"].get(n, {}) for n in names]
            rows.append([name, *(f"{figures(f['tokens_per_second'])} ({f['fraction_of_floor']:.0%}), "
                                 f"{f['peak_bytes'] / 2**30:.1f}" if "tokens_per_second" in f else "" for f in found)])
        failed = {f"- Not run: {n}: {f['failed']}." for case in cases.values()
                  for n, f in case["contenders"].items() if "failed" in f}
        parts += [measured_on(result), table(["", *names], rows), "\n".join(sorted(failed))]
    return "\n\n".join(part for part in parts if part) or f"{NOT_YET[0].upper()}{NOT_YET[1:]}."


def sampling_on_gpu_section() -> str:
    parts = []
    for path in sorted(measure.RESULTS.glob("*/sample.json")):
        result, rows = json.loads(path.read_text()), []
        for name, case in result["cases"].items():
            ours, theirs = case["strop"], case.get("transformers")
            rows.append([name, figures(ours["tokens"] / ours["seconds"]), figures(ours["step_seconds"] * 1e3),
                         f"{ours['floor_seconds'] / ours['step_seconds']:.0%}",
                         figures(theirs["step_seconds"] * 1e3) if theirs else ""])
        header = ["", "tokens/s", "decode step, ms", "of the floor's rate", "transformers' step, ms"]
        parts += [f"{measured_on(result)}, Llama-3.2-1B", table(header, rows)]
    return "\n\n".join(parts)


def field_section() -> str:
    parts = []
    for path in sorted(measure.RESULTS.glob("*/field.json")):
        result = json.loads(path.read_text())
        for case in result["cases"].values():
            parts += [f"{measured_on(result)}: {field.title(case)}", table(field.HEADER, field.lines(case))]
    if not any("h100" in path.parent.name for path in measure.RESULTS.glob("*/field.json")):
        parts.append(f"**{GPU}**: {NOT_YET}.")
    return "\n\n".join(parts)


def dedup_section() -> str:
    parts = []
    for path in sorted(measure.RESULTS.glob("*/dedup.json")):
        result = json.loads(path.read_text())
        rows = [[f"{case['case']}, {case['rows']:,}", f"{case['seconds']:.1f}", mebibytes(case["peak_bytes"]),
                 f"{case['found']:,}"] for case in result["cases"].values()]
        parts += [measured_on(result), table(["prompts", "seconds", "peak memory", "found"], rows)]
    return "\n\n".join(parts)


def reports_section() -> str:
    parts = []
    for path in sorted(measure.RESULTS.glob("*/reports.json")):
        result = json.loads(path.read_text())
        rows = [[case["what"], f"{case['seconds']:.1f}", mebibytes(case["peak_bytes"]), f"{case['bytes'] / 1e6:.1f} MB"]
                for case in result["cases"].values()]
        parts += [measured_on(result), table(["", "seconds", "peak memory", "size"], rows)]
    return "\n\n".join(parts)


SECTIONS: dict[str, Callable[[], str]] = {
    "machines": machines_section,
    "head": head_section,
    "gather": lambda: family_section("gather", gather_label),
    "dpo": dpo_section,
    "preference": lambda: family_section("preference", lambda case: case["variant"], memory=False),
    "attention": lambda: family_section("attention", lambda case: f"{case['preset']}, {case['variant']}"),
    "train-step": train_step_section,
    "field": field_section,
    "step-profile": step_profile_section,
    "sampling": sampling_section,
    "sampling-gpu": sampling_on_gpu_section,
    "dedup": dedup_section,
    "reports": reports_section,
}


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    text = PAGE.read_text()
    for name, section in SECTIONS.items():
        text = replace_section(text, name, section())
    PAGE.write_text(text)
    print(f"{len(SECTIONS)} sections of {PAGE.relative_to(PAGE.parent.parent)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
