"""Keeping what a quantization has finished, so that the same command continues after it was killed.

    fingerprint.json            what everything else was made of (`fingerprint`)
    survey.safetensors          the survey of `scope: global`: what it decided for every layer
    MODULE.safetensors          a finished layer: its stored tensors, and its report as metadata

Every file is written whole or not at all. A run that continues computes no finished layer again, but runs the model
over all calibration rows as before and puts the kept layers in place at the moment at which they were quantized the
first time; so every later layer sees the same inputs to the last bit, in any of llm-compressor's pipelines.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import BitsMoEError, CheckpointError, RecipeError
from ..method.design import LayerDesign, SideDesign
from ..method.quantize import LayerReport
from ..method.spectral import SharedBasis
from ..storage.locks import keep_locked, release
from ..storage.packed import PackedExperts, check_content, check_structure
from ..storage.records import differences, write_tensors, write_text
from ..storage.shards import read_json

_RECORD, _SURVEY, _LOCK = "fingerprint.json", "survey", ".lock"
#: how many of the differing entries a refusal names
_NAMED = 6


class ResumeFolder:
    """The folder of one quantization.

    Args:
        folder: created where it does not exist.
        made_of: the fingerprint of this run.

    Raises:
        RecipeError: when the folder cannot be written, holds something else, or belongs to another run: naming what
            differs.
    """

    def __init__(self, folder: str | Path, made_of: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
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
            raise RecipeError(f"resume_dir: {folder} cannot be written ({error.strerror}); give another one") from None

    def _compare(self, earlier: Mapping[str, Any], made_of: Mapping[str, Any]) -> None:
        found = differences(earlier, dict(made_of))
        if found:
            named = "; ".join(line if len(line) < 200 else f"{line[:200]}…" for line in found[:_NAMED])
            more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise RecipeError(
                f"resume_dir: {self.folder} holds the layers of another run ({named}{more}); run as before, or give "
                "another folder"
            )

    def close(self) -> None:
        """Let other runs use the folder."""
        release(self.folder / _LOCK)

    def keep_layer(self, name: str, packed: PackedExperts, report: LayerReport) -> None:
        """Keep a finished layer.

        Raises:
            BitsMoEError: when its file cannot be written.
        """
        self._write(name, dict(packed.items()), {"report": json.dumps(asdict(report))})

    def has_layer(self, name: str) -> bool:
        """Whether the layer was finished."""
        return self._file(name).exists()

    def layer(self, name: str) -> tuple[PackedExperts, LayerReport]:
        """A finished layer, checked, on the CPU.

        Raises:
            CheckpointError: when its file was damaged.
        """
        tensors, metadata = self._read(name)
        where = str(self._file(name))
        check_structure(tensors, where)
        packed = PackedExperts(**tensors)
        check_content(packed, where)
        return packed, LayerReport(**_frozen(json.loads(metadata["report"])))

    def keep_survey(self, metrics: Mapping[str, torch.Tensor], designs: Mapping[str, LayerDesign]) -> None:
        """Keep the result of the survey: every layer's metric and design, to the last bit.

        Raises:
            BitsMoEError: when its file cannot be written.
        """
        tensors = {f"{name} metric": metric for name, metric in metrics.items()}
        notes = {}
        for name, design in designs.items():
            found, notes[name] = _taken_apart(design)
            tensors.update({f"{name} {key}": tensor.contiguous() for key, tensor in found.items()})
        self._write(_SURVEY, tensors, {"notes": json.dumps(notes)})

    def survey(self) -> tuple[dict[str, torch.Tensor], dict[str, LayerDesign]] | None:
        """What `keep_survey` kept, on the CPU; None where the survey was not finished."""
        if not self._file(_SURVEY).exists():
            return None
        stored, metadata = self._read(_SURVEY)
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in stored.items():
            name, _, part = key.rpartition(" ")
            layers.setdefault(name, {})[part] = tensor
        notes = json.loads(metadata["notes"])
        designs = {name: _put_together(tensors, _frozen(notes[name])) for name, tensors in layers.items()}
        return {name: tensors["metric"] for name, tensors in layers.items()}, designs

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        try:
            write_tensors(self._file(name), tensors, metadata)
        except (OSError, SafetensorError) as error:
            raise BitsMoEError(
                f"{self._file(name)} could not be written ({error}); what was finished before is kept: make room in "
                f"{self.folder} and run the same command again"
            ) from error

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        file = self._file(name)
        try:
            with safe_open(file, "pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata()  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}); delete it to compute it again") from None


def _taken_apart(design: LayerDesign) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A design as tensors by name, and JSON values."""
    tensors, notes = {}, {}
    for field in fields(design):
        value = getattr(design, field.name)
        if isinstance(value, torch.Tensor):
            tensors[field.name] = value
        elif isinstance(value, SideDesign):
            side: dict[str, torch.Tensor | None] = {"widths": value.widths, "weight": value.weight}
            if value.basis is not None:
                side |= {"stored": value.basis.stored, "step": value.basis.step, "matrix": value.basis.matrix}
            tensors |= {f"{field.name}.{key}": tensor for key, tensor in side.items() if tensor is not None}
            bits = None if value.basis is None else value.basis.bits
            notes[field.name] = {"energy": value.energy, "basis_bits": bits}
        else:
            notes[field.name] = value
    return tensors, notes


def _put_together(tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> LayerDesign:
    """The inverse of `_taken_apart`."""
    values: dict[str, Any] = {}
    for field in fields(LayerDesign):
        noted = notes.get(field.name)
        if isinstance(noted, dict):
            side = {key.removeprefix(f"{field.name}."): tensor for key, tensor in tensors.items()}
            bits = noted["basis_bits"]
            basis = None if bits is None else SharedBasis(bits, side["stored"], side.get("step"), side["matrix"])
            values[field.name] = SideDesign(basis, side["widths"], side["weight"], noted["energy"])
        else:
            values[field.name] = tensors.get(field.name, noted)
    return LayerDesign(**values)


def _frozen(value: Any) -> Any:
    """JSON back to the types of a report: tuples, and whole numbers for keys."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: _frozen(item) for key, item in value.items()}
    return value
