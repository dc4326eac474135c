"""What quantizing a model will take, from its sizes alone: memory, disk, time, size of the result. Pure numbers.

The terms of a layer's memory are those of docs/method.md#memory. Symbols: E, k, H, I as there, T calibration tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..method.costs import SAMPLE_ELEMENTS
from ..method.layer import PART_ELEMENTS, PART_TENSORS, QuantizerSettings
from ..method.sides import KEPT_MOMENTS
from ..sources.stacks import KEPT_DECODED

#: Resident memory of a Python process with torch, transformers and llm-compressor imported, before any model.
_LIBRARIES = 700 * 2**20
#: Of the machine's speed in large matrix products, what the quantizer reaches on average.
_EFFICIENCY = 0.25
#: Float operations per element, candidate bit-width and scale tried, of the search for scales.
_SEARCH = 60


@dataclass(frozen=True)
class LayerShape:
    """One layer's routed experts.

    Attributes:
        gated: whether an expert has a gate beside its input and its output projection.
    """

    name: str
    experts: int
    hidden: int
    width: int
    gated: bool = True

    @property
    def weights(self) -> int:
        """``3 E I H``; ``2 E I H`` without a gate."""
        return (3 if self.gated else 2) * self.experts * self.width * self.hidden


@dataclass(frozen=True)
class ModelShape:
    """A dense model as config.json and the headers of its files describe it.

    Attributes:
        layers: the MoE layers to quantize.
        stored_bytes: of all its tensors.
        expert_bytes: stored, of the routed experts of ``layers``.
        parameters: elements of all tensors.
        decoder_layers: number of decoder layers.
        choices: experts per token, k.
        in_files: whether the experts of ``layers`` stay in the source's files, and are read one by one.
    """

    layers: tuple[LayerShape, ...]
    stored_bytes: int
    expert_bytes: int
    parameters: int
    decoder_layers: int
    choices: int
    in_files: bool = False


@dataclass(frozen=True)
class Run:
    """How a model is going to be quantized.

    Attributes:
        tokens: calibration tokens, T.
        itemsize: bytes of a number that the model computes in.
        accelerator: whether layers are quantized in an accelerator's memory, and the model waits in the CPU's.
        survey: whether a survey of the model comes first (``scope: global``).
    """

    tokens: int
    itemsize: int
    accelerator: bool = False
    survey: bool = True


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        cpu, accelerator: bytes at the peak, by what they are for.
        result_bytes: the checkpoint.
        operations: float operations.
        encoded: weights that the encoder of trellis codes goes through, each as often as it does.
    """

    cpu: dict[str, int]
    accelerator: dict[str, int]
    result_bytes: int
    operations: float
    encoded: float = 0.0

    @property
    def cpu_bytes(self) -> int:
        """Peak memory of the process."""
        return sum(self.cpu.values())

    @property
    def accelerator_bytes(self) -> int:
        """Peak memory on the accelerator."""
        return sum(self.accelerator.values())

    def seconds(self, rate: float, encoding_rate: float | None = None) -> float:
        """Time at ``rate`` float operations per second in large matrix products.

        Args:
            encoding_rate: weights that the encoder of trellis codes finds per second, where there are any.
        """
        encoding = self.encoded / encoding_rate if encoding_rate else 0.0
        return self.operations / (rate * _EFFICIENCY) + encoding


def plan_run(model: ModelShape, settings: QuantizerSettings, run: Run) -> Plan:
    """Add up what a run takes."""
    largest = max(model.layers, key=lambda layer: layer.weights)
    layer = _layer_memory(largest, model, settings, run)
    held = model.parameters - (sum(shape.weights for shape in model.layers) if model.in_files else 0)
    weights = {"model": held * run.itemsize}
    states = {"hidden states between layers": 2 * run.tokens * largest.hidden * run.itemsize}
    survey = _survey_memory(model, run) if run.survey else {}
    packed = sum(shape.weights for shape in model.layers)
    if run.accelerator:
        cpu = {"libraries": _LIBRARIES, **weights, **states, **survey}
        accelerator = {"decoder layer": 0 if model.in_files else largest.weights * run.itemsize, **layer}
    else:
        cpu, accelerator = {"libraries": _LIBRARIES, **weights, **states, **survey, **layer}, {}
    return Plan(
        cpu=cpu,
        accelerator=accelerator,
        result_bytes=model.stored_bytes - model.expert_bytes + round(packed * settings.bits / 8),
        operations=sum(_operations(shape, model, settings, run) for shape in model.layers)
        + 2 * model.parameters * run.tokens * (4 if run.survey else 2) * _active_share(model),
        encoded=sum(_encoded(shape, settings) for shape in model.layers),
    )


def _layer_memory(shape: LayerShape, model: ModelShape, settings: QuantizerSettings, run: Run) -> dict[str, int]:
    """Bytes that one layer's quantization needs beside the model (docs/method.md#memory)."""
    size = shape.experts * shape.width * shape.hidden
    part = min(2 * size, max(PART_ELEMENTS, 2 * shape.width * shape.hidden))
    parts = {
        "layer: inputs": run.tokens * (shape.hidden * run.itemsize + 12 * model.choices)
        + 8 * run.tokens * shape.hidden,
        # without a gate, zeros stand in its place meanwhile; of experts in files, one is read at a time
        "layer: weights": 3 * size * run.itemsize // (shape.experts if model.in_files else 1),
        # packed as they are stored; the parts of one side are held twice while they are joined
        "layer: codes": round(4 * size * settings.bits / 8),
        # the least on an accelerator, where parts grow with what is free
        "layer: a part in float32": PART_TENSORS * 4 * part,
    }
    if model.in_files and shape.weights <= KEPT_DECODED:
        parts["layer: kept decoded while rows go on"] = shape.weights * run.itemsize
    if settings.error_feedback:
        # beyond a size they are measured for a part of the experts at a time
        parts["layer: moments"] = 16 * min(shape.experts * shape.width**2, KEPT_MOMENTS)
    return parts


def _survey_memory(model: ModelShape, run: Run) -> dict[str, int]:
    hidden = model.layers[0].hidden
    return {
        "survey": 16 * len(model.layers) * hidden**2
        + min(run.tokens, 4096) * model.decoder_layers * hidden * run.itemsize
    }


def _active_share(model: ModelShape) -> float:
    """Share of the parameters that a token's forward pass multiplies with."""
    routed = sum(layer.weights for layer in model.layers)
    active = sum(layer.weights * model.choices / layer.experts for layer in model.layers)
    return (model.parameters - routed + active) / model.parameters


def _operations(shape: LayerShape, model: ModelShape, settings: QuantizerSettings, run: Run) -> float:
    """Float operations of one layer's quantization."""
    e, h, i, pairs = shape.experts, shape.hidden, shape.width, run.tokens * model.choices
    statistics = 2 * run.tokens * h**2 + 12 * pairs * h * i
    sides = ((2, settings.input_basis), (1, settings.output_basis))
    bases = sum(25 * h**3 + 2 * n * e * i * h**2 * 2 for n, basis in sides if basis != "none")
    search = _SEARCH * shape.weights * len(settings.widths) * 2
    total = statistics + bases + search
    if settings.error_feedback:
        moments = 2 * pairs * (h**2 + i**2) + e * (h**3 + i**3)
        total += moments + (1 + settings.refine_passes) * 2 * e * (2 * i * h**2 + h * i**2)
    return total * (1.5 if run.survey else 1.0)


def _encoded(shape: LayerShape, settings: QuantizerSettings) -> float:
    """Weights that the encoder of trellis codes goes through for one layer: once to round them and once for every
    refinement, and those of the sample that prices each bit-width in each basis."""
    if settings.for_sizes(shape.hidden, shape.width).codes != "trellis":
        return 0.0
    passes = 1 + (settings.refine_passes if settings.error_feedback else 0)
    sides = ((2 * shape.weights / 3, settings.input_basis), (shape.weights / 3, settings.output_basis))
    bases = sum(min(weights, SAMPLE_ELEMENTS) * (2 if basis == "auto" else 1) for weights, basis in sides)
    return passes * shape.weights + bases * sum(width > 0 for width in settings.widths)


def table(parts: dict[str, int]) -> Sequence[str]:
    """Lines of a breakdown, largest first."""
    return [f"    {name:<32}{n / 1e9:8.2f} GB" for name, n in sorted(parts.items(), key=lambda item: -item[1])]
