"""Loading through transformers: ``AutoModelForCausalLM.from_pretrained`` reads checkpoints with packed experts.

transformers builds the model on the meta device and hands it to the quantizer of the checkpoint's method before any
weight is read. For checkpoints with packed experts that is `BitsMoEHfQuantizer` (see `registration`). It replaces every
experts module by an empty `BitsMoEExperts` of the sizes that the files' headers state, and lets the stock loader fill
them: dense experts are never allocated. What it overrides takes and passes on arguments that it does not know.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import CheckpointError
from ..method.gating import gating_of
from ..runtime.experts import BitsMoEExperts
from ..storage.layout import ExpertsLayout
from ..storage.mtp import is_counted_mtp
from ..storage.packed import TENSOR_NAMES, PackedExperts, check_content, check_structure
from ..storage.shards import Stored, checkpoint_files, file_names, packed_modules, read_structure, scan
from . import format as bitsmoe_format
from .compressed_tensors_api import match_named_modules
from .decoding import refuse_misread
from .fit import check_fits
from .transformers_api import (
    CompressedTensorsHfQuantizer,
    PreTrainedModel,
    WeightRenaming,
    get_model_conversion_mapping,
    rename_source_key,
)
from .transforms import check_transforms

_LINEAR_SUFFIXES = (".weight_packed", ".weight_scale")


class BitsMoEHfQuantizer(CompressedTensorsHfQuantizer):
    """The stock compressed-tensors quantizer for checkpoints that have packed experts too.

    While weights are loaded the stock class's methods see the other config groups only: they take the first group that
    names experts for all experts, and compressed-tensors 0.17 fails on targets that are not Linear.
    """

    def __init__(self, quantization_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, *args, **kwargs)
        self._whole: Any = self.quantization_config.quantization_config
        self._schemes = bitsmoe_format.bitsmoe_schemes(self._whole)
        #: whether the checkpoint has experts that another compressed-tensors format packs as Linears
        self._packed_linears = False

    def _show(self, groups: Any) -> None:
        """Let the stock class's methods see this configuration."""
        self.quantization_config.quantization_config = self.compressor.quantization_config = groups

    def _other_groups(self) -> Any:
        others = {name: group for name, group in self._whole.config_groups.items() if group not in self._schemes}
        return self._whole.model_copy(update={"config_groups": others})

    def update_tp_plan(self, config: Any, *args: Any, **kwargs: Any) -> Any:
        """Up to transformers 5.20, what is called between reading config.json and opening files: checks their list."""
        _check_list_of_files(config)
        return super().update_tp_plan(config, *args, **kwargs)

    def update_attn_implementation(self, config: Any, *args: Any, **kwargs: Any) -> Any:
        """The same from transformers 5.21 on."""
        _check_list_of_files(config)
        base: Any = super()  # older versions have no such method, and call none
        return base.update_attn_implementation(config, *args, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *args: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("packed experts are loaded from safetensors files, not from a state dict")
        if self.quantization_config.dequantize and self.quantization_config.is_quantization_compressed:
            raise CheckpointError(
                "experts packed as bitsmoe run packed: load without `dequantize=True` / `run_compressed=False` "
                "(for dense weights use `bitsmoe export`; to quantize again, start from the unquantized model)"
            )
        folder = Path(checkpoint_files[0]).parent
        check_transforms(folder)
        # set for a model that was saved after its Linears had been decompressed; it would make the loaded model forget
        # its quantization_config, and a checkpoint saved from it would not say that its experts are packed
        self.quantization_config.dequantize = False
        found = scan(checkpoint_files)
        self._packed_linears = any(".experts." in key and key.endswith(_LINEAR_SUFFIXES) for key in found)
        if self._packed_linears and (folder / "config.json").is_file():
            refuse_misread(folder)
        self._show(self._other_groups())
        super()._process_model_before_weight_loading(model, *args, checkpoint_files=checkpoint_files, **kwargs)
        if len(self._schemes) == len(self._whole.config_groups):
            # the hook would find nothing to decompress, but mark the configuration as decompressed
            self.compressor.remove_decompression_hook(model)
        _widen_scales(model)
        stored = {n: parts for n, parts in packed_modules(found).items() if not is_counted_mtp(f"{n}.", model.config)}
        self._replace_experts(model, stored)
        check_fits(model, found)

    def _replace_experts(self, model: PreTrainedModel, stored: dict[str, dict[str, Stored]]) -> None:
        """Put an empty `BitsMoEExperts` in the place of every experts module that the checkpoint stores packed."""
        schemes = {name: scheme for scheme in self._schemes for name in _matches(model, scheme.targets)}
        tensors = _by_module_name(model, schemes, stored)
        for name in sorted(schemes.keys() - tensors.keys()):
            raise CheckpointError(
                f"{name}: config.json says that its experts are packed, but no file holds tensors of it; "
                "the checkpoint is incomplete, fetch it again"
            )
        for name in sorted(tensors.keys() - schemes.keys()):
            raise CheckpointError(
                f"{file_names(tensors[name].values())}: holds packed experts {name}, which config.json or the model "
                "does not have; config.json and the files do not belong together"
            )
        for name, scheme in schemes.items():
            replaced = model.get_submodule(name)
            experts = _placeholder(tensors[name], replaced, name)
            bitsmoe_format.attach(experts, scheme)
            model.set_submodule(name, experts)

    def _process_model_after_weight_loading(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._show(self._whole)
        packed = {name: module for name, module in model.named_modules() if isinstance(module, BitsMoEExperts)}
        for name, experts in tqdm(packed.items(), desc="Checking packed experts", disable=not packed):
            experts.requires_grad_(False)
            _check_loaded(experts, name)
        _finish_casting(model)
        _cast_when_decompressed(model)
        return super()._process_model_after_weight_loading(model, *args, **kwargs)

    def _dequantize(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> PreTrainedModel:
        raise CheckpointError("experts packed as bitsmoe stay packed; `bitsmoe export` writes dense weights")

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Let the stock class decompress experts that other groups pack as Linears.

        It rewrites every experts converter for packed Linears, also where no such tensors exist; the converters of
        experts that stayed dense would then find nothing.
        """
        if not self._packed_linears:
            return [*weight_conversions, *self.get_weight_conversions()]
        return super().update_weight_conversions(weight_conversions, *args, **kwargs)


def _check_list_of_files(config: Any) -> None:
    """Refuse a folder whose index names files that are missing or elsewhere, before they are opened."""
    folder = Path(getattr(config, "name_or_path", None) or "")
    if (folder / "config.json").is_file():
        checkpoint_files(folder)


def _float_linears(model: nn.Module) -> Iterator[nn.Linear]:
    """Linears whose weights are stored as 8- or 4-bit floats."""
    for module in model.modules():
        weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if isinstance(module, nn.Linear) and weights is not None and weights.type == "float":
            yield module


def _widen_scales(model: nn.Module) -> None:
    """Let the scales of 8-bit floats be loaded in float32, which they are stored in: as the model's, bfloat16, they
    would be off by up to 2⁻⁹, and all weights of a block with them."""
    for module in _float_linears(model):
        scale = module._parameters.get("weight_scale")
        if scale is not None and scale.is_floating_point() and scale.itemsize == 2:
            module.weight_scale = nn.Parameter(scale.to(torch.float32), requires_grad=False)


def _cast_when_decompressed(model: Any) -> None:
    """Give weights that compressed-tensors decodes before the first forward the model's dtype.

    It leaves them in that of their scales, or in bfloat16.
    """
    linears = list(_float_linears(model))
    if not linears:
        return

    def cast(*_: Any) -> None:
        for module in linears:
            if module.weight.itemsize > 1:
                module.weight.data = module.weight.data.to(model.dtype)
        handle.remove()

    handle = model.register_forward_pre_hook(cast)


def _finish_casting(model: Any) -> None:
    """Give what the files hold in fewer bits than the model was asked for its dtype.

    With a quantizer, transformers up to 5.20 does not cast the tensors that it renames while loading, such as Mixtral's
    routers, and the first forward fails on two dtypes. Of Nemotron-H it renames all but the head, so the dtype asked
    for is the config's, not that of the first parameter, which is ``model.dtype``.
    """
    dtype = model.config.dtype or model.dtype
    for module in model.modules():
        if isinstance(module, BitsMoEExperts) or getattr(module, "quantization_scheme", None) is not None:
            continue
        for parameter in module.parameters(recurse=False):
            narrow = parameter.is_floating_point() and parameter.dtype.itemsize <= dtype.itemsize
            if narrow and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def experts_sizes(experts: nn.Module) -> tuple[int, int, int]:
    """(E, H, I) of one of transformers' experts modules, on any device.

    Either fused ones, or the list of MLPs that transformers makes of Llama 4's when a checkpoint is quantized.

    Raises:
        CheckpointError: when the module is neither.
    """
    if isinstance(experts, nn.ModuleList) and all(hasattr(expert, "down_proj") for expert in experts):
        first: Any = experts[0]
        return len(experts), *first.down_proj.weight.shape
    if getattr(experts, "has_post_expert_norm", False):  # from transformers 5.24 on: Muse Spark
        raise CheckpointError(
            f"the experts class {type(experts).__name__} normalizes the output of each expert, which packed experts do "
            "not do; they cannot take its place"
        )
    down, rows = getattr(experts, "down_proj", None), 2
    gate_up = getattr(experts, "gate_up_proj", None)
    if getattr(experts, "has_gate", True) is False:
        gate_up, rows = getattr(experts, "up_proj", None), 1
    if not isinstance(gate_up, torch.Tensor) or not isinstance(down, torch.Tensor) or gate_up.ndim != 3:
        raise CheckpointError(
            f"the experts class {type(experts).__name__} has no fused gate_up_proj and down_proj; "
            "packed experts cannot take its place; docs/models.md lists the families that they can"
        )
    hidden, intermediate = down.shape[1:]
    if gate_up.shape[1:] != (rows * intermediate, hidden):  # stored [E, H, 2I] and [E, I, H]
        hidden, intermediate = intermediate, hidden
    return gate_up.shape[0], hidden, intermediate


def _matches(model: nn.Module, targets: list[str]) -> list[str]:
    """Names of the outermost modules that the targets match."""
    names: list[str] = []
    for name, _ in match_named_modules(model, targets):  # parents come before their children
        if not names or not name.startswith(f"{names[-1]}."):
            names.append(name)
    return names


def _by_module_name(
    model: PreTrainedModel, expected: Mapping[str, Any], stored: dict[str, dict[str, Stored]]
) -> dict[str, dict[str, Stored]]:
    """Rename the checkpoint's module names to the model's, as transformers will rename the tensors."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    known = {f"{name}.layout": True for name in expected}
    renamed = {}
    for prefix, tensors in stored.items():
        key, _ = rename_source_key(f"{prefix}.layout", renamings, [], model.base_model_prefix, known)
        name = key.removesuffix(".layout") if f"{prefix}.layout" not in known else prefix
        renamed[name] = {leaf: part for leaf, part in tensors.items() if not _is_moved(prefix, leaf, renamings)}
    return renamed


def _is_moved(prefix: str, leaf: str, renamings: list[WeightRenaming]) -> bool:
    """Whether a tensor beside packed ones is another module's (a router's bias is stored under its experts' name)."""
    if leaf in TENSOR_NAMES:
        return False
    own, moved = (rename_source_key(f"{prefix}.{end}", renamings, [])[0] for end in ("layout", leaf))
    return not moved.startswith(own.removesuffix("layout"))


def _placeholder(stored: dict[str, Stored], replaced: nn.Module, name: str) -> BitsMoEExperts:
    """An empty `BitsMoEExperts` for the stored tensors, which must fit each other and the module that it replaces."""
    layout, tensors = read_structure(stored, name)
    _check_sizes(layout, replaced, f"{file_names(stored.values())}: {name}")
    packed = PackedExperts(**{leaf: _empty(value) for leaf, value in tensors.items()})
    return BitsMoEExperts(packed, gating_of(replaced)).to("meta")


def _empty(value: torch.Tensor | tuple[torch.dtype, tuple[int, ...]]) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.empty(value[1], dtype=value[0], device="meta")


def _check_sizes(layout: ExpertsLayout, replaced: nn.Module, where: str) -> None:
    """Compare the stored header with the module that config.json describes."""
    stored = {
        "num_experts": layout.num_experts,
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.intermediate_size,
        "has_bias": bool(layout.has_bias),
    }
    model = (*experts_sizes(replaced), bool(getattr(replaced, "has_bias", False)))
    for (field, value), expected in zip(stored.items(), model, strict=True):
        if value != expected:
            raise CheckpointError(
                f"{where}.layout: {field} is {value}, config.json makes it {expected}; they do not belong together"
            )


def _check_loaded(experts: BitsMoEExperts, name: str) -> None:
    """Check what was loaded into a placeholder, wherever a device map put it."""
    expected = experts.spec
    if hasattr(experts, "_hf_hook"):  # offloaded by accelerate: the tensors are present inside this context only
        from accelerate.utils import align_module_device

        with align_module_device(experts, torch.device("cpu")):
            packed = experts.packed
            _check_packed(packed, expected, name)
    else:
        _check_packed(experts.packed, expected, name)


def _check_packed(packed: PackedExperts, expected: ExpertsLayout, name: str) -> None:
    for leaf, tensor in packed.items():
        if tensor.is_meta:
            raise CheckpointError(f"{name}.{leaf}: was not loaded; the checkpoint is incomplete, fetch it again")
    if check_structure(dict(packed.items()), name) != expected:
        raise CheckpointError(f"{name}.layout: changed while loading; the files are being written to")
    check_content(packed, name)
