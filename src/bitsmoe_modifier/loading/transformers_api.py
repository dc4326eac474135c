"""Every name that the loader takes from inside transformers: the one module to read when a release moves something.

Besides these names the loader relies on what `CompressedTensorsHfQuantizer` overrides and is called with:

- 5.17 to 5.20: ``update_tp_plan(config)``, ``update_weight_conversions(conversions)``; the stock class rewrites the
  converters of experts there, by the first config group that names experts in
  ``quantizer.quantization_config.quantization_config``
- 5.21 and later: ``update_attn_implementation(config)`` in the place of the first, ``update_weight_conversions(
  conversions, model)``; experts are decoded while they load, by the first group in
  ``quantizer.compressor.quantization_config``
- all: ``preprocess_model`` calls ``_process_model_before_weight_loading(model, checkpoint_files=…, …)``,
  ``postprocess_model`` calls ``_process_model_after_weight_loading(model, …)``

Elsewhere only the public classes of ``transformers`` itself are used (`AutoConfig` and its like).
"""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

__all__ = [
    "CompressedTensorsHfQuantizer",
    "PreTrainedModel",
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "rename_source_key",
]
