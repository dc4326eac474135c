"""Loss per stored byte: BitsMoE at several budgets against GPTQ and round-to-nearest, over several calibration seeds.

    python benchmarks/quality.py --out DIR                      the embedded demo model
    python benchmarks/quality.py --testbed DIR --out DIR        bookmoe and its texts
    python benchmarks/quality.py --model M --calibration C --eval-text T --out DIR      any other
    python benchmarks/quality.py --ablate --budgets 2.125 …     one stage per ablation of the method, or of some of them
    python benchmarks/quality.py --codes scalar,trellis …       both families of codes side by side

Every arm is a stage of a generated recipe and runs through `bitsmoe compare`: own process, same rows, checkpoint saved
and loaded again, bits measured on the files. Prints one table (mean over seeds, spread as ± half the range) and writes
it with a plot to DIR. Rerunning continues where an interrupted run stopped.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from bitsmoe_modifier.comparison.runner import CompareSettings, compare
from bitsmoe_modifier.sources.demo import demo_asset

_EXPERTS = r"re:.*[.]experts[.]\d+[.](gate|up|down)_proj$"

#: Changes of the default recipe, each an arm of --ablate. Compared at equal measured bits.
ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "no_bases": {"input_basis": "none", "output_basis": "none"},
    "both_bases": {"input_basis": "spectral", "output_basis": "spectral"},
    "input_basis_only": {"input_basis": "spectral", "output_basis": "none"},
    "output_basis_only": {"input_basis": "none", "output_basis": "spectral"},
    "bases_16_bit": {"basis_bits": 16},
    "bases_8_bit": {"basis_bits": 8},
    "no_feedback": {"error_feedback": False},
    "no_compensation": {"compensation": False},
    "no_refinement": {"refine_passes": 0},
    "two_refinements": {"refine_passes": 2},
    "layer_scope": {"scope": "layer"},
    "widths_0246": {"bit_widths": [0, 2, 4, 6]},
    "widths_01234": {"bit_widths": [0, 1, 2, 3, 4]},
}


def gptq(bits: int, group: int) -> dict[str, Any]:
    """Stock GPTQ with its default settings, symmetric, on the experts."""
    return {"GPTQModifier": {"config_groups": {"experts": _scheme(bits, group)}}}


def rtn(bits: int, group: int) -> dict[str, Any]:
    """Round-to-nearest by llm-compressor's QuantizationModifier, symmetric, on the experts."""
    return {"QuantizationModifier": {"config_groups": {"experts": _scheme(bits, group)}}}


def autoround(bits: int, group: int) -> dict[str, Any]:
    """llm-compressor's AutoRound with its default settings, but one row per step and without torch.compile."""
    fields = {"batch_size": 1, "enable_torch_compile": False, "config_groups": {"experts": _scheme(bits, group)}}
    return {"AutoRoundModifier": fields}


def _scheme(bits: int, group: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {"targets": [_EXPERTS], "weights": weights}


#: What each method of --baselines is run at.
BASELINES: dict[str, tuple[Callable[[int, int], dict[str, Any]], tuple[int, ...]]] = {
    "gptq": (gptq, (2, 3, 4)),
    "rtn": (rtn, (2, 3, 4)),
    "autoround": (autoround, (2,)),
}


def recipe(
    budgets: list[float],
    baselines: Sequence[str],
    changes: Sequence[str] | None,
    group: int = 128,
    codes: Sequence[str] = ("trellis",),
) -> dict[str, Any]:
    """The stages of the benchmark, by arm name; changes: names of `ABLATIONS`, None for the default recipe alone."""
    arms: dict[str, dict[str, Any]] = {}
    for method in baselines:
        made, widths = BASELINES[method]
        arms.update({f"{method}_w{bits}": made(bits, group) for bits in widths})
    for budget in budgets:
        label = str(budget).replace(".", "_")
        for family in codes:
            for name, change in [("bitsmoe", {})] if changes is None else [(c, ABLATIONS[c]) for c in changes]:
                arms[f"{family}_{name}_{label}"] = {"BitsMoEModifier": {"bits": budget, "codes": family, **change}}
    return {f"{name}_stage": {"quant_modifiers": modifiers} for name, modifiers in arms.items()}


FIGURES = {
    "measured_bits_per_expert_weight": ("bits", 1.0, 4),
    "kld_mean": ("KLD x1000", 1000.0, 3),
    "kld_median": ("median", 1000.0, 3),
    "kld_p90": ("p90", 1000.0, 3),
    "perplexity": ("perplexity", 1.0, 3),
    "top1_agreement": ("top-1 %", 100.0, 2),
    "accuracy": ("choices %", 100.0, 1),
    "quantize_seconds": ("seconds", 1.0, 0),
}


def summarize(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm: mean and half range of every figure over the reports' seeds."""
    rows = []
    for name in [arm["name"] for arm in reports[0]["arms"]]:
        arms = [next(a for a in report["arms"] if a["name"] == name) for report in reports]
        errors = [arm["error"] for arm in arms if "error" in arm]
        row: dict[str, Any] = {"name": name, "seeds": len(arms)}
        if errors:
            row["error"] = errors[0]
        else:
            for figure in FIGURES:
                values = [_value(arm, figure) for arm in arms]
                row[figure] = {"mean": statistics.fmean(values), "half_range": (max(values) - min(values)) / 2}
        rows.append(row)
    return rows


def _value(arm: dict[str, Any], figure: str) -> float:
    """A figure of an arm; the accuracy of the one task, NaN without tasks."""
    if figure != "accuracy":
        return arm[figure]
    return next((found["acc"] for found in arm.get("accuracy", {}).values()), float("nan"))


def table(rows: list[dict[str, Any]], reference: float, floor: float) -> str:
    """The rows as a Markdown table."""
    heads = ["method", *(label for label, _, _ in FIGURES.values())]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | failed: {row['error'].splitlines()[-1][:80]} |" + " |" * (len(heads) - 2))
            continue
        cells = [row["name"]]
        for figure, (_, scale, digits) in FIGURES.items():
            mean, spread = scale * row[figure]["mean"], scale * row[figure]["half_range"]
            cells.append(f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if row["seeds"] > 1 else ""))
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(f"Unquantized perplexity {reference:.3f}; noise floor of the KL divergence x1000: {1000 * floor:.4f}.")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL divergence against measured bits, one line per method, bars for the seeds' range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            families.setdefault(row["name"].split("_w")[0].rsplit("_", 2)[0], []).append(row)
    for marker, (family, members) in zip("osDv^<>*Pphx+", families.items(), strict=False):
        members.sort(key=lambda row: row["measured_bits_per_expert_weight"]["mean"])
        axes.errorbar(
            [m["measured_bits_per_expert_weight"]["mean"] for m in members],
            [1000 * m["kld_mean"]["mean"] for m in members],
            yerr=[1000 * m["kld_mean"]["half_range"] for m in members],
            marker=marker,
            markersize=5,
            linewidth=1.2,
            capsize=2,
            label=family,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits per expert weight, everything stored counted")
    axes.set_ylabel("KL divergence to the unquantized model x 1000")
    axes.grid(True, which="both", color="#e0e0e0", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def run(settings: CompareSettings, stages: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    """Run the comparison once per seed and write table, figures and plot to ``settings.out``."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    recipe_file = out / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(stages, sort_keys=False))
    reports = [
        compare(replace(settings, recipe=str(recipe_file), seed=seed, out=str(out / f"seed_{seed}"))) for seed in seeds
    ]
    rows = summarize(reports)
    text = table(rows, reports[0]["reference"]["perplexity"], reports[0]["noise_floor"]["kld_mean"])
    (out / "quality.md").write_text(text + "\n")
    (out / "quality.json").write_text(json.dumps(rows, indent=2))
    draw(rows, out / "quality.png")
    print(text)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, metavar="DIR", help="folder with bookmoe and its texts")
    parser.add_argument("--model", metavar="DIR|ID", help="dense model (default: bookmoe, or the demo model)")
    parser.add_argument("--calibration", metavar="FILE", help="calibration text (default: that of the model)")
    parser.add_argument("--eval-text", metavar="FILE", help="evaluation text (default: that of the model)")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--budgets", default="1.25,1.6,2.0,2.125,2.5,3.0", help="measured bits, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="calibration seeds, comma-separated")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows of 256 tokens")
    parser.add_argument("--eval-rows", type=int, default=256, help="evaluation rows of 256 tokens; 0: all")
    parser.add_argument("--task-items", type=int, default=0, help="multiple-choice items; 0: none are measured")
    parser.add_argument("--group", type=int, default=128, help="weights per scale of GPTQ and round-to-nearest")
    parser.add_argument("--baselines", default=",".join(BASELINES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--no-baselines", action="store_true", help="BitsMoE only")
    parser.add_argument("--codes", default="trellis", help="families of codes, comma-separated (default: trellis)")
    parser.add_argument(
        "--ablate",
        nargs="?",
        const=",".join(ABLATIONS),
        metavar="NAME,…",
        help=f"one stage per ablation and budget; default: all of {', '.join(ABLATIONS)}",
    )
    args = parser.parse_args()
    budgets, codes = [float(b) for b in args.budgets.split(",")], args.codes.split(",")
    baselines = [] if args.no_baselines else args.baselines.split(",")
    known = {
        "--baselines": (baselines, BASELINES),
        "--ablate": (args.ablate.split(",") if args.ablate else [], ABLATIONS),
    }
    for option, (names, all_names) in known.items():
        if unknown := set(names) - set(all_names):
            parser.error(f"{option}: {', '.join(sorted(unknown))}; there are {', '.join(all_names)}")
    changes = args.ablate.split(",") if args.ablate else None
    stages = recipe(budgets, baselines, changes, args.group, codes)
    bed = args.testbed
    settings = CompareSettings(
        model=args.model or (str(bed / "bookmoe") if bed else demo_asset("docmoe")),
        recipe="",
        calibration=args.calibration or (str(bed / "calibration.txt") if bed else demo_asset("docmoe_calibration.txt")),
        eval_text=args.eval_text or (str(bed / "wikitext2-test.txt") if bed else demo_asset("docmoe_heldout.txt")),
        out=args.out,
        samples=args.samples,
        eval_rows=args.eval_rows,
        tasks=(str(bed / "continuations-wikitext.jsonl") if bed else "continuations",) if args.task_items else (),
        task_items=args.task_items,
    )
    run(settings, stages, [int(s) for s in args.seeds.split(",")])


if __name__ == "__main__":
    main()
