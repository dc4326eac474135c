"""What a comparison's figures say, in sentences: who beats whom, how accuracies differ, how all of it was measured."""

import math
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]


def is_bitsmoe(run: Run) -> bool:
    """Whether the run's experts are BitsMoE's."""
    return "BitsMoEModifier" in run["modifiers"]


def is_gptq(run: Run) -> bool:
    """Whether the run's experts are GPTQ's."""
    return "GPTQModifier" in run["modifiers"] and not is_bitsmoe(run)


def verdict(run: Run, rival: Run) -> str:
    """How one run's KL divergence compares with another's, in a sentence."""
    own, other = run["kld_mean"], rival["kld_mean"]
    size = f"{run['name']} ({run['measured_bits_per_expert_weight']:.2f} bits per expert weight)"
    whom = f"{rival['name']} ({rival['measured_bits_per_expert_weight']:.2f} bits)"
    figures = f"{1000 * own:.2f} against {1000 * other:.2f} × 10⁻³ nats"
    if own < other:
        said = f"{size} has a KL divergence {_percent(1 - own / other)} lower than {whom}: {figures}"
    elif own == other:
        said = f"{size} has the same KL divergence as {whom}: {figures}"
    else:
        said = f"{size} misses {whom} by {_percent(own / other - 1)} in KL divergence: {figures}"
    errors = [e for e in (run.get("kld_stderr"), rival.get("kld_stderr")) if e is not None]
    if abs(own - other) < 2 * math.hypot(*errors):
        said += ", a difference within the sampling error of this text"
    return said + "."


def headline(runs: Sequence[Run]) -> str:
    """BitsMoE at 2.0 bits against GPTQ at W3 where both are there; else the best pair of the two methods."""
    ours, theirs = [a for a in runs if is_bitsmoe(a)], [a for a in runs if is_gptq(a)]
    if not ours or not theirs:
        return "No pair of a BitsMoE and a GPTQ run was measured, so there is nothing to compare."
    run = min(ours, key=lambda a: abs((a["nominal_bits"] or math.inf) - 2.0))
    three = [a for a in theirs if a["nominal_bits"] == 3]
    return verdict(run, three[0] if three else next_larger(run, theirs))


def next_larger(run: Run, rivals: Sequence[Run]) -> Run:
    """The smallest rival that takes at least as many bits; the largest where none does."""
    by_bits = sorted(rivals, key=lambda a: a["measured_bits_per_expert_weight"])
    # half a hundredth of a bit is the size of headers, not of a method
    bits = run["measured_bits_per_expert_weight"] - 0.005
    return next((r for r in by_bits if r["measured_bits_per_expert_weight"] >= bits), by_bits[-1])


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %" if ratio >= 0.1 else f"{100 * ratio:.1f} %"


def against_gptq(runs: Sequence[Run]) -> list[str]:
    """Every BitsMoE run against the GPTQ run of the next larger size."""
    rivals = [run for run in runs if is_gptq(run)]
    return [verdict(run, next_larger(run, rivals)) for run in runs if is_bitsmoe(run) and rivals]


def accuracies(reference: Run, runs: Sequence[Run]) -> list[str]:
    """Every run's accuracy on every task, with the paired difference to the unquantized model."""
    lines = []
    for task, own in reference.get("accuracy", {}).items():
        lines.append(
            f"{task} ({own['metric']}, {own['items']} items): unquantized {_points(own['acc'], own['stderr'])}"
        )
        for run in runs:
            entry = run.get("accuracy", {}).get(task)
            if entry is not None:
                line = f"{task}: {run['name']} {_points(entry['acc'], entry['stderr'])}"
                lines.append(line + _difference(entry.get("paired")))
    return lines


def _difference(paired: Run | None) -> str:
    if paired is None:
        return ""
    said = f", a difference of {_points(paired['difference'], paired['stderr'], '+')} points"
    if paired["p_value"] is None:
        return said
    return (
        f"{said} ({paired['only_model']} items won, {paired['only_reference']} lost; "
        f"McNemar's p = {paired['p_value']:.2g})"
    )


def _points(value: float, stderr: float | None, sign: str = "") -> str:
    """A share in per cent with its standard error."""
    shown = f"{100 * value:{sign}.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")
    return shown if sign else f"{shown} %"


def how_measured(report: Run) -> list[str]:
    """Data, arithmetic and noise floor."""
    calibration, evaluation, noise = report["calibration"], report["evaluation"], report["noise_floor"]
    experts = "every token through every expert" if calibration["all_experts"] else "routed tokens only"
    return [
        f"Calibration: {calibration['rows']} rows of {calibration['seq_len']} tokens from {calibration['source']}, "
        f"seed {calibration['seed']}, {experts}; the same rows, and causal attention, for every run.",
        f"Evaluation: {evaluation['rows']} rows of {evaluation['seq_len']} tokens ({report['reference']['tokens']} "
        f"positions) of {evaluation['source']}, on the checkpoints as loaded from disk.",
        f"Computed in {report['compute']['dtype']} on {report['environment']['device']}.",
        f"Noise floor: KLD × 1000 of {1000 * noise['kld_mean']:.3f} for the unquantized model {noise['how']} "
        f"({noise['rows']} rows).",
        "Peak memory: of the process that quantized, libraries included.",
    ]


def environment_line(report: Run) -> str:
    """Packages and machine."""
    packages = ", ".join(f"{name} {v}" for name, v in report["environment"]["packages"].items())
    machine = f"{report['environment']['cpu']}, {report['environment']['threads']} threads"
    return f"{packages}, Python {report['environment']['python']}; {machine}."


#: what the summary's columns are
LEGEND = (
    "KLD: Kullback-Leibler divergence of the run's next-token distribution from the unquantized model's; mean, "
    "median and 90th percentile over positions, nats × 1000. Bits: everything stored for the experts."
)
