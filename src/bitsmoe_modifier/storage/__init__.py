"""The stored format (docs/format.md): how packed experts lie in tensors, and tensors in files.

In: codes, scales, bit-widths and bases of a layer. Out: `PackedExperts`, its bytes, and back; the headers of
safetensors files; folders and files that appear whole or not at all.
May import: errors. Knows no framework but torch and safetensors.
"""
