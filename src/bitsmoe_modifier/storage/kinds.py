"""Which kind of byte the experts' tensors are, in checkpoints of this format and of compressed-tensors' others."""

#: kind -> what the last part of a tensor's name may be
KINDS = {
    "codes": ("codes_in", "codes_out", "weight_packed"),
    "scales": ("steps_in", "steps_out", "weight_scale", "weight_zero_point"),
    "bases": ("basis_in", "basis_in_step", "basis_out", "basis_out_step"),
    "bit-widths": ("widths_in", "widths_out"),
    "dense experts": ("dense_ids", "dense_in", "dense_out"),
    "biases": ("in_bias", "out_bias", "bias"),
    "unpacked weights": ("weight",),
}
_KIND_OF = {leaf: kind for kind, leaves in KINDS.items() for leaf in leaves}


def kind_of(leaf: str) -> str:
    """The kind of a tensor by the last part of its name; "other" for headers, shapes and checksums."""
    return _KIND_OF.get(leaf, "other")


def part_of(kind: str) -> str:
    """Which of the three parts that bits are reported in a kind of byte belongs to: what stands for the weights
    themselves is "codes", what a layer's experts share to be decoded "bases", the rest "metadata"."""
    if kind == "bases":
        return "bases"
    return "metadata" if kind in ("bit-widths", "other") else "codes"
