"""The survey before `scope: global`: Fisher information against a whole-model backward pass, and the shared budget."""

import itertools

import numpy as np
import pytest
import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import PreTrainedModel

from bitsmoe_modifier import CalibrationError, RecipeError
from bitsmoe_modifier.calibration import survey
from bitsmoe_modifier.calibration.survey import Curve, share_budget, survey_layers
from bitsmoe_modifier.method.distributed import Ranks
from bitsmoe_modifier.method.statistics import prior_share
from helpers import ARCHITECTURES, calibration, tiny_model


def linearized(architecture: str) -> tuple[PreTrainedModel, dict[torch.nn.Module, str]]:
    model = tiny_model(architecture)
    linearize_moe(model)
    return model, {module: name for name, module in model.named_modules() if isinstance(module, LinearExperts2D)}


def fisher(model: PreTrainedModel, experts: dict[torch.nn.Module, str], batches: list) -> dict[str, torch.Tensor]:
    """Sum of g gᵀ per layer from one backward graph over the whole model; labels drawn in the survey's order."""
    outputs: dict[torch.nn.Module, torch.Tensor] = {}

    def keep(module: torch.nn.Module, _: object, out: torch.Tensor) -> torch.Tensor:
        outputs[module] = out.detach().requires_grad_() if not out.requires_grad else out
        outputs[module].retain_grad()
        return outputs[module]

    handles = [module.register_forward_hook(keep) for module in experts]
    total = {}
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(number)
        scores = model(**batch).logits.log_softmax(-1).flatten(0, -2)
        labels = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        scores.gather(1, labels).sum().backward()
        for module, name in experts.items():
            g = outputs[module].grad.flatten(0, -2).double()
            total[name] = total.get(name, 0) + g.T @ g
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metric_is_the_fisher_information(architecture: str) -> None:
    """Going back one decoder layer at a time gives what one graph over the whole model gives, to float32's error."""
    model, experts = linearized(architecture)
    seen: dict[str, list] = {}

    def measure(module: torch.nn.Module, inputs: list, metric: torch.Tensor) -> torch.Tensor:
        seen[experts[module]] = inputs
        return metric

    metrics = survey_layers(model, calibration(rows=3), experts, measure)
    expected = fisher(model, experts, list(calibration(rows=3)))
    assert list(metrics) == list(experts.values())
    for name, found in metrics.items():
        tokens, hidden = 3 * 32, 64
        share = float(prior_share([tokens], hidden)[0])
        common = expected[name].diagonal().mean() * torch.eye(hidden)
        wanted = (expected[name] * (1 - share) + common * share) / tokens
        wanted = 0.8 * wanted + 0.2 * wanted.diagonal().diag()
        scale = float(wanted.abs().max())
        assert scale > 0
        # gradients of some 10 chained float32 operations with sums of 100 terms each
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-3, atol=1e-4 * scale)
        assert sum(x.flatten(0, -2).shape[0] for x, _, _ in seen[name]) == tokens


def test_survey_leaves_the_model_alone() -> None:
    model, experts = linearized("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    survey_layers(model, calibration(rows=2), experts, lambda *_: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert all(p.grad is None for p in model.parameters())


def test_predictions_are_surveyed_on_the_first_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_BACKWARD_TOKENS", 40)
    assert len(survey._first(calibration(rows=5), Ranks())) == 2
    monkeypatch.setattr(survey, "_BACKWARD_TOKENS", 10_000)
    assert len(survey._first(calibration(rows=5), Ranks())) == 5


def test_bad_inputs_name_the_layer() -> None:
    model, experts = linearized("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.nan
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.experts: its calibration inputs hold NaN"):
        survey_layers(model, calibration(rows=2), experts, lambda *_: pytest.fail("such inputs were measured"))


def test_bad_predictions_are_refused() -> None:
    model, experts = linearized("qwen3_moe")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(CalibrationError, match="the model's predictions hold NaN or infinity"):
        survey_layers(model, calibration(rows=2), experts, lambda *_: None)


# --------------------------------------------------------------------------------------------------- the budget


def curves(layers: int, seed: int, points: int = 9) -> dict[str, Curve]:
    """Convex falling curves of different sizes and strengths."""
    rng = np.random.default_rng(seed)
    found = {}
    for layer in range(layers):
        bits = np.linspace(0, 80 * (1 + layer % 2), points)
        found[f"layer{layer}"] = (bits, rng.lognormal(0, 2) * 4.0 ** -(bits / bits[-1] * 4))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_budget_is_spent_where_it_counts(seed: int) -> None:
    """No more than there is, nearly all of it, and no worse than the best of all splits over the curves' points."""
    found = curves(4, seed)
    total = [60.0, 150.0, 300.0, 470.0][seed % 4]
    budgets = share_budget(found, total)
    assert list(budgets) == list(found)
    assert sum(budgets.values()) == pytest.approx(total)
    reached = sum(np.interp(budgets[name], *curve) for name, curve in found.items())
    options = [list(zip(*curve, strict=True)) for curve in found.values()]
    best = min(sum(d for _, d in split) for split in itertools.product(*options) if sum(b for b, _ in split) <= total)
    worst = max(cost[0] for _, cost in found.values())
    assert reached <= best * 1.05 + 0.01 * worst


def test_more_budget_than_the_layers_can_use() -> None:
    found = curves(3, 0)
    budgets = share_budget(found, 1e6)
    assert budgets == {name: bits[-1] for name, (bits, _) in found.items()}


def test_too_small_a_budget_names_the_field() -> None:
    found = {"a": (np.array([50.0, 90.0]), np.array([2.0, 1.0]))}
    with pytest.raises(RecipeError, match=r"bits: .* below the least possible 50; raise `bits`"):
        share_budget(found, 40)


def test_layer_worth_nothing_gets_the_least() -> None:
    found = curves(2, 1)
    useless = (found["layer0"][0], np.zeros(9))
    budgets = share_budget({"useless": useless, "layer1": found["layer1"]}, 150.0)
    assert budgets["layer1"] > 140
