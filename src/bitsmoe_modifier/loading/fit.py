"""Whether the files and config.json of a checkpoint belong together, beside its packed experts.

With a quantizer, transformers takes tensors of any shape and makes up what is missing at the sizes that config.json
states: a wrong file would fail in the middle of the first forward, and a forged one could ask for any amount of memory.
"""

from collections.abc import Mapping, Sequence

import torch

from ..errors import CheckpointError
from ..storage.shards import Stored
from .transformers_api import (
    PreTrainedModel,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)

#: What a model may need beyond its files: new heads, buffers. Below this, no size is suspicious.
_MADE_UP_BYTES = 64 * 2**20


def check_fits(model: PreTrainedModel, found: Mapping[str, Stored]) -> None:
    """Compare the headers of the files with the model that config.json describes, on the meta device.

    Args:
        model: with every module in the form in which the files store it.
        found: every tensor of the files.

    Raises:
        CheckpointError: naming the tensor whose shape differs, or that no file holds although its size exceeds
            everything that the files do hold.
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    present = set()
    for key in sorted(found, key=dot_natural_key):
        name, converter = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, converter = key, None
        present.add(name)
        if converter is None and name in expected:
            _check_shape(found[key], name, expected[name], _packed_zero_points(model, name, expected[name]))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    absent = {name: t for name, t in wanted.items() if name not in present and name not in tied}
    # experts that stay dense are put together from several stored tensors, which the converters name
    needed = sum(tensor.nbytes for tensor in absent.values())
    stored = sum(torch.Size(part.shape).numel() for part in found.values())
    if needed > max(_MADE_UP_BYTES, 8 * stored):
        largest = max(absent, key=lambda name: absent[name].nbytes)
        raise CheckpointError(
            f"{largest}: config.json makes it {tuple(absent[largest].shape)}, no file holds it, and what no file holds "
            f"would take {needed / 1e9:.3g} GB; the checkpoint is incomplete or config.json belongs to another one"
        )


def _packed_zero_points(model: PreTrainedModel, name: str, expected: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes in which zero points of integer weights are stored, 32 bits to a number, which the model unpacks later."""
    prefix, _, leaf = name.rpartition(".")
    scheme = getattr(model.get_submodule(prefix), "quantization_scheme", None) if leaf == "weight_zero_point" else None
    bits = getattr(getattr(scheme, "weights", None), "num_bits", None)
    if not bits or not expected.dim():
        return []
    rows = expected.shape[0]
    # bit after bit; or, where bits do not divide 32, whole numbers to an int32
    return [(count, *expected.shape[1:]) for count in (-(-rows * bits // 32), -(-rows // (32 // bits)))]


def _check_shape(stored: Stored, name: str, expected: torch.Tensor, others: Sequence[tuple[int, ...]] = ()) -> None:
    if _essential(stored.shape) not in {_essential(tuple(shape)) for shape in (expected.shape, *others)}:
        raise CheckpointError(
            f"{stored.file}: {stored.key} is {stored.shape}, config.json makes {name} {tuple(expected.shape)}; they do "
            "not belong together"
        )


def _essential(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its ones, which formats add and drop at will."""
    return tuple(size for size in shape if size != 1)
