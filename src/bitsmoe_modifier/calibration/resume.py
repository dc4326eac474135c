"""Keeping what a quantization has finished, so that the same command continues after it was killed.

    fingerprint.json            what the survey was made of (`fingerprint`)
    survey.safetensors          the survey of `scope: global`: every layer's metric and plan
    BITS-bits-DIGEST/           one for every budget and every other setting that only rounding depends on
        settings.json           those settings
        MODULE.safetensors      a finished layer: its stored tensors, and its report as metadata

Every file is written whole or not at all. The survey knows no budget, so any number of budgets are served by one. A run
that continues computes no finished layer again, but runs the model over all calibration rows as before and puts the
kept layers in place at the moment at which they were quantized the first time; so every later layer sees the same
inputs to the last bit, in any of llm-compressor's pipelines.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ..errors import BitsMoEError, CheckpointError, RecipeError
from ..method.costs import SideCosts
from ..method.design import TRIAL_BITS, LayerPlan, SidePlan
from ..method.distributed import Ranks
from ..method.layer import QuantizerSettings
from ..method.quantize import LayerReport
from ..method.spectral import SharedBasis
from ..storage.locks import keep_locked, release
from ..storage.packed import PackedExperts, check_content, check_structure
from ..storage.records import differences, write_tensors, write_text
from ..storage.shards import read_json
from ..storage.trees import put_together, taken_apart

_RECORD, _SURVEY, _SETTINGS, _LOCK = "fingerprint.json", "survey.safetensors", "settings.json", ".lock"
#: the classes that a layer's plan is made of
_KINDS = (LayerPlan, SidePlan, SideCosts, SharedBasis, QuantizerSettings)
#: how many of the differing entries a refusal names
_NAMED = 6


@contextmanager
def reserved(folder: str | None) -> Iterator[None]:
    """Create a resume folder and keep other runs out of it while the block lasts, before a model is loaded for it.

    Raises:
        BitsMoEError: when it cannot be written, or another run is using it.
    """
    if folder is None:
        yield
        return
    lock = Path(folder).expanduser() / _LOCK
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        keep_locked(lock, f"resume_dir: another run is using {folder}; give another folder")
    except OSError as error:
        raise RecipeError(f"resume_dir: {folder} cannot be written ({error.strerror}); give another one") from None
    try:
        yield
    finally:
        release(lock)


class ResumeFolder:
    """The folder of one survey and of all quantizations by it.

    Args:
        folder: created where it does not exist.
        made_of: the fingerprint of what the survey depends on.

    Raises:
        RecipeError: when the folder cannot be written, holds something else, or belongs to another survey: naming what
            differs.
    """

    def __init__(self, folder: str | Path, made_of: Mapping[str, Any]) -> None:
        self.folder = Path(folder).expanduser()  # no shell does it in a recipe
        self.layers: list[Path] = []
        record = self.folder / _RECORD
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            keep_locked(self.folder / _LOCK, f"resume_dir: another run is using {folder}; give another folder")
            if record.exists():
                self._compare(read_json(record), made_of)
            elif any(not path.name.startswith(".") for path in self.folder.iterdir()):
                raise RecipeError(f"resume_dir: {folder} is not empty and holds no earlier run; give another folder")
            else:
                write_text(record, json.dumps(made_of, indent=1))
        except OSError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: OSError) -> RecipeError:
        return RecipeError(f"resume_dir: {self.folder} cannot be written ({error.strerror}); give another one")

    def open_layers(self, roundings: Sequence[Mapping[str, Any]]) -> None:
        """Keep layers from here on in the folders of these settings.

        Args:
            roundings: what only the quantization of a layer depends on, "bits" among it, JSON types: of this run, and
                of those that it makes layers for as well.

        Raises:
            RecipeError: when a folder cannot be written.
        """
        self.layers = []
        for rounding in roundings:
            text = json.dumps(rounding, indent=1, sort_keys=True)
            layers = self.folder / f"{rounding['bits']:g}-bits-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            try:
                if not (layers / _SETTINGS).exists():
                    layers.mkdir(exist_ok=True)
                    write_text(layers / _SETTINGS, text)
            except OSError as error:
                raise self._refusal(error) from None
            self.layers.append(layers)

    def _compare(self, earlier: Mapping[str, Any], made_of: Mapping[str, Any]) -> None:
        found = differences(earlier, dict(made_of))
        if found:
            named = "; ".join(line if len(line) < 200 else f"{line[:200]}…" for line in found[:_NAMED])
            more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise RecipeError(
                f"resume_dir: {self.folder} holds the survey of another run ({named}{more}); run as before, or give "
                "another folder"
            )

    def close(self) -> None:
        """Let other runs use the folder."""
        release(self.folder / _LOCK)

    def keep_layer(self, name: str, packed: PackedExperts, report: LayerReport, place: int = 0) -> None:
        """Keep a finished layer.

        Args:
            name: of its module.
            packed, report: what was made.
            place: of its settings among those that `open_layers` got.

        Raises:
            BitsMoEError: when its file cannot be written.
        """
        self._write(self._file(name, place), dict(packed.items()), {"report": json.dumps(asdict(report))})

    def has_layer(self, name: str) -> bool:
        """Whether the layer was finished with all the settings."""
        return all(self._file(name, place).exists() for place in range(len(self.layers)))

    def layer(self, name: str) -> tuple[PackedExperts, LayerReport]:
        """A finished layer of this run, checked, on the CPU.

        Raises:
            CheckpointError: when its file was damaged.
            RecipeError: when another state of this package wrote it.
        """
        where = str(self._file(name))
        tensors, metadata = self._read(self._file(name))
        check_structure(tensors, where)
        packed = PackedExperts(**tensors)
        check_content(packed, where)
        try:
            return packed, LayerReport(**_frozen(json.loads(metadata["report"])))
        except TypeError:
            raise self._foreign(self._file(name)) from None

    def keep_survey(self, metrics: Mapping[str, torch.Tensor], plans: Mapping[str, LayerPlan]) -> None:
        """Keep the result of the survey: every layer's metric and plan, to the last bit.

        Raises:
            BitsMoEError: when its file cannot be written.
        """
        tensors, notes = taken_apart([(name, metrics[name], plan) for name, plan in plans.items()])
        self._write(self.folder / _SURVEY, tensors, {"notes": json.dumps(notes)})

    def survey(self, settings: QuantizerSettings) -> tuple[dict[str, torch.Tensor], dict[str, LayerPlan]] | None:
        """What `keep_survey` kept, on the CPU; None where the survey was not finished.

        Args:
            settings: of this run, which the plans are to be used with.

        Raises:
            CheckpointError: when its file was damaged.
            RecipeError: when another state of this package wrote it, of the same version but with other plans.
        """
        if not (self.folder / _SURVEY).exists():
            return None
        tensors, metadata = self._read(self.folder / _SURVEY)
        try:
            kept = put_together(json.loads(metadata["notes"]), tensors, _KINDS)
        except (KeyError, TypeError):
            raise self._foreign(self.folder / _SURVEY) from None
        if not all(_is_tried(side) for _, _, plan in kept for side in (*plan.inputs, *plan.outputs)):
            raise self._foreign(self.folder / _SURVEY)
        return (
            {name: metric for name, metric, _ in kept},
            {name: replace(plan, settings=settings.for_sizes(*plan.shape[1:])) for name, _, plan in kept},
        )

    def _foreign(self, file: Path) -> RecipeError:
        """Refuse what was written between two releases: layers of two states of the code would be mixed."""
        return RecipeError(
            f"resume_dir: {file} was written by another state of this package; delete {self.folder}, or give another "
            "folder"
        )

    def _write(self, file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        try:
            write_tensors(file, tensors, metadata)
        except (OSError, SafetensorError) as error:
            raise BitsMoEError(
                f"{file} could not be written ({error}); what was finished before is kept: make room in "
                f"{self.folder} and run the same command again"
            ) from error

    def _file(self, name: str, place: int = 0) -> Path:
        return self.layers[place] / f"{name}.safetensors"

    def _read(self, file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        try:
            with safe_open(file, "pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata()  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}); delete it to compute it again") from None


class SharedFolder:
    """A resume folder for the processes of a run, of which the first has it; without one, nothing is kept.

    Args:
        ranks: the processes.
        open_folder: on the first process; None where nothing is kept.

    Raises:
        RecipeError: on all of them, as `ResumeFolder`.
    """

    def __init__(self, ranks: Ranks, open_folder: Callable[[], ResumeFolder] | None) -> None:
        self._ranks, self._kept = ranks, open_folder is not None
        self._folder: ResumeFolder | None = None

        def begin() -> None:
            self._folder = cast(Callable[[], ResumeFolder], open_folder)()

        if self._kept:
            ranks.compute(begin)

    def survey(self, settings: QuantizerSettings) -> tuple[dict[str, torch.Tensor], dict[str, LayerPlan]] | None:
        """`ResumeFolder.survey` on all processes."""
        return self._ranks.compute(lambda: None if self._folder is None else self._folder.survey(settings))

    def keep_survey(self, metrics: Mapping[str, torch.Tensor], plans: Mapping[str, LayerPlan]) -> None:
        """`ResumeFolder.keep_survey`."""
        if self._folder is not None:
            self._folder.keep_survey(metrics, plans)

    def finished(self, roundings: Sequence[Mapping[str, Any]], names: Iterable[str]) -> frozenset[str]:
        """Which layers are finished with all of these settings (`ResumeFolder.open_layers`)."""

        def find() -> frozenset[str]:
            folder = cast(ResumeFolder, self._folder)
            folder.open_layers(roundings)
            return frozenset(name for name in names if folder.has_layer(name))

        return self._ranks.compute(find) if self._kept else frozenset()

    def layer(self, name: str) -> tuple[PackedExperts, LayerReport]:
        """`ResumeFolder.layer` on all processes."""
        return self._ranks.compute(lambda: cast(ResumeFolder, self._folder).layer(name))

    def keep_layers(
        self, name: str, made: Iterable[tuple[PackedExperts, LayerReport]]
    ) -> tuple[PackedExperts, LayerReport]:
        """Keep a layer as it was made with each of the settings that `finished` got, and return the first."""
        own: tuple[PackedExperts, LayerReport] | None = None
        for place, (packed, report) in enumerate(made):
            own = own or (packed, report)
            if self._folder is not None:
                self._folder.keep_layer(name, packed, report, place)
        return cast(tuple[PackedExperts, LayerReport], own)

    def close(self) -> None:
        """`ResumeFolder.close`."""
        if self._folder is not None:
            self._folder.close()


def _is_tried(side: SidePlan) -> bool:
    """Whether a trial of a side's candidate, where there was one, was made at the sizes at which it is made now."""
    return side.times is None or (isinstance(side.times, tuple) and len(side.times) == len(TRIAL_BITS))


def _frozen(value: Any) -> Any:
    """JSON back to the types of a report: tuples, and whole numbers for keys."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: _frozen(item) for key, item in value.items()}
    return value
