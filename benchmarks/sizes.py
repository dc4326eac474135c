"""Several sizes by one survey: what they take against one size, and how predicted and measured loss agree.

    python benchmarks/sizes.py --out DIR                                              the embedded demo model
    python benchmarks/sizes.py --model M --calibration C --eval-text T --out DIR      any other

Runs `bitsmoe quantize` with one budget, then with all of them, each in a process of its own, and reads both clocks;
then `bitsmoe plan --survey` for the prediction and `bitsmoe eval` for every checkpoint. Prints a table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(*arguments: str) -> tuple[float, float]:
    """(wall, CPU) seconds of a `bitsmoe` command."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "bitsmoe_modifier", *arguments], check=True, stderr=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return time.perf_counter() - started, cpu


def option(name: str, value: str | None) -> list[str]:
    return [] if value is None else [name, value]


def measure(checkpoint: Path, common: list[str], eval_rows: int, file: Path) -> dict[str, Any]:
    """The figures of one checkpoint."""
    run("eval", str(checkpoint), *common, "--eval-rows", str(eval_rows), "--json", str(file))
    return json.loads(file.read_text())["checkpoint"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--eval-text")
    parser.add_argument("--bits", default="1.6,2.0,2.5")
    parser.add_argument("--codes", help="family of codes; by default the recipe's")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--eval-rows", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-times", action="store_true", help="leave out the run with one budget")
    parser.add_argument("--only-times", action="store_true", help="leave out predicted and measured loss")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = option("--model", args.model)
    calibration = [*model, *option("--calibration", args.calibration), "--samples", str(args.samples)]
    calibration += option("--codes", args.codes)
    budgets = args.bits.split(",")
    kept = ["--resume-dir", str(args.out / "kept")]
    if not args.no_times:
        one = run("quantize", *calibration, "--bits", budgets[1], "--out", str(args.out / "one"))
        all_of_them = run("quantize", *calibration, "--bits", args.bits, "--out", str(args.out / "sizes"))
        for name, at in (("wall clock", 0), ("CPU", 1)):
            print(
                f"{name}: one budget {one[at]:.0f} s, {len(budgets)} budgets {all_of_them[at]:.0f} s, "
                f"{all_of_them[at] / one[at]:.2f} times"
            )
    else:
        run("quantize", *calibration, "--bits", args.bits, *kept, "--out", str(args.out / "sizes"))
    if args.only_times:
        return
    curve = args.out / "curve.json"
    run("plan", "--survey", *calibration, *kept, "--json", str(curve))
    predicted = json.loads(curve.read_text())
    print("| bits | predicted KLD x1000 | calibration text | held-out text | measured / predicted |")
    print("|---|---|---|---|---|")
    for bits in budgets:
        checkpoint = args.out / "sizes" / f"{bits}-bits"
        row = []
        for name, text in (("calibration", args.calibration), ("held-out", args.eval_text)):
            if name == "calibration" and text is None:
                from bitsmoe_modifier.sources.demo import demo_asset

                text = demo_asset("docmoe_calibration.txt")
            found = measure(
                checkpoint, [*model, *option("--eval-text", text)], args.eval_rows, args.out / f"{bits}-{name}.json"
            )
            row.append(1000 * found["kld_mean"])
        expected = 1000 * next(kld for size, kld in predicted["points"] if size >= float(bits) - 1e-9)
        print(f"| {bits} | {expected:.2f} | {row[0]:.2f} | {row[1]:.2f} | {row[1] / expected:.2f} |")


if __name__ == "__main__":
    main()
