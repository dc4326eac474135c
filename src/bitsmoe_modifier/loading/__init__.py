"""transformers' and compressed-tensors' side: checkpoints with packed experts load by `from_pretrained`.

In: a checkpoint's folder. Out: a model whose experts are `BitsMoEExperts`.
May import: sources, runtime, method, storage.
"""

import compressed_tensors  # noqa: F401 - its import registers the loader, which must not happen amid this room's own
