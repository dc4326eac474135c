"""Tables of docs/kernels.md from the lines that gpu.py wrote: `python benchmarks/gpu_report.py results`."""

import argparse
import itertools
import json
from pathlib import Path

from gpu_stages import TRIED
from layers import markdown

Line = dict[str, object]


def read(path: Path) -> list[Line]:
    """The whole lines of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def check_text(lines: list[Line]) -> str:
    """How many checks passed, and which did not; of several lines of one task the last counts."""
    last = {str(line["task"]): line for line in lines if line["task"] != "compile"}
    wrong = [name for name, line in last.items() if not line.get("passed")]
    verdict = f"{len(last) - len(wrong)} of {len(last)} checks passed on {lines[0]['device']}"
    return verdict + ("; failed: " + "; ".join(wrong) if wrong else "")


def decode_text(lines: list[Line]) -> str:
    """A row per layer and batch, a column per form of the layer."""
    timed, copy = [line for line in lines if "seconds" in line], [line for line in lines if "bytes_per_second" in line]
    kinds = list(dict.fromkeys(str(line["kind"]) for line in timed))
    cells = {(line["shape"], line["batch"], line["kind"]): line for line in timed}
    bandwidth = copy[-1]["bytes_per_second"] if copy else None
    rows = []
    for shape, batch in dict.fromkeys((line["shape"], line["batch"]) for line in timed):
        found = [cells.get((shape, batch, kind)) for kind in kinds]
        ours = cells.get((shape, batch, "trellis"))
        row = [str(shape), str(batch)] + ["" if line is None else f"{line['seconds'] * 1e6:.1f}" for line in found]
        known = ours is not None and bandwidth
        rows.append([*row, f"{ours['bytes'] / ours['seconds'] / bandwidth:.0%}" if known else ""])
    note = f"µs per layer, {timed[0]['device']}"
    if bandwidth:
        note += f", copies at {bandwidth / 1e9:.0f} GB/s"
    return f"{note}\n\n{markdown(['shape', 'batch', *kinds, 'trellis, of copies'], rows)}"


def tune_text(lines: list[Line]) -> str:
    """The rules' time and the best one's, per layer, batch and kernel."""
    rows = []
    steps = dict.fromkeys((line["shape"], line["kind"], line["batch"]) for line in lines if "sizes" in line)
    for (shape, kind, batch), (kernel, names) in itertools.product(steps, TRIED.items()):
        tried = [line for line in lines if tuple(map(line.get, ("shape", "kind", "batch"))) == (shape, kind, batch)]
        timed = [line for line in tried if kernel in line]
        if not timed:
            continue
        ruled = [line for line in timed if not any(line["sizes"].values())]
        best = min(timed, key=lambda line: line[kernel])
        sizes = ", ".join(f"{name} {best['sizes'][name]}" for name in names if best["sizes"].get(name)) or "the rules"
        first = f"{ruled[0][kernel] * 1e6:.1f}" if ruled else ""
        rows.append([str(shape), str(kind), str(batch), kernel, first, f"{best[kernel] * 1e6:.1f}", sizes])
    header = ["shape", "codes", "batch", "kernel", "rules", "best", "with"]
    return "Launch sizes, µs per kernel\n\n" + markdown(header, rows)


def profile_text(lines: list[Line]) -> str:
    """A row per kernel of a step."""
    rows = []
    for line in lines:
        for name, seconds in line.get("kernels", {}).items():
            rows.append(
                [str(line["shape"]), str(line["kind"]), str(line["batch"]), f"`{name}`", f"{seconds * 1e6:.1f}"]
            )
    return "µs per kernel\n\n" + markdown(["shape", "codes", "batch", "kernel", "µs"], rows)


def quant_text(lines: list[Line]) -> str:
    """A row per operation and way."""
    timed = [line for line in lines if "operation" in line]
    rows = [[str(line[k]) for k in ("operation", "sizes", "kind")] + [f"{line['seconds']:.4g}"] for line in timed]
    return "Quantizing, seconds\n\n" + markdown(["operation", "sizes", "", "seconds"], rows)


def prefill_text(lines: list[Line]) -> str:
    """The tables as they are."""
    return "\n\n".join(str(line["table"]) for line in lines if "table" in line)


#: Stage -> its text, and the field without which there is nothing to tell.
TEXTS = {
    "check": (check_text, "task"),
    "tests": (check_text, "task"),
    "decode": (decode_text, "seconds"),
    "tune": (tune_text, "sizes"),
    "prefill": (prefill_text, "table"),
    "profile": (profile_text, "kernels"),
    "quant": (quant_text, "operation"),
}


def report(folder: Path) -> str:
    """All tables that the folder has lines for."""
    parts = []
    for stage, (text, field) in TEXTS.items():
        lines = read(folder / f"{stage}.jsonl")
        if any(field in line for line in lines):
            parts.append(text(lines))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description="Tables from the lines of gpu.py.")
    parser.add_argument("folder", type=Path)
    print(report(parser.parse_args(argv).folder))


if __name__ == "__main__":
    main()
