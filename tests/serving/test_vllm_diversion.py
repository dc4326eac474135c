"""How packed tensors find their layers, whatever files and models call them."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from bitsmoe_modifier.errors import CheckpointError

pytestmark = pytest.mark.vllm


class Method:
    """Notes what a layer is given."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.missing: frozenset[str] = frozenset()

    def take(self, layer: Any, name: str, tensor: torch.Tensor) -> None:
        self.got.append(name)
        layer.register_parameter(name, torch.nn.Parameter(tensor))


def model_of(monkeypatch: pytest.MonkeyPatch, *layer_names: str, is_draft: bool = False) -> Any:
    from bitsmoe_modifier.serving import diversion

    class Layer(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.layer_name, self.quant_method = name, Method()

    class Model(torch.nn.Module):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            self.passed = [name for name, _ in weights]
            return set(self.passed)

    monkeypatch.setattr(diversion, "RoutedExperts", Layer)
    model = Model()
    model.layers = torch.nn.ModuleList(map(Layer, layer_names))
    for _ in range(2):  # vLLM asks for every layer's method: the class is to be changed once
        diversion.divert(Model, Method, is_draft=is_draft)
    return model


def stream(*names: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.empty(1)) for name in names]


@pytest.mark.parametrize(
    ("served", "stored"),
    [
        ("model.layers.3.mlp.experts", "model.layers.3.mlp.experts"),
        ("model.layers.3.block_sparse_moe.experts", "model.layers.3.mlp.experts"),
        ("language_model.model.layers.3.moe.experts", "model.language_model.layers.3.experts"),
        ("backbone.layers.3.mixer.experts", "model.layers.3.mixer.experts"),
        ("unnumbered.experts", "unnumbered.experts"),
    ],
)
def test_layers_are_found_under_other_names(served: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(monkeypatch, "model.layers.2.mlp.experts", served)
    loaded = model.load_weights(stream(f"{stored}.codes_in", "lm_head.weight", f"{stored}.layout"))
    assert model.layers[1].quant_method.got == ["codes_in", "layout"]
    assert not model.layers[0].quant_method.got
    assert model.passed == ["lm_head.weight"]
    assert loaded == {"lm_head.weight", "layers.1.codes_in", "layers.1.layout"}


def test_everything_else_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(monkeypatch, "model.layers.3.mlp.experts")
    names = [
        "mtp.layers.4.mlp.experts.gate_up_proj",  # of a layer for multi-token prediction, left dense
        "model.layers.3.mlp.shared_experts.layout",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "model.layers.4.mlp.experts.layout",
        "model.layers.3.mlp.gate.weight",
    ]
    model.load_weights(stream(*names))
    assert model.passed == names
    assert not model.layers[0].quant_method.got


def test_what_no_file_holds_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(monkeypatch, "model.layers.2.mlp.experts", "model.layers.3.mlp.experts")
    model.norm, model.lm_head = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4, bias=False)
    model.gate, model.router = [torch.nn.Linear(4, 4, bias=False)] * 2
    model.lm_head.placeholder = torch.nn.Parameter(torch.empty(0))
    model.lm_head.input_scale_ub = torch.nn.Parameter(torch.ones(1))
    model.load_weights(stream("model.layers.3.mlp.experts.layout", "norm.weight", "router.weight"))
    assert [layer.quant_method.missing for layer in model.layers] == [{"norm.bias", "lm_head.weight"}] * 2
    model.load_weights(stream("model.layers.2.mlp.experts.layout", "lm_head.weight"))
    assert [layer.quant_method.missing for layer in model.layers] == [{"norm.bias"}] * 2


def test_two_layers_in_one_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(monkeypatch, "thinker.layers.3.mlp.experts", "talker.layers.3.mlp.experts")
    with pytest.raises(CheckpointError, match=r"layers\.0 and layers\.1; run this checkpoint with transformers"):
        model.load_weights(stream("lm_head.weight"))


def test_model_and_draft_take_the_layers_of_one_number_each(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = "model.layers.0.mlp.experts", "mtp.layers.0.mlp.experts"
    files = [f"{own}.layout", f"{other}.codes_in", "lm_head.weight", "mtp.fc.weight"]
    model = model_of(monkeypatch, own)
    model.load_weights(stream(*files))
    assert model.layers[0].quant_method.got == ["layout"]
    assert model.passed == [f"{other}.codes_in", "lm_head.weight", "mtp.fc.weight"]
    draft = model_of(monkeypatch, other, is_draft=True)
    draft.load_weights(stream(*files))
    assert draft.layers[0].quant_method.got == ["codes_in"]
    assert draft.passed == [f"{own}.layout", "lm_head.weight", "mtp.fc.weight"]


def test_a_draft_gets_embedding_and_head_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = model_of(monkeypatch, "mtp.layers.0.mlp.experts", is_draft=True)
    draft.lm_head, draft.fc = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    draft.load_weights(stream("mtp.layers.0.mlp.experts.layout"))
    assert draft.layers[0].quant_method.missing == {"fc.weight"}


def test_a_draft_for_which_no_file_holds_anything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = model_of(monkeypatch, is_draft=True)
    with pytest.raises(CheckpointError, match=r"holds a layer for Model to speculate with.*--mtp keep"):
        draft.load_weights(stream("model.embed_tokens.weight", "lm_head.weight"))
    draft.load_weights(stream("model.fc.weight"))


def test_packed_experts_of_a_draft_that_no_target_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = model_of(monkeypatch, is_draft=True)
    with pytest.raises(CheckpointError, match=r"mtp\.layers\.0\.mlp\.experts\.layout: packed, but no target"):
        draft.load_weights(stream("mtp.fc.weight", "mtp.layers.0.mlp.experts.layout"))


def test_models_without_packed_layers_load_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(monkeypatch)
    weights = stream("model.layers.3.mlp.experts.layout")
    assert model.load_weights(weights) == {"model.layers.3.mlp.experts.layout"}
    assert model.passed == ["model.layers.3.mlp.experts.layout"]
