"""Models in a wrapper are refused with what to give in their place."""

import pytest
import torch
from torch import nn

from bitsmoe_modifier.calibration.targets import find_experts
from bitsmoe_modifier.errors import RecipeError
from helpers import tiny_model


def test_a_compiled_model() -> None:
    compiled = torch.compile(tiny_model("qwen3_moe"), backend="eager")
    with pytest.raises(RecipeError, match=r"went through torch.compile; give what was compiled \(model._orig_mod\)"):
        find_experts(compiled, ["re:.*experts$"], [])


def test_a_model_with_adapters() -> None:
    class Adapted(nn.Module):
        """As PEFT's classes have it."""

        def merge_and_unload(self) -> nn.Module:
            return nn.Module()

    with pytest.raises(RecipeError, match=r"carries adapters of PEFT; give model.merge_and_unload\(\)"):
        find_experts(Adapted(), ["re:.*experts$"], [])
