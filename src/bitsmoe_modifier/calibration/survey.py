"""Two passes over the unquantized model before its first layer is quantized, for `scope: global`.

The first, over a few rows, finds how much errors of every MoE layer's output cost in KL divergence of the model's
predictions; the second, over all rows, what every layer loses at every size (`LayerPlan.curve`). Both go through the
model one sequential target at a time, as calibration itself does, so no second copy of the model and no whole-model
backward graph is ever in memory.

For labels drawn from the model's own predictions, the gradient g_t of their log-likelihood in the layer's output at
token t has E[g gᵀ] = M, the Fisher information: a small error Δ costs ½ Δᵀ M Δ nats of KL divergence.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from compressed_tensors.offload import disable_offloading
from compressed_tensors.utils import patch_attr
from llmcompressor.args import DatasetArguments
from llmcompressor.core import active_session
from llmcompressor.modeling.moe import context as moe_context
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import Subgraph, trace_subgraphs
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import (
    DisableQuantization,
    calibration_forward_context,
    disable_cache,
    disable_hf_kernels,
    eval_context,
    use_eager_attention,
)
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import CalibrationError, RecipeError
from ..method.allocation import allocate
from ..method.distributed import Ranks
from ..method.numerics import all_finite
from ..method.shrinkage import towards_diagonal_
from ..method.statistics import prior_share
from ..runtime.sorted_rows import routed_rows
from .padding import Padding, mask_of, text_rows

#: Tokens of the backward pass.
_BACKWARD_TOKENS = 4096
#: By how much the off-diagonal part of the metric is believed less: 3 % less loss on real weights (docs/decisions.md).
_METRIC_SHRINKAGE = 0.2

T = TypeVar("T")
Inputs = tuple[torch.Tensor, ...]
#: A layer's stored bits, rising, and its least cost at those sizes under the metric, summed over calibration tokens,
#: both float64 ``[points]``.
Curve = tuple[np.ndarray, np.ndarray]


def share_budget(curves: Mapping[str, Curve], total_bits: float) -> dict[str, float]:
    """Split a budget over layers so that the summed cost in KL divergence is least (method.md section 4, global).

    The same knapsack as inside a layer, with layers for units and points of their curves for widths. What the points
    leave over is spread evenly.

    Raises:
        RecipeError: when the budget is below what all layers store at least.
    """
    bits = np.stack([bits for bits, _ in curves.values()])
    loss = np.stack([cost for _, cost in curves.values()])
    try:
        solved = allocate(loss, bits, total_bits, "lagrangian")
    except RecipeError as error:
        raise RecipeError(f"bits: {error}") from None
    chosen = bits[np.arange(len(bits)), solved.choice]
    room = np.maximum(bits[:, -1] - chosen, 0)
    left = max(0.0, total_bits - float(chosen.sum()))
    chosen = chosen + (room * min(1.0, left / room.sum()) if room.sum() > 0 else 0.0)
    return dict(zip(curves, chosen.tolist(), strict=True))


def survey_layers(
    model: PreTrainedModel,
    dataloader: Any,
    experts: Mapping[Any, str],
    measure: Callable[[Any, list[Inputs], torch.Tensor], T],
    sequential_targets: list[str] | str | None = None,
    ranks: Ranks | None = None,
) -> dict[str, T]:
    """Survey the experts modules of an unquantized model.

    Args:
        model: as llm-compressor calibrates it (experts linearized).
        dataloader: calibration batches.
        experts: name of each experts module.
        measure: from a module, its captured inputs (hidden states, top-k ids, top-k weights of every batch) and its
            metric M, float32 ``[H, H]``, to what is wanted of it (`LayerPlan`).
        sequential_targets: as given to `oneshot`; None for the model's own.
        ranks: the processes that share the calibration; None for this one alone.

    Returns:
        What ``measure`` returned, by module name.

    Raises:
        CalibrationError: naming the modules that no calibration row reached, or that got NaN or infinity.
    """
    ranks = ranks or Ranks()
    targets = infer_sequential_targets(model, sequential_targets)
    targets = [targets] if isinstance(targets, str) else targets
    subgraphs = trace_subgraphs(model, next(iter(dataloader)), targets, DatasetArguments().tracing_ignore, 1)
    with (
        HooksMixin.disable_hooks(),
        DisableQuantization(model),
        patch_attr(moe_context, "_CALIBRATE_ALL_EXPERTS", False),
    ):
        kept: list[list[dict[str, Any]]] = []
        captured: dict[nn.Module, list[Inputs]] = {}
        first = _first(dataloader, ranks)
        with capture_inputs(experts, captured):
            for _ in _forward(model, first, subgraphs, "Surveying predictions", kept):
                for module in list(captured):
                    _check_finite(experts[module], captured.pop(module))
        metrics = _backward(model, subgraphs, kept, [mask_of(batch) for batch in first], experts, ranks)
        del kept
        measured: dict[nn.Module, T] = {}
        with (
            capture_inputs(experts, captured),
            contextlib.closing(_forward(model, list(dataloader), subgraphs, "Surveying layers")) as forward,
        ):
            for _ in forward:
                for module in list(captured):
                    measured[module] = measure(module, captured.pop(module), metrics[module])
                if len(measured) == len(experts):
                    break  # what comes after the last experts is of no interest, and the head is large
    missed = [name for module, name in experts.items() if module not in measured]
    if missed:
        raise CalibrationError(f"calibration never reached {', '.join(missed)}; add them to `ignore`")
    return {name: measured[m] for m, name in experts.items()}


def _check_finite(name: str, inputs: list[Inputs]) -> None:
    for x, _, weight in inputs:
        if not bool(all_finite(x) & all_finite(weight)):
            raise CalibrationError(
                f"{name}: its calibration inputs hold NaN or infinity; calibrate in bfloat16 or float32"
            )


def _first(dataloader: Any, ranks: Ranks) -> list[dict[str, torch.Tensor]]:
    """This process's part of the first batches that together have `_BACKWARD_TOKENS` tokens, or all; at least one.

    Batches are dealt out in turn; those of the others are taken to be as long as the ones here.
    """
    batches: list[dict[str, torch.Tensor]] = []
    before = 0
    for batch in dataloader:
        if batches and before + ranks.rank * batch["input_ids"].numel() >= _BACKWARD_TOKENS:
            break
        batches.append(batch)
        before += ranks.size * batch["input_ids"].numel()
    return batches


def _forward(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    subgraphs: list[Subgraph],
    description: str,
    kept: list[list[dict[str, Any]]] | None = None,
) -> Generator[None]:
    """Run batches through the model one sequential target at a time, and yield after each.

    ``kept`` receives, for every target, its inputs of every batch (on the CPU). The session's state says which batch is
    in the model, as llm-compressor's pipelines do.
    """
    activations = IntermediatesCache.from_dataloader(cast(Any, batches), get_main_device(), torch.device("cpu"))
    with calibration_forward_context(model):
        for subgraph in tqdm(subgraphs, desc=description):
            stored: list[dict[str, Any]] = []
            with disable_offloading():
                for batch in range(len(batches)):
                    active_session().state.current_batch_idx = batch
                    inputs = activations.fetch(batch, subgraph.input_names)
                    if kept is not None:
                        stored.append(tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, inputs))
                    outputs = subgraph.forward(model, **inputs)
                    if subgraph is not subgraphs[-1]:
                        activations.update(batch, outputs)
                        activations.delete(batch, subgraph.consumed_names)
                if kept is not None:
                    kept.append(stored)
                yield


@contextlib.contextmanager
def capture_inputs(experts: Mapping[nn.Module, str], captured: dict[nn.Module, list[Inputs]]) -> Iterator[None]:
    """Append the inputs of every call of an experts module to ``captured[module]``."""

    padding = Padding()

    def hook(module: nn.Module, args: Inputs, kwargs: Mapping[str, torch.Tensor]) -> None:
        captured.setdefault(module, []).append(experts_inputs(module, args, kwargs, padding.mask()))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in experts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def experts_inputs(
    module: Any, args: Inputs, kwargs: Mapping[str, torch.Tensor], mask: torch.Tensor | None = None
) -> Inputs:
    """(hidden states, top-k ids, top-k weights) of a call of an experts module, however they were passed.

    Args:
        module: of experts.
        args, kwargs: of the call.
        mask: the tokens of the batch that are text, whose rows alone are taken; None: all (`padding.mask_of`).
    """
    names = ("hidden_states", "top_k_index", "top_k_weights")
    if len(args) + len(kwargs) == 1:
        rows = args[0] if args else kwargs[names[0]]
        text = text_rows(mask, rows)
        rows = rows if text is None else rows[text]
        return tuple(v.detach() for v in routed_rows(rows, module.num_experts))
    values = (*args, *(kwargs[name] for name in names[len(args) :]))
    text = text_rows(mask, values[0])
    return tuple(v.detach().clone() if text is None else v.detach()[text] for v in values)


def _backward(
    model: Any,
    subgraphs: list[Subgraph],
    kept: list[list[dict[str, Any]]],
    masks: list[torch.Tensor | None],
    experts: Mapping[nn.Module, str],
    ranks: Ranks,
) -> dict[nn.Module, torch.Tensor]:
    """M of every layer: from the last sequential target back to the first, each recomputed on the way.

    Every batch has a generator of its own for its labels, so that they do not depend on which process draws them. Its
    mask says which of its tokens are text: the others predict nothing, and do not count.
    """
    squares: dict[nn.Module, torch.Tensor] = {}
    tokens = dict.fromkeys(experts, 0)
    outputs_of: dict[nn.Module, torch.Tensor] = {}
    logits: list[torch.Tensor] = []
    handles = [m.register_forward_hook(lambda m, _, out: outputs_of.update({m: out})) for m in experts]
    handles.append(model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: logits.append(out)))
    handles.append(model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_()))
    slopes: list[_Slopes] = [{} for _ in kept[0]]
    device = get_main_device()  # once: every call says that there is no accelerator
    try:
        with contextlib.ExitStack() as stack:
            for context in (disable_cache, eval_context, disable_hf_kernels, use_eager_attention):
                stack.enter_context(context(model))
            for subgraph, batches in zip(reversed(subgraphs), reversed(kept), strict=True):
                with disable_offloading(), torch.enable_grad():
                    for number, (stored, slope) in enumerate(zip(batches, slopes, strict=True)):
                        outputs_of.clear()
                        logits.clear()
                        inputs = tree_map(partial(_leaf, device=device), stored)
                        outputs = subgraph.forward(model, **inputs)
                        ends = _ends(outputs, slope)
                        if logits:
                            generator = torch.Generator().manual_seed(ranks.rank + number * ranks.size)
                            likelihood = _sampled_likelihood(logits[-1], generator, masks[number])
                            ends.append((likelihood, torch.ones_like(likelihood)))
                        _pull_back(ends, inputs, outputs_of, slope)
                        for module, output in outputs_of.items():
                            g = slope.pop(("", id(module)), torch.zeros_like(output)).to(torch.float32).flatten(0, -2)
                            text = text_rows(masks[number], g)
                            g = g if text is None else g[text]
                            squares[module] = squares.get(module, 0) + g.T @ g
                            tokens[module] += len(g)
    finally:
        for handle in handles:
            handle.remove()
    counts = {module: int(ranks.total(torch.tensor(tokens[module]))) for module in squares}
    return {module: _metric(ranks.total(square), counts[module]) for module, square in squares.items()}


def _metric(square: torch.Tensor, tokens: int) -> torch.Tensor:
    """E[g gᵀ] from its sum over tokens, shrunk towards a multiple of the identity as far as they are few, and its
    off-diagonal part by `_METRIC_SHRINKAGE`."""
    hidden = len(square)
    share = float(prior_share([tokens], hidden)[0])
    common = square.diagonal().mean() * torch.eye(hidden, device=square.device)
    return towards_diagonal_((square * (1 - share) + common * share) / tokens, _METRIC_SHRINKAGE)


#: Gradients of the values that sequential targets pass on, by (name, position in the value's tree).
_Slopes = dict[tuple[str, int], torch.Tensor]


def _leaf(value: Any, device: torch.device) -> Any:
    """A fresh leaf of the backward graph for every float tensor."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(device).detach().requires_grad_()
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _ends(outputs: Any, slope: _Slopes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of a sequential target that later ones used, with their gradients, which are then spent."""
    ends = []
    for name, value in outputs.items() if isinstance(outputs, dict) else ():
        for at, leaf in enumerate(tree_leaves(value)):
            g = slope.pop((name, at), None)
            if g is not None and isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                ends.append((leaf, g))
    return ends


def _sampled_likelihood(
    logits: torch.Tensor, generator: torch.Generator, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-likelihood, summed over tokens, of labels drawn from the model's own predictions ``[batch, tokens, V]``."""
    scores = logits.to(torch.float32).log_softmax(-1).flatten(0, -2)
    scores = scores if mask is None else scores[mask.to(scores.device)]
    if not bool(all_finite(scores)):
        raise CalibrationError("the model's predictions hold NaN or infinity; check the base model")
    labels = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator)
    return scores.gather(1, labels.to(scores.device)).sum()


def _pull_back(
    ends: list[tuple[torch.Tensor, torch.Tensor]],
    inputs: Mapping[str, Any],
    outputs_of: Mapping[nn.Module, torch.Tensor],
    slope: _Slopes,
) -> None:
    """Add the gradients in a target's inputs, and in its experts' outputs under ("", id of module), to ``slope``."""
    sources: dict[tuple[str, int], torch.Tensor] = {("", id(m)): out for m, out in outputs_of.items()}
    for name, value in inputs.items():
        for at, leaf in enumerate(tree_leaves(value)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                sources[name, at] = leaf
    if not ends or not sources:
        return
    targets, weights = zip(*ends, strict=True)
    found = torch.autograd.grad(targets, list(sources.values()), weights, allow_unused=True)
    for key, g in zip(sources, found, strict=True):
        if g is not None:
            slope[key] = slope[key] + g if key in slope else g
