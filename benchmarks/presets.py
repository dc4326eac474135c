"""What the presets of `bitsmoe quantize` take and lose: --fast, the default, --best.

    python benchmarks/presets.py --out DIR                                              the embedded demo model
    python benchmarks/presets.py --model M --calibration C --eval-text T --out DIR      any other

Each runs in a process of its own, whose CPU seconds are read, and the checkpoint is measured by `bitsmoe eval`. Prints
a table. Set OMP_NUM_THREADS=1 for figures that a busy machine disturbs least.
"""

import argparse
from pathlib import Path

from sizes import measure, option, run

PRESETS = {"`--fast`": ["--fast"], "default": [], "`--best`": ["--best"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--eval-text")
    parser.add_argument("--bits", default="2.0")
    parser.add_argument("--codes", default="scalar,trellis", help="families of codes, separated by commas")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--eval-rows", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = option("--model", args.model)
    common = [*model, *option("--calibration", args.calibration), "--samples", str(args.samples), "--bits", args.bits]
    print("| codes | preset | CPU seconds | KLD x1000 | median |\n|---|---|---|---|---|")
    for codes in args.codes.split(","):
        for number, (name, preset) in enumerate(PRESETS.items()):
            out = args.out / f"{codes}-{number}"
            _, seconds = run("quantize", *common, "--codes", codes, *preset, "--out", str(out))
            text = [*model, *option("--eval-text", args.eval_text)]
            found = measure(out, text, args.eval_rows, args.out / f"{out.name}.json")
            loss = f"{1000 * found['kld_mean']:.2f} ± {1000 * found['kld_stderr']:.2f}"
            print(f"| {codes} | {name} | {seconds:.0f} | {loss} | {1000 * found['kld_median']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
