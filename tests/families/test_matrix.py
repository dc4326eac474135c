"""The matrix has a row for every family of the installed transformers: a new family shows up here, as a failure."""

import pytest
import torch
from building import config_of
from enumerate_modules import modules_with_experts
from models_page import FAMILIES
from others import OTHERS
from transformers import CONFIG_MAPPING

from bitsmoe_modifier import CheckpointError
from bitsmoe_modifier.sources.classes import auto_class_of, build_published


def experts_classes(model: torch.nn.Module) -> set[tuple[str, str]]:
    """(module of transformers, name) of the classes in a model that are called experts."""
    kinds = {type(module) for module in model.modules()}
    return {(kind.__module__.split(".")[-2], kind.__name__) for kind in kinds if kind.__name__.endswith("Experts")}


def test_every_module_with_experts_has_a_row() -> None:
    covered: set[tuple[str, str]] = set()
    with torch.device("meta"):
        for family in FAMILIES:
            covered |= experts_classes(build_published(config_of(family)))
    modules = {module for module, _ in covered}
    found = modules_with_experts()
    assert len(found) > 60, "transformers keeps them elsewhere now"
    assert not found.keys() - modules - OTHERS.keys(), "families without a row in tests/families"
    assert not OTHERS.keys() - found.keys(), "families that are no longer there"


@pytest.mark.parametrize("module", OTHERS)
def test_what_text_cannot_calibrate_is_refused_by_name(module: str) -> None:
    model_type, words = OTHERS[module]
    with pytest.raises(CheckpointError, match=rf"{model_type}.*{words}"):
        auto_class_of(CONFIG_MAPPING[model_type]())
