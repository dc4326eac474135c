"""Tables of docs/kernels.md from the lines that gpu.py wrote: `python benchmarks/gpu_report.py results`."""

import argparse
import json
from pathlib import Path

from layers import markdown


def read(path: Path) -> list[dict[str, object]]:
    """The whole lines of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def report(folder: Path) -> str:
    """All tables that the folder has lines for."""
    parts = []
    checks = read(folder / "check.jsonl")
    if checks:
        wrong = [str(line["task"]) for line in checks if not line.get("passed")]
        verdict = f"{len(checks) - len(wrong)} of {len(checks)} checks passed on {checks[0]['device']}"
        parts.append(verdict + ("; failed: " + "; ".join(wrong) if wrong else ""))
    timed = [line for line in read(folder / "decode.jsonl") if "seconds" in line]
    copy = [line for line in read(folder / "decode.jsonl") if "bytes_per_second" in line]
    if timed:
        kinds = list(dict.fromkeys(str(line["kind"]) for line in timed))
        cells = {(line["shape"], line["batch"], line["kind"]): line for line in timed}
        rows = []
        for shape, batch in dict.fromkeys((line["shape"], line["batch"]) for line in timed):
            found = [cells.get((shape, batch, kind)) for kind in kinds]
            rows.append(
                [str(shape), str(batch)] + ["" if line is None else f"{line['seconds'] * 1e6:.1f}" for line in found]
            )
        note = f"µs per layer, {timed[0]['device']}"
        if copy:
            note += f", copies at {copy[-1]['bytes_per_second'] / 1e9:.0f} GB/s"
        parts.append(f"{note}\n\n{markdown(['shape', 'batch', *kinds], rows)}")
    parts += [str(line["table"]) for line in read(folder / "prefill.jsonl") if "table" in line]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description="Tables from the lines of gpu.py.")
    parser.add_argument("folder", type=Path)
    print(report(parser.parse_args(argv).folder))


if __name__ == "__main__":
    main()
