"""Every name that we take from compressed-tensors, its offloading aside: the one module to read when one moves.

Besides these names the format relies on

- `CompressionFormat` being an `enum.Enum` of strings whose members pydantic compiled into `QuantizationScheme` and
  `QuantizationConfig`
- ``compress_module(module)`` and ``decompress_module(module)`` of a registered `BaseCompressor` being called by class,
  the second with ``leave_decompressed=`` from 0.20 on
"""

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.utils import match_named_modules

__all__ = [
    "BaseCompressor",
    "CompressionFormat",
    "QuantizationArgs",
    "QuantizationConfig",
    "QuantizationScheme",
    "QuantizationStatus",
    "match_named_modules",
]
