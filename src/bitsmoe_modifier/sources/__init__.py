"""What a user brings: the unquantized model (where it is, whether it can be quantized) and text.

In: a folder, a hub id, a file or a data set. Out: a model's configuration and files, token rows.
May import: runtime, method, storage.
"""
