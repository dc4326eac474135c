"""Generation speed end to end: `python benchmarks/generate.py DENSE GPTQ PACKED --batch 1,8 --new-tokens 128`.

Loads the given checkpoints through transformers and lets `generate` continue random tokens greedily, with a static
cache: on CUDA transformers then compiles the decoding step and replays it as a CUDA graph. Prints for each checkpoint
what its weights take in memory (transformers decodes GPTQ's experts while loading), milliseconds per step and tokens
per second (all rows of the batch together), and the ratio to the first checkpoint: above 1 is faster than it.

Decoding alone is timed: the time for all tokens less that for the first one. The checkpoints take turns, so that
what else the machine does disturbs all of them alike; of the turns after the warm-up the median counts. On a CPU a
thread's own time is taken. `BITSMOE_CACHE_MB=0` keeps no decoded weights at all between steps.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from layers import markdown
from transformers import AutoModelForCausalLM

import bitsmoe_modifier  # noqa: F401 - registers the loader


def load(checkpoint: str, device: torch.device) -> Any:
    """The model in its own dtype."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").to(device).eval()


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def clock(device: torch.device) -> float:
    """Seconds, when everything launched so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """Seconds that `generate` takes for exactly ``new_tokens`` tokens per row."""
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    start = clock(ids.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **settings)
    took = clock(ids.device) - start
    assert out.shape[1] == ids.shape[1] + new_tokens
    return took


def steps(models: dict[str, Any], ids: torch.Tensor, new_tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of one decoding step of every model."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            whole, first = seconds(model, ids, new_tokens), seconds(model, ids, 1)
            if turn:  # the first one compiles
                taken[name].append((whole - first) / (new_tokens - 1))
    return {name: statistics.median(values) for name, values in taken.items()}


def names_of(checkpoints: list[str]) -> list[str]:
    """The folders' own names, or the paths where those are not distinct."""
    short = [Path(checkpoint).name for checkpoint in checkpoints]
    return short if len(set(short)) == len(short) else checkpoints


def run(checkpoints: list[str], batches: list[int], options: argparse.Namespace) -> str:
    """The table."""
    device = torch.device(options.device)
    models = {n: load(c, device) for n, c in zip(names_of(checkpoints), checkpoints, strict=True)}
    vocabulary = next(iter(models.values())).config.get_text_config().vocab_size
    generator, rows = torch.Generator().manual_seed(0), []
    for batch in batches:
        ids = torch.randint(vocabulary, (batch, options.prompt_tokens), generator=generator).to(device)
        taken = steps(models, ids, options.new_tokens, options.repeats)
        baseline = next(iter(taken.values()))
        for name, each in taken.items():
            row = [
                str(batch),
                name,
                str(models[name].dtype).removeprefix("torch."),
                f"{weight_bytes(models[name]) / 1e6:.1f}",
            ]
            rows.append([*row, f"{each * 1e3:.2f}", f"{batch / each:.1f}", f"{baseline / each:.2f}"])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    note = f"{where}; {options.prompt_tokens} + {options.new_tokens} tokens; median of {options.repeats}"
    if device.type != "cuda":
        note += f"; {torch.get_num_threads()} threads; BITSMOE_CACHE_MB={os.environ.get('BITSMOE_CACHE_MB', 'default')}"
    header = ["batch", "checkpoint", "dtype", "weights MB", "ms / step", "tokens/s", f"× {next(iter(models))}"]
    return f"{note}\n\n{markdown(header, rows)}"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="Generation speed of checkpoints through transformers.")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folders; ratios are to the first one")
    parser.add_argument("--batch", default="1", help="comma-separated numbers of rows")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        print(run(options.checkpoints, [int(b) for b in options.batch.split(",")], options))


if __name__ == "__main__":
    main()
