"""llama.cpp's quantization types on the same experts, the same calibration rows and the same measure as ours.

The types are applied by the library of ik_llama.cpp (which has those of llama.cpp and its own), called by ctypes. A
wheel carries it; put it where it touches no environment of Python:

    pip install --no-deps --target PEERS ik-llama-cpp-python
    python benchmarks/peers.py --library PEERS --model MODEL --rows 16 --seeds 0,1,2 --out OUT      of real_weights.py
    python benchmarks/peers.py --library PEERS --model DIR --calibration C --eval-text T --rows 128 --out OUT
    python benchmarks/real_weights.py table OUT [OUT of quality.py …] [--chart FILE.png]

As llama-quantize does with an importance matrix, every weight's error counts by the mean square of its input over the
calibration tokens that were routed to the expert (an expert without any: all alike). Only routed experts are
quantized, all to one type; GGUF recipes mix types over tensors, which helps them on whole models. Rows that do not fill
a block of 256 weights (llama.cpp would take another type for those) are quantized in groups that do, which favours the
types that keep something per row. The second form takes ordinary models with the rows that `bitsmoe compare` takes.
"""

import argparse
import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_weights import Judge, Rows, calibratable, load, numbers, predictions, revision
from real_weights_results import Results
from torch import nn
from tqdm import tqdm

LLAMA = ("iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_K", "iq3_xxs", "q3_K", "iq4_xs")
IK = ("iq2_ks", "iq2_kl", "iq3_k")
#: Weights per block of all of these types.
BLOCK = 256
#: Tokens per row of ordinary models, as everywhere in docs/quality.md.
LENGTH = 256


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions of libggml that quantize and decode rows."""

    def __init__(self, folder: Path) -> None:
        found = [folder] if folder.is_file() else sorted(folder.glob("ik_llama_cpp/lib/libggml.so"))
        if not found:
            command = f"pip install --no-deps --target {folder} ik-llama-cpp-python"
            raise SystemExit(f"{folder} has no ik_llama_cpp/lib/libggml.so: {command}")
        self._library = library = ctypes.CDLL(str(found[0]))
        library.ggml_type_name.restype = ctypes.c_char_p
        library.ggml_row_size.restype = library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_row_size.argtypes = (ctypes.c_int, ctypes.c_int64)
        floats, bytes_, count = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
        # the last argument is ik_llama.cpp's own and not used by these types
        library.ggml_quantize_chunk.argtypes = (ctypes.c_int, floats, bytes_, *[count] * 3, floats, ctypes.c_void_p)
        library.ggml_init.restype, library.ggml_init.argtypes = ctypes.c_void_p, (_InitParams,)
        library.ggml_init(_InitParams(1 << 20, None, False))  # fills the tables of half precision
        names = ((library.ggml_type_name(i), i) for i in range(400))
        self._ids = {name.decode(): i for name, i in names if name}

    def quantized(self, kind: str, weights: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, int]:
        """What a type makes of a matrix.

        Args:
            kind: name of the type, as the library says it.
            weights: float32 ``[rows, n]``.
            importance: of each column, float32 ``[n]``.

        Returns:
            the decoded matrix, and the bytes that it takes.
        """
        rows, n = weights.shape
        together = BLOCK // gcd(BLOCK, n)
        if rows % together:
            raise SystemExit(f"{rows} rows of {n} weights do not fill blocks of {BLOCK}")
        source = np.ascontiguousarray(weights, dtype=np.float32).reshape(rows // together, n * together)
        weight = np.tile(importance.astype(np.float32), together)
        size, kind_id = self._library.ggml_row_size(self._ids[kind], source.shape[1]), self._ids[kind]
        stored = np.zeros((len(source), size), dtype=np.uint8)
        written = self._library.ggml_quantize_chunk(
            kind_id, source.ctypes.data, stored.ctypes.data, 0, *source.shape, weight.ctypes.data, None
        )
        if written != stored.nbytes:
            raise SystemExit(f"{kind}: the library wrote {written} bytes in the place of {stored.nbytes}")
        decode = getattr(self._library, f"dequantize_row_{kind}")
        decode.restype, decode.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        decoded = np.empty_like(source)
        for packed, row in zip(stored, decoded, strict=True):  # row by row: some types keep a scale in front of each
            decode(packed.ctypes.data, row.ctypes.data, source.shape[1])
        return decoded.reshape(rows, n), stored.nbytes


@dataclass
class Importance:
    """Sums of squares of an experts module's inputs: of gate and up ``[E, H]``, of down ``[E, I]``; tokens ``[E]``."""

    hidden: torch.Tensor
    inner: torch.Tensor
    tokens: torch.Tensor

    def mean(self, which: str) -> np.ndarray:
        """``[E, n]``; of an expert that no token reached, ones."""
        total = getattr(self, which)
        return torch.where(self.tokens[:, None] > 0, total / self.tokens[:, None].clamp(min=1), 1.0).numpy()


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """The modules with all experts of a layer in two tensors ``[E, 2I, H]`` and ``[E, H, I]``, by name."""
    found = {n: m for n, m in model.named_modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")}
    wrong = [
        n for n, m in found.items() if m.gate_up_proj.dim() != 3 or 2 * m.down_proj.shape[2] != m.gate_up_proj.shape[1]
    ]
    if wrong or not found:
        raise SystemExit(f"experts in tensors [E, 2I, H] and [E, H, I] are needed; {wrong or 'the model has none'}")
    return found


@contextmanager
def observed(modules: dict[str, Any]) -> Iterator[dict[str, Importance]]:
    """Collect the importances of all that runs inside."""
    noted: dict[str, Importance] = {}
    handles = []
    for name, module in modules.items():
        count, width, hidden = module.num_experts, module.down_proj.shape[2], module.down_proj.shape[1]
        noted[name] = Importance(torch.zeros(count, hidden), torch.zeros(count, width), torch.zeros(count))

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], into: Importance = noted[name]) -> None:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            given = dict(zip(names, args, strict=False)) | kwargs
            x, chosen = given["hidden_states"].float(), given["top_k_index"]
            for expert in chosen.unique().tolist():
                inputs = x[(chosen == expert).any(-1)]
                gate, up = nn.functional.linear(inputs, module.gate_up_proj[expert].float()).chunk(2, -1)
                into.hidden[expert] += inputs.square().sum(0)
                into.inner[expert] += (module.act_fn(gate) * up).square().sum(0)
                into.tokens[expert] += len(inputs)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def quantize(
    model: nn.Module, dense: dict[str, torch.Tensor], importances: dict[str, Importance], ggml: Ggml, kind: str
) -> float:
    """Put what a type makes of the dense experts into the model.

    Args:
        model: receives the decoded weights.
        dense: the unquantized weights, by parameter name.
        importances: by name of the experts module.
        ggml: the library.
        kind: the type.

    Returns:
        bits per expert weight.
    """
    total = weights = 0
    for name, module in experts_modules(model).items():
        for parameter, which in (("gate_up_proj", "hidden"), ("down_proj", "inner")):
            mean, source = importances[name].mean(which), dense[f"{name}.{parameter}"]
            for expert in tqdm(range(len(source)), desc=f"{kind} {name}.{parameter}", leave=False):
                made, size = ggml.quantized(kind, source[expert].numpy(), mean[expert])
                getattr(module, parameter).data[expert] = torch.from_numpy(made)
                total, weights = total + 8 * size, weights + made.size
    return total / weights


def arm_of(kind: str) -> str:
    """Name of a type in the results."""
    return f"{'ik' if kind in IK else 'gguf'}_{kind}"


@dataclass
class Peers:
    """The types to measure, the library that has them, and the lines that there are."""

    kinds: list[str]
    ggml: Ggml
    results: Results

    def run(self, name: str, model: Any, taken: torch.Tensor, seed: int, judge: Judge) -> None:
        """Measure the types that have no line yet for a model and its calibration rows; the model comes back dense."""
        kinds = [kind for kind in self.kinds if not self.results.has(name, arm_of(kind), len(taken), seed)]
        if not kinds:
            return
        modules = experts_modules(model)
        with observed(modules) as importances:
            for part in taken.split(16):
                predictions(model, part, judge.compared)
        parameters = [f"{layer}.{which}" for layer in modules for which in ("gate_up_proj", "down_proj")]
        dense = {key: model.get_parameter(key).detach().clone() for key in parameters}
        for kind in kinds:
            begun = time.perf_counter()
            bits = quantize(model, dense, importances, self.ggml, kind)
            seconds = time.perf_counter() - begun
            facts = {"model": name, "arm": arm_of(kind), "rows": len(taken), "seed": seed, "revision": revision()}
            self.results.add({**facts, "bits": bits, **judge(model), "quantize_seconds": seconds})
        for key, weight in dense.items():
            model.get_parameter(key).data.copy_(weight)


def run_built(folder: Path, counts: list[int], seeds: list[int], out: Path, peers: Peers) -> None:
    """Measure on a model that `real_weights.py` built."""
    rows = Rows.of(folder)
    for count in counts:
        for seed in seeds:
            taken = rows.taken(count, seed)
            judge = Judge.of(folder, rows, taken, out)
            with calibratable(folder, taken) as (path, _):
                model = load(path)
            peers.run(folder.name, model, taken, seed, judge)


def run_text(
    folder: Path, texts: tuple[str, str], counts: list[int], seeds: list[int], evaluated: int, peers: Peers
) -> None:
    """Measure on an ordinary model, with the rows of `bitsmoe compare`."""
    from bitsmoe_modifier.sources.model import load_tokenizer
    from bitsmoe_modifier.sources.text import calibration_rows, evaluation_rows, read_text, tokenize

    calibration, evaluation = (tokenize(read_text(text), load_tokenizer(folder)) for text in texts)
    chosen = evaluation_rows(evaluation, LENGTH, evaluated, texts[1])
    model = load(folder)
    size = model.config.vocab_size
    judge = Judge({"wikitext": chosen}, {"wikitext": chosen}, {"wikitext": predictions(model, chosen, size)}, size)
    for count in counts:
        for seed in seeds:
            taken = calibration_rows(calibration, count, LENGTH, seed, texts[0])
            peers.run(folder.name, model, taken, seed, judge)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, metavar="DIR", help="where the wheel was installed")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--calibration", metavar="FILE", help="of an ordinary model: text to calibrate with")
    parser.add_argument("--eval-text", metavar="FILE", help="and text to measure on")
    parser.add_argument("--eval-rows", type=int, default=256, help="rows of 256 tokens of that text")
    parser.add_argument("--types", default=",".join([*LLAMA, *IK]), help="comma-separated (default: all)")
    parser.add_argument("--rows", type=numbers, default=[16], help="calibration rows, e.g. 16,48,128")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    peers = Peers(args.types.split(","), Ggml(args.library), Results(args.out))
    if args.calibration and args.eval_text:
        texts = args.calibration, args.eval_text
        run_text(args.model, texts, args.rows, args.seeds, args.eval_rows, peers)
    elif (args.model / "rows.safetensors").exists():
        run_built(args.model, args.rows, args.seeds, args.out, peers)
    else:
        parser.error(f"{args.model} was not built by real_weights.py; give --calibration and --eval-text")


if __name__ == "__main__":
    main()
