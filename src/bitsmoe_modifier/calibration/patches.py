"""Faults of llm-compressor 0.14 that this package meets in other people's models; importing this module patches them.

- Norms that multiply by ``1 + weight`` (Qwen3-Next, Qwen3.5, Gemma) are replaced by plain ones during calibration and
  put back as ``(1 + weight) - 1``, which rounds a bfloat16 weight to a multiple of 2⁻⁸ or more. A norm that no modifier
  has touched gets its own weight back. All are put back as they were before the model was dispatched to a GPU, and stop
  it from running there once more (`mtp`); here they are dispatched as what stood in for them.
- Linearizing a model keeps the fused experts of all layers until the last one is done, which doubles the memory of
  an MoE model. `linearizing` lets go of each layer's, and knows more families.
- Llama 4's experts are linearized from ``config.text_config``, which a text-only Llama 4 does not have.
- ``oneshot(model="FOLDER")`` loads every folder through `AutoModelForCausalLM`, which leaves out the vision tower of
  some models and knows others not at all. Here it loads the class that config.json names.
- It saves what transformers loaded, without the layers for multi-token prediction; they are kept (`loading.inventory`).
- Saving ties a head to the embedding where both hold the same numbers, though the published model has both; then the
  checkpoint lacks one of them, and classes that never tie would start with a random one. Only tied models are now.
- Saved into a folder for the second time, a checkpoint in one file and one in several do not replace each other.
- It insists on the model's processor even for rows of tokens, and image processors need packages that text does not.
  Where the processor cannot be made, the tokenizer stands in, and the processor's files are taken along as they are.
"""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import get_cache_init_kwargs, offload_module
from compressed_tensors.offload.cache import OffloadCache
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from llmcompressor.modeling.offset_norm import CalibrationOffsetNorm
from loguru import logger
from torch import nn
from transformers.utils import cached_file

from ..loading.inventory import check_nothing_lost, keep_beside, take_inventory
from ..loading.keeping import keep_as_stored
from ..loading.source import load_source
from ..loading.source_keys import restore_keys
from ..sources.classes import PROCESSOR_FILES, has_processor, load_published
from ..sources.model import load_tokenizer
from ..sources.precision import is_low_precision_source
from ..storage.shards import drop_older
from .given_rows import check_dataset
from .linearizing import experts_modules, linearize
from .recipe_content import bitsmoe_modifiers, check_places
from .saving import check_saving
from .stored_experts import read_other_experts


def _install_norms() -> None:
    restore = CalibrationOffsetNorm.restore
    if getattr(restore, "exact", False):
        return

    def restore_exactly(norm: CalibrationOffsetNorm, original: Any) -> nn.Module:
        untouched = (1.0 + original.weight.data.float()).to(original.weight.dtype)
        if not torch.equal(norm.weight.data.to(untouched.device), untouched):
            restore(norm, original)
        if isinstance(norm._parameters, OffloadCache) and not isinstance(original._parameters, OffloadCache):
            offload_module(original, **get_cache_init_kwargs(norm))
        return original

    restore_exactly.exact = True  # type: ignore[attr-defined]
    CalibrationOffsetNorm.restore = restore_exactly  # type: ignore[method-assign, assignment]


def _install_llama4() -> None:
    original = Llama4LinearExperts.from_experts_module.__func__  # type: ignore[attr-defined]
    if getattr(original, "takes_text_config", False):
        return

    def from_experts_module(cls: type[Llama4LinearExperts], experts: nn.Module, config: Any) -> Any:
        whole = config if hasattr(config, "text_config") else SimpleNamespace(text_config=config)
        return original(cls, experts, whole)

    from_experts_module.takes_text_config = True  # type: ignore[attr-defined]
    Llama4LinearExperts.from_experts_module = classmethod(from_experts_module)  # type: ignore[method-assign, assignment]


class _Published:
    """Stands in for `AutoModelForCausalLM` where `oneshot` loads a folder."""

    @classmethod
    def from_pretrained(cls, folder: Any, config: Any, **kwargs: Any) -> Any:
        if Path(folder).is_dir() and is_low_precision_source(Path(folder)):
            model = load_source(Path(folder), kwargs.get("dtype", "auto"))
            model.source_inventory = take_inventory(model, Path(folder))
            return model
        model = load_published(folder, config, **kwargs)
        place = _place(folder, **kwargs)
        if place is not None:
            model.source_inventory = take_inventory(model, place)
        return model


def _place(source: Any, cache_dir: Any = None, revision: str | None = None, **_: Any) -> Path | None:
    """The folder of a model that was just loaded, of the hub: in its cache; None where it has no safetensors files."""
    if Path(source).is_dir():
        return Path(source)
    found = cached_file(source, "config.json", cache_dir=cache_dir, revision=revision, local_files_only=True)
    folder = Path(str(found)).parent
    return folder if any(folder.glob("*.safetensors")) else None


def _install_validation() -> None:
    """Let pass what was decoded on loading: llm-compressor looks at the config.json that it came from.

    Refuse what could not be saved at the end, rows that cannot be read, and recipes of which nothing would be run. This
    is also the place where a run knows both its model and its recipe.
    """
    original = _oneshot.Oneshot.validate_model
    if getattr(original, "knows_decoded", False):
        return

    def validate_model(run: Any, model: Any) -> None:
        source = str(getattr(model, "name_or_path", "") or "")
        stage = run.recipe_args.stage
        check_places(run.recipe, stage)
        ours = bitsmoe_modifiers(run.recipe, stage)
        if ours:
            check_saving(run.output_dir, run.model_args.save_compressed, source)
            data = run.dataset_args
            check_dataset(data.dataset, data.text_column, data.preprocessing_func is not None)
        if getattr(model, "decoded_from", None) is None:
            original(run, model)
        else:
            read_other_experts(model, ours)

    validate_model.knows_decoded = True  # type: ignore[attr-defined]
    _oneshot.Oneshot.validate_model = validate_model


def _install_processors() -> None:
    original, post_process = _entrypoints.initialize_processor_from_path, _oneshot.post_process
    if getattr(original, "falls_back", False):
        return

    def initialize_processor_from_path(model_args: Any, model: Any) -> Any:
        try:
            return original(model_args, model)
        except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
            source = Path(model_args.processor or model.config._name_or_path)
            if not source.is_dir() or not has_processor(source):
                raise
            logger.warning(f"{source}: the tokenizer stands in for the processor ({str(error).strip()[:200]})")
            return load_tokenizer(source)

    def post_process_with_files(*, model_args: Any = None, output_dir: Any = None, **kwargs: Any) -> None:
        decoded_from = getattr(getattr(model_args, "model", None), "decoded_from", None)
        if decoded_from is not None and output_dir is not None:
            keep_as_stored(model_args.model, Path(decoded_from))
        post_process(model_args=model_args, output_dir=output_dir, **kwargs)
        if output_dir is None or not is_source_process():
            return
        model = getattr(model_args, "model", None)
        target = Path(output_dir)
        target /= getattr(kwargs.get("recipe_args"), "stage", None) or ""  # llm-compressor makes a folder of it
        drop_older(target)
        inventory, name = getattr(model, "source_inventory", None), getattr(model, "name_or_path", "")
        source = Path(name) if inventory is None else inventory.folder
        if inventory is not None:
            instead = [one.instead() for one in getattr(model, "packed_mtp", [])]
            treatment = getattr(model, "mtp_treatment", "keep")
            restore_keys(inventory, model, target)
            for sentence in keep_beside(inventory, target, treatment, instead=instead).sentences():
                logger.info(sentence)
            check_nothing_lost(inventory, model, target)
        for file in PROCESSOR_FILES if name else ():  # of a model that came from nowhere, "" is the current folder
            if (source / file).is_file():
                shutil.copyfile(source / file, target / file)

    initialize_processor_from_path.falls_back = True  # type: ignore[attr-defined]
    _entrypoints.initialize_processor_from_path = initialize_processor_from_path
    _oneshot.post_process = post_process_with_files


def _install_ties() -> None:
    saving: Any = importlib.import_module("llmcompressor.transformers.compression.compressed_tensors_utils")
    retie = getattr(saving, "_retie_embeddings", None)  # releases before 0.14.0.1 may do without
    if retie is None or getattr(retie, "only_tied", False):
        return

    def retie_tied(model: Any) -> None:
        if getattr(model, "all_tied_weights_keys", True):  # as loaded; no such attribute: transformers cannot tell
            retie(model)

    retie_tied.only_tied = True  # type: ignore[attr-defined]
    saving._retie_embeddings = retie_tied


_install_norms()
_install_llama4()
_install_ties()
# a function of the same name hides the module as an attribute of its package
_oneshot: Any = importlib.import_module("llmcompressor.entrypoints.oneshot")
_oneshot.linearize_moe, _oneshot.get_non_linearized_moes = linearize, experts_modules
_entrypoints: Any = importlib.import_module("llmcompressor.entrypoints.utils")
_entrypoints.AutoModelForCausalLM = _Published
_install_processors()
_install_validation()
