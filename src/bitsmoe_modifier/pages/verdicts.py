"""What a comparison's figures say, in sentences: who beats whom, how accuracies differ, how all of it was measured."""

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from ..evaluation.columns import kld_error

Run = dict[str, Any]
#: half a hundredth of a bit is the size of headers, not of a method
_HEADER_BITS = 0.005
#: an absolute path of two parts or more, on any system, and its last part
_PATH = re.compile(r"(?<![\w.:/\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:;,'\"()]+[/\\])+([^\s/\\:;,'\"()]+)")
#: What a reader of the demo has to know before he believes that of a model of his.
_OF_THE_DEMO = (
    "The demo model is small, its experts are used very unequally, and it was trained for this demo; "
    "on real language-model weights less is to be gained (docs/quality.md, real weights)."
)


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
    if abs(own - other) < 2 * kld_error(run, rival):
        said += ", a difference within the sampling error of this text"
    return said + "."


def headline(runs: Sequence[Run]) -> str:
    """The strongest statement that is true of BitsMoE against GPTQ, or that there is none."""
    found = _strongest(runs)
    if found is None:
        return "No pair of a BitsMoE and a GPTQ run was measured, so there is nothing to compare."
    run, rival, relation = found
    return _closer(run, rival, relation) if relation else verdict(run, rival)


def headliner(runs: Sequence[Run]) -> str | None:
    """The name of the run that the headline is about; without a headline, of the first BitsMoE run, or None."""
    found = _strongest(runs)
    return found[0]["name"] if found else next((run["name"] for run in runs if is_bitsmoe(run)), None)


def _strongest(runs: Sequence[Run]) -> tuple[Run, Run, str] | None:
    """A BitsMoE run, a GPTQ run, and how they relate; "" where ours is further from the original; None without a pair.

    Of all GPTQ runs that are at least as large and, beyond twice the standard error, further from the original, the one
    over which the most bits are saved; else one that is matched within the error; else what was missed.
    """
    ours, theirs = [a for a in runs if is_bitsmoe(a)], [a for a in runs if is_gptq(a)]
    if not ours or not theirs:
        return None
    pairs = [(run, rival) for run in ours for rival in theirs if _saved(run, rival) > -_HEADER_BITS]
    won = [pair for pair in pairs if _clearly_lower(*pair)]
    if won:
        return *max(won, key=lambda pair: _saved(*pair)), "is closer to the original than"
    tied = [pair for pair in pairs if not _clearly_lower(*reversed(pair))]
    if tied:
        return *max(tied, key=lambda pair: _saved(*pair)), "is within the sampling error as close as"
    run = min(ours, key=lambda a: a["kld_mean"] / next_larger(a, theirs)["kld_mean"])
    return run, next_larger(run, theirs), ""


def of_model(report: Run) -> str:
    """The report's `headline` with the model for which it is true; of the demo model, what it cannot show."""
    model = PurePath(report["model"]["name"])
    said = f"On {model.name}: {headline([run for run in report['arms'] if 'error' not in run])}"
    return f"{said} {_OF_THE_DEMO}" if model.parts[-2:] == ("assets", "docmoe") else said


def _saved(run: Run, rival: Run) -> float:
    return rival["measured_bits_per_expert_weight"] - run["measured_bits_per_expert_weight"]


def _clearly_lower(run: Run, rival: Run) -> bool:
    """Whether a run's KL divergence is lower than another's beyond twice the standard error."""
    return bool(rival["kld_mean"] - run["kld_mean"] > 2 * kld_error(run, rival))


def _closer(run: Run, rival: Run, relation: str) -> str:
    bits, other = (one["measured_bits_per_expert_weight"] for one in (run, rival))
    smaller = 1 - run["checkpoint_bytes"] / rival["checkpoint_bytes"]
    said = (
        f"{run['name']} ({bits:.2f} bits per expert weight) {relation} {rival['name']} ({other:.2f} bits): "
        f"KL divergence {with_error(run)} against {with_error(rival)} × 10⁻³ nats"
    )
    return said + (f"; file {_percent(smaller)} smaller." if smaller > 0.005 else ".")


def with_error(run: Run) -> str:
    """The mean KL divergence × 1000, with its standard error where it is known."""
    error = run.get("kld_stderr")
    return f"{1000 * run['kld_mean']:.2f}" + ("" if error is None else f" ± {1000 * error:.2f}")


def next_larger(run: Run, rivals: Sequence[Run]) -> Run:
    """The smallest rival that takes at least as many bits; the largest where none does."""
    by_bits = sorted(rivals, key=lambda a: a["measured_bits_per_expert_weight"])
    bits = run["measured_bits_per_expert_weight"] - _HEADER_BITS
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
    dates = [f"Measured on {report['date']} (UTC)."] if "date" in report else []
    return [
        f"Calibration: {calibration['rows']} rows of {calibration['seq_len']} tokens from "
        f"{place(calibration['source'])}, seed {calibration['seed']}, {experts}; "
        "the same rows, and causal attention, for every run.",
        f"Evaluation: {evaluation['rows']} rows of {evaluation['seq_len']} tokens ({report['reference']['tokens']} "
        f"positions) of {place(evaluation['source'])}, on the checkpoints as loaded from disk.",
        f"Computed in {report['compute']['dtype']} on {report['environment']['device']}.",
        f"Noise floor: KLD × 1000 of {1000 * noise['kld_mean']:.3f} for the unquantized model {noise['how']} "
        f"({noise['rows']} rows). Distances below it mean nothing.",
        "Peak memory: of the process that quantized, libraries included.",
        *dates,
    ]


def place(source: str) -> str:
    """A source as a reader elsewhere may see it: of a path, the file's name."""
    return PurePath(source).name if PurePath(source).is_absolute() else source


def shown_command(command: str) -> str:
    """A command line without the folders of the machine that it ran on."""
    return shlex.join(without_folders(word) for word in shlex.split(command))


def without_folders(text: str) -> str:
    """A text with the last part of every absolute path in it in the path's place."""
    return _PATH.sub(lambda found: found[1], text)


def environment_line(report: Run) -> str:
    """Packages and machine."""
    packages = ", ".join(f"{name} {v}" for name, v in report["environment"]["packages"].items())
    machine = f"{report['environment']['cpu']}, {report['environment']['threads']} threads"
    return f"{packages}, Python {report['environment']['python']}; {machine}."


#: the headline's terms, below it
TERMS = (
    "KL divergence: how far the predictions of the next token are from the unquantized model's, in nats per token; "
    "0 is no difference. ± is the standard error of the mean. Bits per expert weight: all that is stored for the "
    "experts, shared out to their weights; the original has 16 or more. GPTQ: the usual quantizer of llm-compressor, "
    "at 2 to 4 bits (W2 to W4)."
)

#: what the summary's columns are
LEGEND = (
    "KLD: Kullback-Leibler divergence of the run's next-token distribution from the unquantized model's; mean, "
    "median and 90th percentile (p90) over positions, nats × 1000. Same top token: how often both models would say the "
    "same. Perplexity: exp of the mean negative log-likelihood of the text. ± is the standard error over rows; that "
    "of perplexity is of its distance from the unquantized model's."
)
