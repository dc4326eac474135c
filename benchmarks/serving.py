"""Serving speed through vLLM: `python benchmarks/serving.py --model PACKED --baseline DENSE`.

Starts vLLM's OpenAI-compatible server for one checkpoint after the other with the same settings, sends it the same
requests (random token ids, fixed lengths, a fixed number at a time), and prints for each: output tokens per second over
all requests, and the 50th, 90th and 99th percentile of

    first     milliseconds from the request to its first token
    token     milliseconds from one token of a request to its next
    request   milliseconds from the request to its last token

The requests before the measured ones warm the server up. `ratio` is packed / baseline: above 1 is better for tokens per
second, below 1 for the times. Arguments after ``--`` go to the server, e.g. ``-- --tensor-parallel-size 2``.
"""

import argparse
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PERCENTILES = (50, 90, 99)
METRICS = ("first", "token", "request")


@dataclass(frozen=True)
class Timing:
    """Seconds from the start of a request to each of its tokens."""

    arrivals: list[float]

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Result:
    """What one server achieved."""

    tokens_per_second: float
    timings: list[Timing]

    def milliseconds(self, metric: str) -> list[float]:
        """All values of one of `METRICS`."""
        values = {
            "first": [t.arrivals[0] for t in self.timings],
            "token": [gap for t in self.timings for gap in t.gaps],
            "request": [t.arrivals[-1] for t in self.timings],
        }[metric]
        return [1000 * value for value in values]


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@contextmanager
def server(model: str, arguments: list[str], start_seconds: float) -> Iterator[str]:
    """The address of a running server; it is stopped in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port), *arguments]
    # from another folder: `python -m` puts the current one, and what lies in it, before installed packages
    with tempfile.TemporaryDirectory() as elsewhere, (Path(elsewhere) / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=elsewhere, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + start_seconds
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the server for {model} did not start:\n{log.read()[-4000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=60)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def complete(address: str, prompt: list[int], output_len: int) -> Timing:
    """Send one request and note when its tokens arrive."""
    body = {"model": "model", "prompt": prompt, "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    arrivals, tokens, start = [], 0, time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            text = line.decode().removeprefix("data:").strip()
            if not text or text == "[DONE]":
                continue
            event = json.loads(text)
            if event["choices"]:
                arrivals.append(time.perf_counter() - start)
            elif event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    if tokens != output_len:
        raise SystemExit(f"the server answered with {tokens} tokens instead of {output_len}")
    return Timing(arrivals)


def measure(address: str, prompts: list[list[int]], warmup: int, output_len: int, concurrency: int) -> Result:
    """Send all prompts, ``concurrency`` at a time; the first ``warmup`` of them do not count."""
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(lambda prompt: complete(address, prompt, output_len), prompts[:warmup]))
        start = time.perf_counter()
        timings = list(pool.map(lambda prompt: complete(address, prompt, output_len), prompts[warmup:]))
        seconds = time.perf_counter() - start
    return Result(len(timings) * output_len / seconds, timings)


def table(results: dict[str, Result]) -> str:
    """Markdown, with the ratio of the two where there are two."""
    names = list(results)
    lines = [f"| | {' | '.join(names)} |" + (" ratio |" if len(names) == 2 else "")]
    lines.append("|---" * (len(names) + 1 + (len(names) == 2)) + "|")
    rows = {"output tokens/s": [result.tokens_per_second for result in results.values()]}
    for metric in METRICS:
        for percent in PERCENTILES:
            values = [percentile(result.milliseconds(metric), percent) for result in results.values()]
            rows[f"{metric} p{percent} ms"] = values
    for name, values in rows.items():
        cells = [f"{value:.1f}" for value in values] + ([f"{values[0] / values[1]:.2f}"] if len(values) == 2 else [])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the packed checkpoint")
    parser.add_argument("--baseline", help="folder or name of the model it was made from, served by vLLM as it is")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=8, help="requests before those that count")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=256, help="tokens of every prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-seconds", type=float, default=900, help="how long a server may take to start")
    own, passed_on = _split(sys.argv[1:])
    options = parser.parse_args(own)

    config = json.loads((Path(options.model) / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    draw = random.Random(options.seed)
    count = options.warmup + options.requests
    prompts = [[draw.randrange(vocabulary) for _ in range(options.input_len)] for _ in range(count)]
    results = {}
    for name, model in (("packed", options.model), ("baseline", options.baseline)):
        if model:
            # the server runs in another folder
            model = str(Path(model).resolve()) if os.path.isdir(model) else model
            with server(model, passed_on, options.start_seconds) as address:
                results[name] = measure(address, prompts, options.warmup, options.output_len, options.concurrency)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs; {options.requests} requests, "
        f"{options.concurrency} at a time, {options.input_len} tokens in, {options.output_len} out; "
        f"server arguments: {' '.join(passed_on) or 'none'}\n"
    )
    print(table(results))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(our arguments, those after ``--``)."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


if __name__ == "__main__":
    main()
