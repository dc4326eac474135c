"""A stored layer that runs: `BitsMoEExperts` in plain PyTorch, or on the Triton kernels of `bitsmoe_kernels`.

In: `PackedExperts`, hidden states, expert ids and routing weights. Out: the layer's output.
May import: method, storage.
"""
