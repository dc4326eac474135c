"""Folders as they are published, quantized by the command line: ``published_folders.py OUT TYPE…``.

``TYPE+quantize`` packs the experts of the layer for multi-token prediction too (``--mtp quantize``, as ``TYPE+keep``
and ``TYPE+drop`` stand for the others); ``OUT/TYPE+…/decoded`` is the quantized folder exported again.

This runs in the environment with llm-compressor (`make test`'s), which vLLM's lacks; `test_vllm_published.py` starts it
and serves what it wrote: ``OUT/TYPE/dense`` is the published folder, ``OUT/TYPE/packed`` the quantized one.
"""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "families")]

import torch
from building import model_of
from processors import add_processor
from rows import ROWS, Row

from bitsmoe_modifier.cli import main
from low_precision import publish_fp8, publish_mxfp4
from published import add_shard, publish, stored_tensors
from tiny_text import write_text

_RECIPE = "quant_stage: {quant_modifiers: {BitsMoEModifier: {bits: 4.0, group_size: 16, block_size: 16}}}"
#: what the weights are published in, where that is not bf16
_SOURCES: dict[str, Callable[[Path], object]] = {"gpt_oss": publish_mxfp4, "minimax_m2": publish_fp8}
#: names of what makes the input of the layer for multi-token prediction, and of its last norm
_DEEPSEEK = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
_QWEN = ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.fc.weight", "mtp.norm.weight")
_BEYOND_THE_LAST = ("glm4_moe", "deepseek_v3")
_UNDER_MTP = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")


def quantize(row: Row, folder: Path, treatment: str) -> None:
    """Publish the family's tiny model under ``folder/dense`` and run ``bitsmoe quantize`` on it.

    With a ``treatment`` (``--mtp``) of its layer for multi-token prediction, ``folder/decoded`` is what
    `bitsmoe export` makes of that.
    """
    if row.model_type in _BEYOND_THE_LAST:
        row = dataclasses.replace(row, sizes={**row.sizes, "num_nextn_predict_layers": 1})
    model = model_of(row.family, torch.bfloat16)
    row.sharpen(model)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data.mul_(3)
    dense = publish(model, folder / "dense", rewrite=row.rewrite or _SOURCES.get(row.model_type))
    mtp = _mtp(row.model_type, stored_tensors(dense))
    if mtp:
        add_shard(dense, mtp, "mtp.safetensors")
    if row.has_tower:
        add_processor(dense)
    recipe, text = folder / "recipe.yaml", write_text(folder / "calibration.txt", 4000, seed=0)
    recipe.write_text(_RECIPE)
    command = ["quantize", "--model", str(dense), "--recipe", str(recipe), "--calibration", str(text), "--quiet"]
    command += ["--out", str(folder / "packed"), "--samples", "16", "--seq-len", "32", "--mtp", treatment or "keep"]
    if row.model_type == "minimax_m2":
        command += ["--rest", "bf16"]  # vLLM has no kernels for 8-bit floats on a CPU
    done = main(command)
    assert done == 0, f"bitsmoe quantize ended with {done}"
    if treatment:
        command = ["export", str(folder / "packed"), "--to", "dense", "--out", str(folder / "decoded")]
        done = main([*command, "--dtype", row.dtype])
        assert done == 0, f"bitsmoe export ended with {done}"


def _mtp(model_type: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a layer for multi-token prediction, which transformers does not load: the last layer's again."""
    if model_type not in (*_BEYOND_THE_LAST, *_UNDER_MTP):
        return {}
    numbered = [re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", name) for name in tensors]
    last = max(int(found[1]) for found in numbered if found)
    own = {found[2]: tensors[found[0]] for found in numbered if found and int(found[1]) == last}
    prefix, names = "mtp.layers.0.", list(_QWEN)
    if model_type in _BEYOND_THE_LAST:
        prefix = f"model.layers.{last + 1}."
        names = [prefix + name for name in _DEEPSEEK]
    norm = own["input_layernorm.weight"]
    hidden = len(norm)
    # mostly the next token's embedding, so that the layer often predicts what the model will
    joined = (torch.eye(hidden, 2 * hidden) + torch.randn(hidden, 2 * hidden) / 20).bfloat16()
    made = dict(zip(names, (norm, norm.clone(), joined, norm.clone()), strict=True))
    return {**made, **{prefix + name: tensor.clone() for name, tensor in own.items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in sys.argv[2:]:
        kind, _, treatment = one.partition("+")
        quantize(next(row for row in ROWS if row.model_type == kind), Path(sys.argv[1]) / one, treatment)
