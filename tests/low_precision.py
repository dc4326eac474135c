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
        exponent = max(-100, int(torch.tensor(max(2.0**-98, *(abs(v) for v in group))).log2().floor()) - 2)
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


def encode_channel_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scales ``[N, 1]`` in bf16, values): 8-bit floats with a scale per row."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).clamp_min(2**-60).bfloat16()
    codes = (weight.float() / scales.float()).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * scales.float()


def encode_integers(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool = True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors of compressed-tensors' pack-quantized, values) of ``[N, K]``.

    An integer is stored 2^(bits - 1) too large; those of a row follow each other in one stream of bits that fills
    32-bit words from their lowest bit on. Zero points are streams along the rows.
    """
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    half = 2 ** (bits - 1)
    if symmetric:
        scale, zero = (
            (grouped.abs().amax(-1) / (half - 0.5)).clamp_min(2**-60).bfloat16(),
            torch.zeros(rows, columns // group),
        )
    else:
        scale = ((high - low) / (2 * half - 1)).clamp_min(2**-60).bfloat16()
        zero = (-half - (low / scale.float()).round()).clamp(-half, half - 1)
    codes = ((grouped / scale.float()[..., None]).round() + zero[..., None]).clamp(-half, half - 1)
    values = ((codes - zero[..., None]) * scale.float()[..., None]).view(rows, columns)
    stored = {
        "weight_packed": bit_stream(codes.view(rows, columns), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        stored["weight_zero_point"] = bit_stream(zero.T, bits).T.contiguous()
    return stored, values


def bit_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words ``[rows, words]`` of whole numbers, written digit by digit."""
    words = []
    for row in codes.tolist():
        digits = "".join(format(int(code) + 2 ** (bits - 1), f"0{bits}b")[::-1] for code in row)
        digits += "0" * (-len(digits) % 32)
        unsigned = [int(digits[at : at + 32][::-1], 2) for at in range(0, len(digits), 32)]
        words.append([word - 2**32 if word >= 2**31 else word for word in unsigned])
    return torch.tensor(words, dtype=torch.int32)


def encode_nvfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors of compressed-tensors' nvfp4-pack-quantized, values) of ``[N, K]``: E2M1, E4M3 per 16, one divisor."""
    rows, columns = weight.shape
    divisor = torch.tensor([448 * 6 / float(weight.float().abs().max())])
    grouped = weight.float().view(rows, -1, 16)
    scales = (grouped.abs().amax(-1) / 6 * divisor).to(torch.float8_e4m3fn)
    levels, packed = torch.tensor(list(_E2M1)), torch.empty(rows, columns // 2, dtype=torch.uint8)
    values = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        nibbles = []
        for column in range(columns):
            scale = float(scales[row, column // 16].float())
            value = float(weight[row, column])
            wanted = abs(value) * float(divisor) / scale if scale else 0.0
            level = float(levels[(levels - wanted).abs().argmin()])
            nibbles.append(_E2M1[level] | (8 if value < 0 else 0))
            values[row, column] = (-level if value < 0 else level) * scale / divisor.double().item()
        packed[row] = torch.tensor([nibbles[i] | nibbles[i + 1] << 4 for i in range(0, columns, 2)])
    stored = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divisor}
    return stored, values.float()


#: by kind, the weights' part of the config group and its format
_COMPRESSED = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4-zero": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int3": ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 16}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
    ),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}


def encode_compressed(kind: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what compressed-tensors stores under a module's name, values) of a weight ``[N, K]``."""
    if kind == "nvfp4":
        return encode_nvfp4(weight)
    if kind == "mxfp4":
        blocks, scales, values = encode_mxfp4(weight)
        return {"weight_packed": blocks.flatten(-2), "weight_scale": scales}, values
    if kind.startswith("fp8"):
        codes, scale, values = encode_fp8(weight, 32) if kind == "fp8-block" else encode_channel_fp8(weight)
        return {"weight": codes, "weight_scale": scale}, values
    return encode_integers(weight, int(kind[3]), 16 if kind == "int3" else 32, not kind.endswith("zero"))


def publish_compressed(folder: Path, kind: str, everything: bool = False) -> dict[str, torch.Tensor]:
    """Rewrite a saved model's routed experts as Kimi-K2 has them, everything else in bf16 and on the list ``ignore``.

    With ``everything`` attention, dense layers and shared experts too. Returns what they stand for.
    """
    tensors, stands = load_file(folder / "model.safetensors"), {}
    for key in list(tensors):
        linear = key.endswith(("_proj.weight", "_proj_with_mqa.weight", ".w1.weight", ".w2.weight", ".w3.weight"))
        if linear and (everything or ".experts." in key):
            stored, stands[key] = encode_compressed(kind, tensors.pop(key))
            tensors.update({f"{key.removesuffix('weight')}{leaf}": one for leaf, one in stored.items()})
    whole, weights = _COMPRESSED[kind]
    weights = {**weights, "symmetric": not kind.endswith("zero"), "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    outside = ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up).*"]
    ignore = ["lm_head", *([] if everything else outside)]
    scheme = {"quant_method": "compressed-tensors", "format": whole, "config_groups": {"group_0": group}}
    _write(folder, tensors, {**scheme, "quantization_status": "compressed", "ignore": ignore})
    return stands


def publish_v4(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrite a saved DeepSeek-V4: experts of MXFP4 in int8, other Linears of FP8, all scales E8M0 under ``.scale``."""
    tensors, stands = load_file(folder / "model.safetensors"), {}
    for key, tensor in list(tensors.items()):
        name = key.removesuffix(".weight")
        if ".experts." in key:
            blocks, scales, stands[key] = encode_mxfp4(tensor)
            tensors[key] = blocks.flatten(-2).view(torch.int8)
            tensors[f"{name}.scale"] = scales.view(torch.float8_e8m0fnu)
        elif key.endswith((".wq_a.weight", ".wq_b.weight", ".wkv.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            exponents = torch.zeros(-(-tensor.shape[0] // 32), -(-tensor.shape[1] // 32)).fill_(-9)
            spread = exponents.repeat_interleave(32, 0).repeat_interleave(32, 1)[: tensor.shape[0], : tensor.shape[1]]
            tensors[key] = (tensor.float() / 2**spread).to(torch.float8_e4m3fn)
            tensors[f"{name}.scale"] = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
            stands[key] = tensors[key].float() * 2.0**spread
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}
    _write(folder, tensors, scheme, expert_dtype="fp4")
    return stands


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


def _write(folder: Path, tensors: dict[str, torch.Tensor], scheme: dict[str, object], **fields: object) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields, "quantization_config": scheme}))
