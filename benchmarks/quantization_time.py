"""How long quantizing takes: BitsMoE against stock GPTQModifier at 2 bits, through `oneshot`, one run, one machine.

    python benchmarks/quantization_time.py                      # one layer of Qwen3-30B-A3B's shape, all cores
    python benchmarks/quantization_time.py --scale 8 --growth growth.png --profile
    python benchmarks/quantization_time.py --model DIR          # a whole model; `demo` is that of the package

The layer stands in a model that has nothing else of weight: one decoder layer with small attention, inputs as unequal
over directions as a trained model's (`synthetic`). Every arm gets the same rows and a fresh model, and its time is that
of the whole `oneshot`, the forward passes over the rows included. BitsMoE needs routed tokens only; GPTQ is timed as
llm-compressor runs it by default, every expert on every token, and with routed tokens only. ``--scale N`` divides
experts and rows by N, which keeps the tokens per expert; H and I stay, because the work per expert grows with their
third power.
"""

import argparse
import cProfile
import os
import platform
import pstats
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from bitsmoe_modifier import BitsMoEModifier
from bitsmoe_modifier.sources.demo import demo_asset
from synthetic import save_model


@dataclass(frozen=True)
class Shape:
    """A layer, and what it is calibrated with."""

    experts: int = 128
    hidden: int = 2048
    width: int = 768
    choices: int = 8
    rows: int = 128
    row_length: int = 256

    def scaled(self, divisor: int) -> "Shape":
        """The same with experts and rows divided; at least as many experts as a token chooses."""
        return replace(
            self, experts=max(self.experts // divisor, self.choices), rows=max(self.rows // divisor, self.choices)
        )

    def __str__(self) -> str:
        tokens = self.rows * self.row_length
        return f"E {self.experts}, H {self.hidden}, I {self.width}, k {self.choices}, {tokens} tokens"


def bitsmoe(feedback: bool, group_size: int, codes: Literal["scalar", "trellis"] = "scalar") -> BitsMoEModifier:
    """2 bits, with everything on or on the fast path."""
    return BitsMoEModifier(
        bits=2.0,
        scope="layer",
        codes=codes,
        group_size=group_size,
        error_feedback=feedback,
        refine_passes=BitsMoEModifier.model_fields["refine_passes"].default if feedback else 0,
    )


def gptq(group_size: int) -> GPTQModifier:
    """2 bits symmetric on the routed experts' projections."""
    weights = {"num_bits": 2, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": True}
    group = {"targets": [r"re:.*mlp[.]experts[.].*_proj$"], "weights": weights}
    return GPTQModifier(config_groups={"group_0": group}, actorder=None)


@dataclass(frozen=True)
class Arm:
    """A way to quantize: its modifier for a group size, and whether every expert is calibrated on every token."""

    modifier: Callable[[int], Any]
    all_experts: bool = False


#: Others are compared with these.
BASELINES = ("GPTQModifier W2", "GPTQModifier W2, routed tokens only")
ARMS = {
    BASELINES[0]: Arm(gptq, all_experts=True),
    BASELINES[1]: Arm(gptq),
    "BitsMoE": Arm(lambda group: bitsmoe(True, group)),
    "BitsMoE, trellis codes": Arm(lambda group: bitsmoe(True, group, "trellis")),
    "BitsMoE without feedback": Arm(lambda group: bitsmoe(False, group)),
}


def rows_of(shape: Shape, vocab: int) -> DataLoader:
    """Calibration rows of random tokens."""
    ids = torch.randint(vocab, (shape.rows, 1, shape.row_length), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=None)


def seconds_of(model: Any, rows: DataLoader, modifier: Any, all_experts: bool, profile: bool) -> float:
    """Time of one `oneshot`; prints the processor time too, which other programs on the machine disturb less."""
    profiler = cProfile.Profile() if profile else None
    started, worked = time.perf_counter(), time.process_time()
    if profiler:
        profiler.enable()
    oneshot(model=model, dataset=rows, recipe=[modifier], moe_calibrate_all_experts=all_experts, pipeline="sequential")
    if profiler:
        profiler.disable()
    elapsed = time.perf_counter() - started
    print(f"  {time.process_time() - worked:.1f} s of all threads", flush=True)
    reset_session()
    if profiler:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)
    return elapsed


def time_layer(shape: Shape, arms: list[str], dtype: torch.dtype, profile: bool = False) -> dict[str, float]:
    """Seconds of every arm on one layer; dtype: of the model."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(path, layers=1, experts=shape.experts, hidden=shape.hidden, width=shape.width, choices=shape.choices)
        for arm in arms:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            rows, how = rows_of(shape, model.config.vocab_size), ARMS[arm]
            found[arm] = seconds_of(model, rows, how.modifier(128), how.all_experts, profile)
            print(f"  {arm}: {found[arm]:.1f} s", flush=True)
            del model
    return found


def time_model(folder: str, arms: list[str], dtype: torch.dtype, profile: bool) -> dict[str, float]:
    """Seconds of every arm on a whole model, each on its way to a budget for all layers together."""
    shape = Shape()
    found = {}
    for arm in arms:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        group = next(g for g in (128, 64, 32, 16) if model.config.moe_intermediate_size % g == 0)
        modifier = ARMS[arm].modifier(group)
        if isinstance(modifier, BitsMoEModifier):
            modifier.scope = "global"
        rows = rows_of(shape, model.config.vocab_size)
        found[arm] = seconds_of(model, rows, modifier, ARMS[arm].all_experts, profile)
        print(f"  {arm}: {found[arm]:.1f} s", flush=True)
    return found


def table(title: str, found: dict[str, float]) -> str:
    """Seconds, and how many times faster than the baselines."""
    bases = [base for base in BASELINES if base in found]
    head = ["", "seconds", *(f"times faster than {base}" for base in bases)]
    lines = [f"\n{title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, taken in found.items():
        lines.append(f"| {' | '.join([arm, f'{taken:.1f}', *(f'{found[base] / taken:.1f}' for base in bases)])} |")
    return "\n".join(lines)


def growth(shape: Shape, arms: list[str], dtype: torch.dtype, path: Path) -> str:
    """Time every arm at a half and a quarter of each of E, H and the rows; plot it."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    axes_of = {"experts": "experts E", "hidden": "hidden size H", "rows": "calibration rows"}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), sharey=True)
    lines = ["\nGrowth, seconds", "", f"| | {' | '.join(arms)} |", f"|---|{'---|' * len(arms)}"]
    for axis, (field, label) in zip(axes, axes_of.items(), strict=True):
        sizes = sorted({max(getattr(shape, field) // part, shape.choices) for part in (4, 2, 1)})
        timed = {}
        for size in sizes:
            print(f"{label} {size}", flush=True)
            timed[size] = time_layer(replace(shape, **{field: size}), arms, dtype)
            lines.append(f"| {label} {size} | {' | '.join(f'{timed[size][arm]:.1f}' for arm in arms)} |")
        for arm in arms:
            axis.plot(sizes, [timed[size][arm] for size in sizes], "o-", label=arm)
        axis.set(xlabel=label, xscale="log", yscale="log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel("seconds")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return "\n".join(lines)


def main() -> None:
    """Time what was asked for and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide experts and rows by N")
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model's weights")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="NAME")
    parser.add_argument("--model", metavar="DIR", help="a whole model instead of a layer; demo: that of the package")
    parser.add_argument("--growth", metavar="FILE", help="also vary E, H and rows, and plot it there")
    parser.add_argument("--profile", action="store_true", help="print where each arm's time goes")
    args = parser.parse_args()
    logger.remove()
    arms, dtype = args.arms, getattr(torch, args.dtype)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads")
    if args.model:
        folder = demo_asset("docmoe") if args.model == "demo" else args.model
        print(table(f"{Path(folder).name}, end to end, with the survey", time_model(folder, arms, dtype, args.profile)))
        return
    shape = replace(Shape(), hidden=args.hidden, width=args.width).scaled(args.scale)
    print(table(f"One layer: {shape}, {args.dtype}", time_layer(shape, arms, dtype, args.profile)))
    if args.growth:
        print(growth(shape, arms, dtype, Path(args.growth)))


if __name__ == "__main__":
    main()
