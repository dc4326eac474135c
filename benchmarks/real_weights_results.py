"""What `real_weights.py` and `peers.py` measured: lines of JSON, their table and their chart."""

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
#: Rows that losses are measured on.
KINDS = ("calibration", "held_out", "wikitext")


class Results:
    """The lines of OUT/results.jsonl."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / RESULTS
        self._known = {self._key(line) for line in lines([self._file])} if self._file.exists() else set()

    @staticmethod
    def _key(line: dict[str, Any]) -> tuple[str, str, int, int]:
        return line["model"], line["arm"], line["rows"], line["seed"]

    def has(self, model: str, arm: str, rows: int, seed: int) -> bool:
        return (model, arm, rows, seed) in self._known

    def add(self, line: dict[str, Any]) -> None:
        """Write a line, at once, and say it."""
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self._known.add(self._key(line))
        loss = ", ".join(f"{name} {line[name]['mean']:.2f}" for name in KINDS if name in line)
        print(f"{line['arm']} rows {line['rows']} seed {line['seed']}: {line['bits']:.3f} bits, {loss}", flush=True)


def lines(sources: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Lines of result files; of folders, of the file in them, or of the reports that `quality.py` left there."""
    for source in sources:
        reports = sorted(source.glob("seed_*/report.json"))
        for report in reports:
            yield from _of_report(report)
        file = source / RESULTS if source.is_dir() else source
        if file.exists() or not reports:
            for text in file.read_text(encoding="utf-8").splitlines():
                yield json.loads(text)


def _of_report(report: Path) -> Iterator[dict[str, Any]]:
    """The arms of `bitsmoe compare` as lines, under the names that `real_weights.py` gives them."""
    found = json.loads(report.read_text(encoding="utf-8"))
    for arm in found["arms"]:
        if "error" not in arm:
            yield {
                "model": Path(found["model"]["name"]).name,
                "arm": _arm_of_stage(arm["name"]),
                "rows": found["calibration"]["rows"],
                "seed": found["calibration"]["seed"],
                "bits": arm["measured_bits_per_expert_weight"],
                "bits_apart": arm.get("bits_apart", {}),
                "wikitext": {
                    "mean": 1000 * arm["kld_mean"],
                    "median": 1000 * arm["kld_median"],
                    "standard_error": 1000 * (arm["kld_stderr"] or 0.0),
                    "perplexity": arm["perplexity"],
                },
                "quantize_seconds": arm["quantize_seconds"],
            }


def _arm_of_stage(stage: str) -> str:
    """bitsmoe_2.125:codes=trellis of a stage of `quality.py` named trellis_bitsmoe_2_125."""
    if "_w" in stage and stage.rpartition("_w")[2].isdigit():
        return stage
    name, whole, decimals = stage.rsplit("_", 2)
    family, _, change = name.partition("_")
    options = [f":codes={family}"] + ([] if change in ("bitsmoe", "full") else [f":{change}"])
    return f"bitsmoe_{whole}.{decimals}" + "".join(options)


COLUMNS: dict[str, tuple[str, ...]] = {
    "of it bases": ("bits_apart", "bases"),
    "calibration rows": ("calibration", "mean"),
    "other rows": ("held_out", "mean"),
    "WikiText-2": ("wikitext", "mean"),
    "median": ("wikitext", "median"),
    "perplexity": ("wikitext", "perplexity"),
    "seconds": ("quantize_seconds",),
}


def grouped(found: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, list[dict[str, Any]]]]:
    """Lines by model and rows, then by arm."""
    groups: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for line in found:
        groups.setdefault((line["model"], line["rows"]), {}).setdefault(line["arm"], []).append(line)
    return groups


def table(found: Iterable[dict[str, Any]]) -> str:
    """Markdown tables, one per model and number of rows: mean over seeds ± half the range, sorted by bits."""
    text = []
    for (model, rows), arms in grouped(found).items():
        text += [f"{model}, {rows} calibration rows; KL divergence x 1000", ""]
        text += ["| " + " | ".join(("arm", "bits", "seeds", *COLUMNS)) + " |", "|" + "---|" * (3 + len(COLUMNS))]
        for arm, members in sorted(arms.items(), key=lambda item: item[1][0]["bits"]):
            cells = [arm, f"{statistics.fmean(m['bits'] for m in members):.3f}", str(len(members))]
            for path in COLUMNS.values():
                values = [value for m in members if (value := _at(m, path)) is not None]
                spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "")
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def _at(line: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = line
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def family(arm: str) -> str:
    """The line of the chart that an arm belongs to: all of one method and its options, whatever the bits."""
    name, *options = arm.split(":")
    return ":".join([name.partition("_")[0], *options])


def draw(found: Iterable[dict[str, Any]], file: Path) -> None:
    """KL divergence on the evaluation text against bits, a panel per model and number of rows."""
    from matplotlib.figure import Figure

    groups = grouped(found)
    figure = Figure(figsize=(7.2 * len(groups), 4.8), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, ((model, rows), arms) in zip(panels, groups.items(), strict=True):
        families: dict[str, list[tuple[float, float]]] = {}
        for arm, members in arms.items():
            point = (members[0]["bits"], statistics.fmean(m["wikitext"]["mean"] for m in members))
            families.setdefault(family(arm), []).append(point)
        for marker, (label, points) in zip("osDv^<>*Pphx+12348" * 4, families.items(), strict=False):
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker=marker, markersize=5, linewidth=1.2, label=label)
        axes.set_title(f"{model}, {rows} rows", fontsize=9)
        axes.set_yscale("log")
        axes.set_xlabel("bits per expert weight, everything stored counted")
        axes.set_ylabel("KL divergence to the unquantized model x 1000, WikiText-2")
        axes.grid(True, which="both", color="#e0e0e0", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)
