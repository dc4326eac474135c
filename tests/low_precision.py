"""Encoders of low-precision checkpoints, written after the formats' specifications and not after the decoders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

#: OCP Microscaling Formats (MX) 1.0, section 5.3.3: E2M1 has one sign, two exponent and one mantissa bit, bias 1
_E2M1 = {0.0: 0, 0.5: 1, 1.0: 2, 1.5: 3, 2.0: 4, 3.0: 5, 4.0: 6, 6.0: 7}


def encode_fp8(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scales, the values they stand for), one block after the other."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block), -(-columns // block))
    values = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[at].float().abs().max() / 448
            codes[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
            values[at] = codes[at].float() * scales[i, j]
    return codes, scales, values


def encode_mxfp4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(blocks, scales, values) of ``[…, rows, columns]``, number by number."""
    flat = rows.reshape(-1, 32)
    blocks, scales, values = torch.empty(len(flat), 16, dtype=torch.uint8), [], torch.empty(len(flat), 32)
    levels = torch.tensor(list(_E2M1))
    for n, group in enumerate(flat.tolist()):
        exponent = max(-100, int(torch.tensor(max(abs(v) for v in group)).log2().floor()) - 2)
        scales.append(exponent + 127)
        nibbles = []
        for i, value in enumerate(group):
            level = float(levels[(levels - abs(value) / 2.0**exponent).abs().argmin()])
            nibbles.append(_E2M1[level] | (8 if value < 0 else 0))
            values[n, i] = (-level if value < 0 else level) * 2.0**exponent
        for i in range(16):
            blocks[n, i] = nibbles[2 * i] | nibbles[2 * i + 1] << 4
    shape = rows.shape
    return (
        blocks.view(*shape[:-1], shape[-1] // 32, 16),
        torch.tensor(scales, dtype=torch.uint8).view(*shape[:-1], shape[-1] // 32),
        values.view(shape),
    )


def publish_fp8(folder: Path, block: int = 32) -> dict[str, torch.Tensor]:
    """Rewrite a saved model's Linears outside routers and head as block-FP8; return what they stand for."""
    tensors, stands = load_file(folder / "model.safetensors"), {}
    for key, tensor in list(tensors.items()):
        if key.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            codes, scales, stands[key] = encode_fp8(tensor, block)
            tensors[key], tensors[f"{key}_scale_inv"] = codes, scales
    _write(folder, tensors, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]})
    return stands


def publish_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrite gpt-oss's experts as MXFP4, rows of the output first; return what they stand for, transposed again."""
    tensors, stands = load_file(folder / "model.safetensors"), {}
    for key, tensor in list(tensors.items()):
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del tensors[key]
            blocks, scales, values = encode_mxfp4(tensor.float().transpose(1, 2).contiguous())
            tensors[f"{key}_blocks"], tensors[f"{key}_scales"] = blocks, scales
            stands[key] = values.transpose(1, 2)
    _write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return stands


def _write(folder: Path, tensors: dict[str, torch.Tensor], scheme: dict[str, object]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
