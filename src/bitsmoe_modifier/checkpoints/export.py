"""Packed experts back to dense weights, for tools that do not know the format.

The checkpoint is loaded as it is, every packed module is decoded into the fused experts of the unquantized
architecture, and transformers saves those under the names that the architecture's own checkpoints use.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import CheckpointError
from ..loading.inventory import Instead, Inventory, keep_beside, take_inventory
from ..loading.source_keys import restore_keys
from ..method.gating import Gating
from ..runtime.experts import BitsMoEExperts
from ..sources.classes import load_published
from ..sources.companions import copy_companions, let_save
from ..sources.provenance import REPORT_NAME, read_source
from ..storage.folders import OutputFolder
from ..storage.packed import PackedExperts
from ..storage.shards import packed_modules, read_json


def export_dense(checkpoint: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the unquantized model that a checkpoint stands for; nothing appears under ``out`` unless all was written.

    The whole dense model has to fit in memory. What other compressed-tensors formats packed (GPTQ on attention, say)
    is decompressed too.

    Args:
        checkpoint: folder of a checkpoint with packed experts.
        out: folder to create; an empty one is replaced.
        dtype: of the weights that are decoded; the others keep theirs.

    Raises:
        CheckpointError: when the checkpoint has no packed experts or is damaged.
        BitsMoEError: when ``out`` holds something.
    """
    with OutputFolder(out) as output:
        _export(checkpoint, output, dtype)


def _export(checkpoint: Path, output: OutputFolder, dtype: torch.dtype) -> None:
    model: Any = load_published(checkpoint, dtype="auto")
    inventory = take_inventory(model, checkpoint)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, BitsMoEExperts)}
    if not packed:
        raise CheckpointError(f"{checkpoint} has no experts packed by BitsMoE; there is nothing to decode")
    dense = _empty_dense(model)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(f"{p}." for p in packed))
    }
    for name, module in tqdm(packed.items(), desc="Decoding"):
        weights = fused_weights(module, dense.get_submodule(name), dtype)
        state.update({f"{name}.{leaf}": tensor for leaf, tensor in weights.items()})
    for name, weight in _decompressed(model, dtype).items():
        state = {key: tensor for key, tensor in state.items() if not _is_packed_part(key, name)}
        state[f"{name}.weight"] = weight
    dense.load_state_dict(state, assign=True)
    dense.tie_weights()
    let_save(dense)
    with output.written() as folder:
        dense.save_pretrained(folder)
        gating = next(iter(packed.values())).gating
        restore_keys(inventory, dense, folder)
        keep_beside(inventory, folder, instead=_dense_mtp(inventory, checkpoint, gating, dtype))
        copy_companions(checkpoint, folder)
        source = read_source(checkpoint)
        if source:
            (folder / REPORT_NAME).write_text(json.dumps({"source": source, "layers": {}}), encoding="utf-8")


def _dense_mtp(inventory: Inventory, checkpoint: Path, gating: Gating, dtype: torch.dtype) -> list[Instead]:
    """The packed experts of layers for multi-token prediction as the source had them: per expert, or fused."""
    separate = (
        read_json(checkpoint / REPORT_NAME).get("mtp_per_expert", {}) if (checkpoint / REPORT_NAME).is_file() else {}
    )
    found = []
    for name, parts in packed_modules(inventory.beside).items():
        packed = PackedExperts(**{leaf: stored.read() for leaf, stored in parts.items()})
        gate_up, down = (weights.to(dtype) for weights in BitsMoEExperts(packed, gating).dense_weights())
        if separate.get(name, True):
            tensors = {}
            for expert, (rows, out) in enumerate(zip(gate_up, down, strict=True)):
                for leaf, weight in zip(("gate", "up", "down"), (*rows.chunk(2), out), strict=True):
                    tensors[f"{name}.{expert}.{leaf}_proj.weight"] = weight.contiguous()
        else:
            tensors = {f"{name}.gate_up_proj": gate_up, f"{name}.down_proj": down}
        found.append(Instead(frozenset(f"{name}.{leaf}" for leaf in parts), tensors))
    return found


def fused_weights(experts: BitsMoEExperts, fused: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters of transformers' fused experts module that the packed ones stand for.

    Args:
        experts: packed.
        fused: the module that it replaced, on any device; says how its class lays them out.
        dtype: of the result.

    Returns:
        By parameter name: ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``, their last two axes
        exchanged where the class is transposed; ``up_proj`` ``[E, I, H]`` for the first without a gate; with biases,
        ``gate_up_proj_bias`` and ``down_proj_bias``.
    """
    gate_up, down = experts.dense_weights()
    interleaved = not getattr(fused, "is_concatenated", True)
    if experts.spec.ungated:
        return {"up_proj": gate_up.chunk(2, 1)[0].to(dtype).contiguous(), "down_proj": down.to(dtype).contiguous()}
    found = {"gate_up_proj": _interleave(gate_up) if interleaved else gate_up, "down_proj": down}
    if _is_transposed(fused, found):
        found = {name: tensor.transpose(1, 2) for name, tensor in found.items()}
    if experts.spec.has_bias:
        bias = experts.in_bias.detach()
        found["gate_up_proj_bias"] = _interleave(bias) if interleaved else bias
        found["down_proj_bias"] = experts.out_bias.detach()
    return {name: tensor.to(dtype).contiguous() for name, tensor in found.items()}


def _is_transposed(fused: nn.Module, plain: dict[str, torch.Tensor]) -> bool:
    """Whether a class has the last two axes exchanged: as its decorator says, or, without one (Llama 4), its shapes."""
    said = getattr(fused, "is_transposed", None)
    if said is not None:
        return bool(said)
    return any(fused.get_parameter(name).shape != tensor.shape for name, tensor in plain.items())


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    """Gate and up rows alternating: ``[E, 2I, …]`` from gate rows before up rows."""
    gate, up = rows.chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


def _empty_dense(model: Any) -> Any:
    """The unquantized architecture of a loaded model, on the meta device."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _decompressed(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of the Linears that other compressed-tensors formats packed, by module name."""
    from ..loading.compressed_tensors_api import BaseCompressor

    weights = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or isinstance(module, BitsMoEExperts) or not _is_stored_low(module):
            continue
        parameters = {leaf: tensor.detach() for leaf, tensor in module.named_parameters(recurse=False)}
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weights[name] = compressor.decompress(parameters, scheme)["weight"].to(dtype)
    return weights


def _is_stored_low(module: nn.Module) -> bool:
    """Whether a Linear has codes: integers packed beside ``weight``, or 8-bit floats in its place."""
    weight = getattr(module, "weight", None)
    return getattr(module, "weight_packed", None) is not None or (weight is not None and weight.dtype.itemsize == 1)


def _is_packed_part(key: str, module: str) -> bool:
    return key.startswith(f"{module}.weight_") or key == f"{module}.weight"
