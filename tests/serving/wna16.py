"""vLLM's W4A16 product on CPU in plain PyTorch: its own runs on AVX-512 machines only, and not in float32."""

import torch


def gemm(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """``input @ W + bias`` with the weights as vLLM's ``CPUWNA16LinearKernel`` lays them out.

    Args:
        input: ``[..., K]``.
        q_weight: int32 ``[N / 16, 2 K]``: blocks of 16 outputs, for every input the two words of their 4-bit codes.
        scales: ``[groups along K, N]``; a code means ``(code - 8) * scale``.
        zeros: none for symmetric weights.
        bias: ``[N]``.
        pack_factor: 8 codes in a word.
        isa_hint: not used.
    """
    assert zeros is None
    assert pack_factor == 8
    blocks, words = q_weight.shape
    shifts = torch.arange(0, 32, 4)
    codes = (q_weight.view(blocks, words // 2, 2, 1) >> shifts) & 15
    weight = (codes - 8).permute(1, 0, 2, 3).reshape(words // 2, 16 * blocks).to(scales.dtype)
    y = input @ (weight * scales.repeat_interleave(len(weight) // len(scales), 0))
    return y if bias is None else y + bias
