"""The compressed-tensors format "bitsmoe": enum member, compressor, and the scheme that config.json shows.

Importing this module registers the format. compressed-tensors' `CompressionFormat` is a closed enum that pydantic
compiled into its models, so the member is added at run time and the models are rebuilt (see `versions`).

A reader that does not know the format must fail instead of starting with random experts. Both known ones do:
transformers rejects the unknown ``format`` of the config group, and vLLM finds through ``targets`` a scheme for the
expert projections that none of its kernels takes; the targets therefore match an experts module and what lies below it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import CheckpointError
from ..runtime.experts import BitsMoEExperts
from ..storage.packed import TENSOR_NAMES
from .claims import METHOD as FORMAT
from .compressed_tensors_api import (
    BaseCompressor,
    CompressionFormat,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)


def _extend_enum() -> None:
    """Make ``CompressionFormat("bitsmoe")`` valid, also inside the pydantic models; does nothing the second time."""
    if FORMAT in CompressionFormat._value2member_map_:
        return
    member = str.__new__(CompressionFormat, FORMAT)
    member._name_ = member._value_ = FORMAT
    member.__objclass__ = CompressionFormat
    member._sort_order_ = len(CompressionFormat._member_names_)
    CompressionFormat._member_names_.append(FORMAT)
    CompressionFormat._member_map_[FORMAT] = member
    CompressionFormat._value2member_map_[FORMAT] = member
    type.__setattr__(CompressionFormat, FORMAT, member)
    QuantizationScheme.model_rebuild(force=True)
    QuantizationConfig.model_rebuild(force=True)


_extend_enum()


class BitsMoEScheme(QuantizationScheme):
    """The config group of packed experts. It cannot be given another format: the experts could not be written in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "format" and value != FORMAT:
            raise CheckpointError(
                f"experts packed as {FORMAT!r} cannot be saved as {getattr(value, 'value', value)!r}; drop "
                "`save_compressed=False` and `quantization_format` from save_pretrained (for dense weights use "
                "BitsMoEExperts.dense_weights)"
            )
        super().__setattr__(name, value)


@BaseCompressor.register(name=FORMAT)
class BitsMoECompressor(BaseCompressor):
    """Keeps compressed-tensors from touching `BitsMoEExperts`, which are packed from the start and run packed."""

    @classmethod
    def can_compress(cls, module_type: type, *args: Any, **kwargs: Any) -> bool:
        """True for `BitsMoEExperts`."""
        return issubclass(module_type, BitsMoEExperts)

    @classmethod
    def compression_param_names(cls, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Names of all tensors that a packed module may have."""
        return TENSOR_NAMES

    @classmethod
    def compress_module(cls, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Leave the packed module as it is; refuse any other."""
        if not isinstance(module, BitsMoEExperts):
            raise CheckpointError(
                f"a {type(module).__name__} cannot be packed as {FORMAT!r} on saving; quantize with BitsMoEModifier"
            )
        module.quantization_status = QuantizationStatus.COMPRESSED

    @classmethod
    def decompress_module(cls, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """Leave the packed module as it is: compressed-tensors calls this before the first forward."""


#: container of the layers, number of the layer, last part
_NUMBERED = re.compile(r"(?:.*\.)?(?<!mtp\.)((?:mtp\.)?[^.]+)\.(\d+)\.(?:[^.]+\.)?([^.]+)")


def targets_of(names: Iterable[str]) -> list[str]:
    """Regular expressions (``re:...``) that match the given experts modules, what lies below them, and nothing else.

    ``model.layers.3.mlp.experts`` and its like become one expression, in which the last number is spelled out. What
    lies before it and the name of the block after it are left open, because checkpoints and vLLM rename them
    (``model.language_model.layers``, ``block_sparse_moe.experts``), but for the ``mtp`` of a layer for multi-token
    prediction, which `is_packed` looks for.
    """
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    targets = []
    for name in names:
        numbered = _NUMBERED.fullmatch(name)
        if numbered:
            layers[numbered[1], numbered[3]].append(int(numbered[2]))
        else:
            targets.append(rf"re:{re.escape(name)}(?:\..+)?$")
    for (container, leaf), numbers in layers.items():
        spelled = "|".join(str(n) for n in sorted(set(numbers)))
        targets.append(rf"re:(?:.*\.)?{re.escape(container)}\.(?:{spelled})\.(?:[^.]+\.)?{re.escape(leaf)}(?:\..+)?$")
    return targets


def make_scheme(names: Iterable[str], group_size: int) -> BitsMoEScheme:
    """The scheme to attach to the experts modules of the given names (all those quantized with one setting).

    Args:
        names: full module names, e.g. ``model.layers.0.mlp.experts``.
        group_size: columns along I that share a scale. It is shown in config.json only; readers take every size from
            the stored layout. So is the number of bits there, which compressed-tensors wants as a whole number.
    """
    args = QuantizationArgs(num_bits=2, type="int", strategy="group", group_size=group_size, symmetric=True)
    return BitsMoEScheme(targets=targets_of(names), format=FORMAT, weights=args)


def attach(module: BitsMoEExperts, scheme: QuantizationScheme) -> None:
    """Mark ``module`` as compressed under ``scheme``: the stock save path then writes config.json by itself.

    Raises:
        CheckpointError: when a scheme that was read from config.json does not hold together.
    """
    if not isinstance(scheme, BitsMoEScheme):
        try:
            scheme = BitsMoEScheme(**scheme.model_dump())
        except ValueError as error:
            raise CheckpointError(f"config.json: the group of the packed experts is not valid: {error}") from None
    module.quantization_scheme = scheme
    module.quantization_status = QuantizationStatus.COMPRESSED


def bitsmoe_schemes(config: QuantizationConfig | None) -> list[QuantizationScheme]:
    """The config groups of ``config`` that describe packed experts."""
    groups = {} if config is None else config.config_groups
    return [scheme for scheme in groups.values() if scheme.format == FORMAT]
