"""transformers' and compressed-tensors' side: checkpoints with packed experts load by `from_pretrained`.

In: a checkpoint's folder. Out: a model whose experts are `BitsMoEExperts`.
May import: sources, runtime, method, storage.
"""
