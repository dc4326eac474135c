"""What `bitsmoe plan` says a run takes, against what it took: peak memory, size and time of a random model.

    python benchmarks/memory.py                                     # 2.5 GB in bf16: 12 layers of 64 experts
    python benchmarks/memory.py --layers 1 --experts 128 --hidden 4096 --width 1536 --samples 8 --dtype bfloat16
                                                                    # one layer of Qwen3-235B-A22B's shape
    python benchmarks/memory.py --layers 1 --experts 256 --hidden 7168 --width 2048 --stored fp8 --plain \\
        --samples 4 --batch-size 4 --dtype bfloat16 --scope layer   # one layer of DeepSeek-V3, as it is published

The model is written to a temporary folder (``--folder``), planned by its headers, quantized by `bitsmoe quantize` in a
process of its own, and that process's peak resident memory is read from the system. Prints one table.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bitsmoe_modifier.checkpoints.plan import make_plan, matrix_rate, read_headers
from bitsmoe_modifier.checkpoints.planning import table
from synthetic import random_text, save_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fields(options: argparse.Namespace) -> dict[str, object]:
    """Of the modifier."""
    plain = {"input_basis": "none", "output_basis": "none", "error_feedback": False} if options.plain else {}
    return {"bits": options.bits, "scope": options.scope, **plain}


def measure(model: Path, options: argparse.Namespace, folder: Path) -> tuple[float, int]:
    """Seconds and peak bytes of the largest process of one `bitsmoe quantize`."""
    text = folder / "text.txt"
    text.write_text(random_text(options.samples * options.seq_len + options.seq_len))
    (folder / "recipe.yaml").write_text(
        json.dumps({"only_stage": {"q_modifiers": {"BitsMoEModifier": fields(options)}}})
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    command = [sys.executable, *(torchrun if options.processes > 1 else ()), "-m", "bitsmoe_modifier", "quantize"]
    command += ["--model", str(model)]
    command += ["--recipe", str(folder / "recipe.yaml"), "--calibration", str(text), "--out", str(folder / "packed")]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len), "--batch-size"]
    command += [str(options.batch_size)]
    started = time.perf_counter()
    subprocess.run([*command, "--dtype", options.dtype, "--device", "cpu", "--quiet"], check=True)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    """Plan, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--scope", choices=("global", "layer"), default="global")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="what the model computes in")
    parser.add_argument("--stored", choices=("bf16", "fp8", "mxfp4"), default="bf16", help="what the source is")
    parser.add_argument("--batch-size", type=int, default=1, help="rows per pass; every pass decodes all experts")
    parser.add_argument("--plain", action="store_true", help="no bases, no feedback: the least work and memory")
    parser.add_argument("--processes", type=int, default=1, help="that quantize together under torchrun")
    parser.add_argument("--folder", help="where to write the model and its quantized form; default: temporary")
    options = parser.parse_args()
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(options, name) for name in ("layers", "experts", "hidden", "width", "choices")}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        stored = save_model(folder / "model", **sizes, stored=options.stored)
        tokens = options.samples * options.seq_len
        _, plan = make_plan(read_headers(str(folder / "model")), fields(options), tokens, DTYPES[options.dtype], "cpu")
        rate = matrix_rate("cpu")
        took, peak = measure(folder / "model", options, folder)
        size = sum(file.stat().st_size for file in (folder / "packed").glob("*.safetensors"))
    shape = ", ".join(f"{key} {value}" for key, value in sizes.items())
    machine = f"{os.cpu_count()} cores, {options.processes} processes of {torch.get_num_threads()} threads"
    print(f"{shape}; {stored / 1e9:.2f} GB in {options.stored}; {tokens} tokens, {options.dtype}, {machine}\n")
    print("| | planned | measured | measured / planned |\n|---|---|---|---|")
    rows = [
        ("peak memory, GB", plan.cpu_bytes / 1e9, peak / 1e9),
        ("checkpoint, GB", plan.result_bytes / 1e9, size / 1e9),
        ("time, s", plan.seconds(rate), took),
    ]
    for label, planned, measured in rows:
        print(f"| {label} | {planned:.2f} | {measured:.2f} | {measured / planned:.2f} |")
    print("\nof the planned memory:", *table(plan.cpu), sep="\n")


if __name__ == "__main__":
    main()
