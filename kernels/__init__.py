"""Triton kernels for the stored layout of BitsMoE experts, each with a plain fp32 oracle beside it."""
