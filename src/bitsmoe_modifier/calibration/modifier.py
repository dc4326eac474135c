"""`BitsMoEModifier`: the lifecycle inside llm-compressor. The mathematics is in `quantize` and the modules it names."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from compressed_tensors.offload import disable_offloading, get_cache_init_kwargs, offload_module
from compressed_tensors.offload.cache import OffloadCache
from llmcompressor.core import Event, State, active_session
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from loguru import logger
from pydantic import PrivateAttr
from tqdm import tqdm

from ..devices import kernels_usable
from ..errors import CalibrationError, RecipeError
from ..loading.format import attach, make_scheme
from ..method.candidates import plan_layer
from ..method.design import LayerDesign, LayerPlan, moved
from ..method.distributed import Ranks, check_shares
from ..method.gating import gating_of
from ..method.layer import DenseExperts
from ..method.quantize import LayerReport, quantize_layer
from ..method.statistics import RoutedTokens
from ..method.viterbi import encoder_found
from ..runtime.experts import BitsMoEExperts
from ..sources.companions import unsavable
from ..storage.packed import PackedExperts
from . import patches, tracing  # noqa: F401  (norms keep their weights, calibration attends causally)
from .capture import (
    check_calibration,
    choices_per_token,
    count_rows,
    count_tokens,
    log_layer,
    naming_layer,
    routed_tokens,
)
from .fields import BitsMoEFields
from .fingerprint import fingerprint, rows_digest
from .fusing import fuse_dense_experts
from .gpu_check import check_product, check_rounding
from .mtp import plan_mtp, quantize_mtp
from .mtp_layers import MtpLayer
from .other_schemes import check_modifiers
from .padding import Padding
from .prediction import Prediction, Surveyed, predict
from .progress import Progress
from .resume import ResumeFolder, SharedFolder
from .stored_experts import is_kept_decoded, placed_module
from .survey import Inputs, experts_inputs, survey_layers
from .sweep import budgets, check_lead, decide_each, roundings
from .targets import (
    check_experts,
    check_super_experts,
    check_targeted_once,
    check_transforms,
    check_unchanged,
    check_unclaimed,
    dense_experts,
    dense_ids,
    find_experts,
    mark_of,
)

#: What the survey does not depend on; one survey serves any value of these. (It tries bases with feedback or without.)
_ROUNDING_FIELDS = {"bits", "max_kld", "solver", "compensation", "refine_passes"}


class BitsMoEModifier(BitsMoEFields):
    """Quantizes the routed experts of a mixture-of-experts model to an average number of bits.

    The method is BitsMoE (arXiv 2606.00079) with the additions that docs/method.md describes.

    Recipe:

    ```yaml
    quant_stage:
      quant_modifiers:
        BitsMoEModifier:
          bits: 2.0
          ignore: ["re:.*layers.0\\\\..*"]
    ```

    Lifecycle:

    - on_initialize: find the experts modules, check everything that can be checked before calibration
    - on_calibration_start: with `scope: global`, survey all layers and split the budget; hook the inputs of
      every experts module (routed tokens only)
    - on_sequential_epoch_end: quantize the layers just calibrated, one at a time, and replace each by `BitsMoEExperts`
    - on_finalize: raise if any layer was left undone; give experts that stay dense back their fused form

    Args:
        bits: average bits per expert weight; codes, scales, bases, bit-widths and dense experts are all counted.
        codes: "trellis", windows of a bit stream, or "scalar", values of an even grid: at the same bytes trellis codes
            lose 35 to 43 % less, and a run takes 18 to 25 % longer. "auto": trellis, but for layers whose block
            or group size is no multiple of 16, and on a CPU without a C++ compiler, where they would take hours.
        max_kld: in place of `bits`, which it sets: the smallest size at which the survey predicts a KL divergence of at
            most this many nats per token. With `scope: global` only.
        bit_widths: what a unit may get; of 0, 1, 2, 3, 4, 6, 8 (0 drops it). Its old name `widths` goes with 0.2.
        block_size: consecutive spectral directions that share a bit-width; a multiple of 8 that divides H.
            None: H / 16 within 16 and 128.
        group_size: weights along I that share a scale; a multiple of 8 that divides I. "auto": 128 where
            it divides I, else the largest power of two that does.
        basis_bits: 16 (bfloat16), 8 or 4: storage of the shared bases.
        input_basis: basis shared by gate and up of all experts. "spectral", "none" (the hidden channels themselves), or
            "auto": what loses less on held-out rows at equal bytes, layer by layer.
        output_basis: the same for down.
        error_feedback: round each direction so that it absorbs the errors of those before it; False: faster and worse.
        compensation: with error feedback, let up, down and later output directions absorb what was lost before them.
        refine_passes: rounds of coordinate descent after the feedback, 0 for none; two take up to a tenth more time.
        solver: "highs" or "pulp" (exact), "lagrangian" (any size, reports its gap), "auto" (exact where it is fast).
        scope: "global": layers share one budget by their effect on the model's predictions, which takes a survey of the
            model before the first layer (about as long as calibration without rounding). "layer": every layer gets the
            same bits per weight.
        super_experts: kept dense within the same budget. "none", "auto" (outlying output norm), or a list of
            "MODULE.EXPERT", e.g. "model.layers.3.mlp.experts.17".
        targets: names of experts modules, or regular expressions after "re:".
        ignore: the same, to leave out.
        dampening_frac: added to the diagonals of second moments before factoring, as a fraction of their mean.
        shrinkage: how far rounding mistrusts correlations of the calibration inputs; None: held-out rows decide.
        mtp: layers for multi-token prediction, which transformers does not load. "keep": stored as they are;
            "quantize": their experts are packed too, with as many bits, calibrated on the same rows; "drop": left out.
        resume_dir: folder in which the survey and finished layers are kept; the same command continues from there after
            it was killed, and one with other `bits` (or another `solver`, `compensation` or `refine_passes`) takes the
            survey from there. None: keep nothing.
    """

    _names: dict[LinearExperts2D, str] = PrivateAttr(default_factory=dict)
    _inputs: dict[LinearExperts2D, list[Inputs]] = PrivateAttr(default_factory=dict)
    _padding: Padding = PrivateAttr(default_factory=Padding)
    _designs: dict[float, dict[str, LayerDesign]] = PrivateAttr(default_factory=dict)
    _metrics: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _propagating: list[BitsMoEExperts] = PrivateAttr(default_factory=list)
    _scheme: Any = PrivateAttr(default=None)
    _progress: Any = PrivateAttr(default=None)
    _said: Any = PrivateAttr(default=None)
    _tokens: int = PrivateAttr(default=0)
    _ranks: Ranks = PrivateAttr(default_factory=Ranks.alone)
    _rows: int = PrivateAttr(default=0)
    _prediction: Prediction | None = PrivateAttr(default=None)
    _resume: SharedFolder = PrivateAttr(default_factory=lambda: SharedFolder(Ranks.alone(), None))
    _finished: frozenset[str] = PrivateAttr(default=frozenset())
    _sequential_targets: Any = PrivateAttr(default=None)
    _checked: bool = PrivateAttr(default=False)
    _marks: dict[LinearExperts2D, tuple[int, float]] = PrivateAttr(default_factory=dict)
    _calibrating: bool = PrivateAttr(default=False)
    _mtp: list[tuple[MtpLayer, int]] = PrivateAttr(default_factory=list)

    @property
    def prediction(self) -> Prediction | None:
        """What the survey expects of every size; None before it, and with ``scope: layer``."""
        return self._prediction

    # ------------------------------------------------------------------------------------------------ lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the layers and refuse what cannot work, before calibration."""
        problem = unsavable(state.model)
        if problem:
            raise RecipeError(
                f"the model could not be saved afterwards: {problem}; mend model.config and model.generation_config"
            )
        if kernels_usable():
            check_rounding(torch.device("cuda", torch.cuda.current_device()))
        if self.codes == "auto" and not encoder_found():
            logger.warning("scalar codes, which lose more: to find trellis codes takes a C++ compiler or a CUDA GPU")
            self.codes = "scalar"
        experts = find_experts(state.model, self.targets, self.ignore)
        check_unclaimed(experts.items())
        self._check_others(state, experts)
        check_super_experts(self.super_experts, experts)
        self._ranks = Ranks()
        vocabulary = getattr(state.model.get_input_embeddings(), "num_embeddings", None)
        batches = state.data.calib if state.data is not None else None
        tokens = sum(self._ranks.everyones(count_tokens(batches, vocabulary)))
        self._rows = sum(self._ranks.everyones(count_rows(state.data.calib)))
        scalar: list[str] = []
        for name, module in tqdm(experts.items(), desc="Checking experts"):
            listed = dense_ids(self.super_experts, name)
            settings = check_experts(name, module, self.settings, 0 if listed == "auto" else len(listed))
            if self.codes == "auto" and settings.codes == "scalar":
                scalar.append(name)
            check_calibration(name, module.num_experts, tokens, choices_per_token(state.model))
        if scalar:
            logger.warning(
                f"{len(scalar)} layers get scalar codes, which lose more, because their block or group size is no "
                f"multiple of 16, from {scalar[0]} on"
            )
        self._names = {module: name for name, module in experts.items()}
        state.model.mtp_treatment = self.mtp
        if self.mtp == "quantize":
            self._mtp = plan_mtp(state.model, self.settings)
        self._sequential_targets = kwargs.get("sequential_targets")
        groups = [self.settings.resolve_group_size(module.intermediate_size) for module in experts.values()]
        self._scheme = make_scheme(experts, math.gcd(*groups))
        self._open_resume(state)
        self._progress = tqdm(total=len(experts), desc="Quantizing MoE layers")
        self._said = Progress(len(experts))
        return True

    def _check_others(self, state: State, experts: Mapping[str, Any]) -> None:
        """Refuse layers, or a ``resume_dir``, that another modifier of this kind in the recipe has too, and modifiers
        that leave another model, or schemes that cannot be stored beside it."""
        together = active_session().lifecycle.recipe.modifiers
        check_transforms(state.model, together)
        check_modifiers(together, state.model, experts)
        ours = [one for one in together if isinstance(one, BitsMoEModifier)]
        # a recipe that this modifier is not in is an older run's
        others = [one for one in ours if one is not self] if any(one is self for one in ours) else []
        check_targeted_once(experts, [find_experts(state.model, one.targets, one.ignore) for one in others])
        if self.resume_dir is not None and any(one.resume_dir == self.resume_dir for one in others):
            raise RecipeError(
                f"resume_dir: {self.resume_dir} is for one BitsMoEModifier, the recipe has {len(ours)}; give each a "
                "folder of its own in the recipe, or none"
            )

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Hook the layers' inputs; modifiers initialized after this one may have claimed experts meanwhile."""
        check_unclaimed((name, module) for module, name in self._names.items())
        self._calibrating = True
        self._marks = {module: mark_of(module) for module in self._names}
        if self.scope == "global":
            kept = self._resume.survey(self.settings)
            if kept is None:
                self._said.steps *= 2
                plans = self._survey(state)
                self._resume.keep_survey(self._metrics, plans)
            else:
                self._metrics, plans = kept
            self._prediction = predict(plans, self._tokens)
            if self.survey_only:
                self._resume.close()
                raise Surveyed(self._prediction)
            wanted = (budgets(self.bits, self.sweep), self.max_kld, max(self.bit_widths))
            self.bits, self._designs = self._ranks.compute(lambda: decide_each(plans, self._tokens, *wanted))
        self._find_finished()
        self._padding = Padding()
        self.register_hook(state.model, cast(Any, self._padding.begin), "forward_pre", with_kwargs=True)
        for module, name in self._names.items():
            if name not in self._finished:
                self.register_hook(module, cast(Any, self._capture), "forward_pre", with_kwargs=True)

    def _open_resume(self, state: State) -> None:
        """Open the folder of an earlier run; refuse rows that several processes share, or that change."""
        rows = self._ranks.everyones(rows_digest(cast(Any, state.data).calib))
        check_shares(rows)
        self._tokens = sum(one["tokens"] for one in rows)
        if self.resume_dir is None:
            return
        if self._ranks.everyones(rows_digest(cast(Any, state.data).calib)) != rows:
            raise RecipeError(
                "resume_dir: the calibration rows are others, or in another order, each time that they are read, so "
                "that no later run could go on with them; give oneshot shuffle_calibration_samples=False, or a "
                "DataLoader that does not shuffle"
            )
        folder = self.resume_dir

        def open_folder() -> ResumeFolder:
            # the modifiers of a recipe change each other's inputs
            together = active_session().lifecycle.recipe.modifiers or [self]
            fields = {
                f"{n} {type(one).__name__}": one.model_dump(exclude={*_ROUNDING_FIELDS, "mtp"} if one is self else None)
                for n, one in enumerate(together)
            }
            return ResumeFolder(folder, fingerprint(cast(Any, state.model), fields, rows))

        self._resume = SharedFolder(self._ranks, open_folder)

    def _find_finished(self) -> None:
        """See which layers an earlier run with the same settings has finished."""
        fields = self.model_dump(include=_ROUNDING_FIELDS)
        self._finished = self._resume.finished(roundings(fields, self.bits, self.sweep), self._names.values())
        if self._finished:
            logger.info(f"{len(self._finished)} of {len(self._names)} layers are finished in {self.resume_dir}")
        check_lead(self.bits, self.sweep, len(self._names) - len(self._finished))

    def _survey(self, state: State) -> dict[str, LayerPlan]:
        """Every layer's plan by a survey of the unquantized model, the same for every budget."""

        def measure(module: LinearExperts2D, inputs: list[Inputs], metric: torch.Tensor) -> LayerPlan:
            name = self._names[module]
            self._said.begin(name, "survey")
            self._metrics[name] = metric.cpu()
            with naming_layer(name):
                tokens = routed_tokens(module, self._ranks.collect(inputs), self._rows)
                return moved(self._plan(name, dense_experts(module, tokens.x.device), tokens, metric), "cpu")

        return survey_layers(state.model, state.data.calib, self._names, measure, self._sequential_targets, self._ranks)

    def _capture(self, module: LinearExperts2D, args: Inputs, kwargs: Mapping[str, torch.Tensor]) -> None:
        mask = self._padding.mask()
        self._inputs.setdefault(module, []).append(experts_inputs(module, args, kwargs, mask))

    def on_sequential_epoch_end(self, state: State, event: Event, modules: list[Any], **kwargs: Any) -> None:
        """Quantize and replace the layers that this part of the model calibrated."""
        self._drop_decoded()
        for module in modules:
            name = self._names.get(module)
            if name is not None and (module in self._inputs or name in self._finished):
                check_unchanged(name, module, self._marks[module])
                self._said.begin(name, "rounding")
                with naming_layer(name), torch.no_grad(), disable_offloading():
                    replacement = self._replacement(state.model, module, name, self._inputs.pop(module, []))
                replacement.keep_decoded(is_kept_decoded(module))  # while the rows go on to the next layer
                self._propagating.append(replacement)
                state.model.set_submodule(name, replacement)
                del self._names[module]
                self._progress.update()

    def _drop_decoded(self) -> None:
        while self._propagating:
            self._propagating.pop().keep_decoded(False)

    def _plan(self, name: str, experts: DenseExperts, tokens: RoutedTokens, metric: torch.Tensor | None) -> LayerPlan:
        return plan_layer(experts, tokens, self.settings, metric, dense_ids(self.super_experts, name), self._ranks)

    def _make(self, module: LinearExperts2D, name: str, inputs: list[Inputs]) -> tuple[PackedExperts, LayerReport]:
        """One layer's stored tensors on the CPU: kept from an earlier run, or made now and kept."""
        if name in self._finished:
            return self._resume.layer(name)
        return self._resume.keep_layers(name, self._quantize(module, name, self._ranks.collect(inputs)))

    def _quantize(
        self, module: LinearExperts2D, name: str, inputs: list[Inputs]
    ) -> Iterator[tuple[PackedExperts, LayerReport]]:
        """Pack one layer from its captured inputs at every budget, by the survey's designs or by its own."""
        experts, tokens = dense_experts(module, inputs[0][0].device), routed_tokens(module, inputs, self._rows)
        metric = self._metrics.get(name)
        metric = None if metric is None else metric.to(tokens.x.device)
        plan = None if self._designs else moved(self._plan(name, experts, tokens, metric), "cpu")
        unseen = None  # hardly another at another size, and measuring it takes a third of a small layer's time
        for bits in budgets(self.bits, self.sweep):
            design = self._designs[bits][name] if plan is None else self._chosen(plan, bits)
            here, settings = moved(design, tokens.x.device), replace(self.settings, bits=bits)
            packed, report = quantize_layer(experts, tokens, here, settings, metric, self._ranks, unseen)
            unseen = report.unseen_times
            if self._ranks.first:
                log_layer(name, report)
            yield packed, report

    def _chosen(self, plan: LayerPlan, bits: float) -> LayerDesign:
        """A layer's own design under a budget, the same on all processes."""
        return self._ranks.compute(lambda: plan.choose(bits * plan.elements))

    def _replacement(self, model: Any, module: LinearExperts2D, name: str, inputs: list[Inputs]) -> BitsMoEExperts:
        """What stands in for a layer's experts from now on, made of all processes' captured inputs."""
        packed, report = self._make(module, name, inputs)
        leaf = placed_module(module, model)
        replacement = BitsMoEExperts(packed.to(leaf.weight.device), gating_of(module))
        replacement.report = report
        attach(replacement, self._scheme)
        if isinstance(leaf._parameters, OffloadCache):
            offload_module(replacement, **get_cache_init_kwargs(leaf))  # which no kernel runs
        elif inputs and not self._checked:
            self._checked = True
            check_product(replacement, inputs[0])
        return replacement

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Remove the hooks, and what the last layers keep decoded."""
        self._drop_decoded()
        self.remove_hooks()
        self._calibrating = False

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Raise if a layer was never reached; make what stays dense ready to be saved."""
        self._progress.close()
        self._said.end()
        self._resume.close()
        if self._calibrating:  # llm-compressor ends a run that was interrupted when the next one begins, and says this
            self.remove_hooks()
            raise CalibrationError(f"an earlier run was interrupted, with {len(self._names)} MoE layers to go")
        if self._names:
            raise CalibrationError(
                f"{len(self._names)} MoE layers were never calibrated: {', '.join(self._names.values())}; "
                "use the sequential pipeline, or add them to `ignore`"
            )
        if self._mtp:
            batches, model = cast(Any, state.data).calib, cast(Any, state.model)
            made = quantize_mtp(model, self._mtp, batches, self.settings, self._ranks, self._rows)
            model.packed_mtp = made
        fuse_dense_experts(state.model)
        return True
