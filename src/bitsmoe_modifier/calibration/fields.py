"""The fields of `BitsMoEModifier`, and what of them can be checked before there is a model."""

import warnings
from typing import Any, Literal, TypeVar

from llmcompressor.modifiers import Modifier
from pydantic import Field, field_validator, model_validator

from ..method.layer import AUTO_GROUP_SIZE, QuantizerSettings
from ..storage.planes import WIDTHS

_Fields = TypeVar("_Fields", bound="BitsMoEFields")


class BitsMoEFields(Modifier):
    """What a recipe says; `BitsMoEModifier` documents every field."""

    requires_calibration_data: bool = True

    bits: float = Field(default=2.0, gt=0, le=8)
    codes: Literal["auto", "scalar", "trellis"] = "auto"
    max_kld: float | None = Field(default=None, gt=0)
    bit_widths: list[int] = Field(default_factory=lambda: [0, 1, 2, 3, 4, 6])
    block_size: int | None = None
    group_size: int | Literal["auto"] = "auto"
    basis_bits: Literal[4, 8, 16] = 4
    input_basis: Literal["auto", "spectral", "none"] = "auto"
    output_basis: Literal["auto", "spectral", "none"] = "auto"
    error_feedback: bool = True
    solver: Literal["auto", "highs", "pulp", "lagrangian"] = "auto"
    compensation: bool = True
    refine_passes: int = Field(default=1, ge=0)
    scope: Literal["layer", "global"] = "global"
    super_experts: Literal["none", "auto"] | list[str] = "none"
    targets: list[str] = Field(default_factory=lambda: [r"re:.*\.experts$"])
    ignore: list[str] = Field(default_factory=list)
    dampening_frac: float = Field(default=0.01, gt=0, le=1)
    shrinkage: float | None = Field(default=None, ge=0, lt=1)
    mtp: Literal["keep", "quantize", "drop"] = "keep"

    #: a machine's path has no place in the recipe that is saved with the checkpoint
    resume_dir: str | None = Field(default=None, exclude=True)
    #: budgets that share a calibration (`sweep`), ``bits`` among them
    sweep: list[float] = Field(default_factory=list, exclude=True)
    #: end the run after the survey by raising `Surveyed`
    survey_only: bool = Field(default=False, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, fields: Any) -> Any:
        """Take a field by the name that it had before."""
        if isinstance(fields, dict) and "widths" in fields:
            if "bit_widths" in fields:
                raise ValueError("widths is the old name of bit_widths; leave it out")
            warnings.warn("widths is called bit_widths now; version 0.2 knows this name only", FutureWarning, 2)
            return {"bit_widths" if name == "widths" else name: value for name, value in fields.items()}
        return fields

    @field_validator("bit_widths")
    @classmethod
    def _check_widths(cls, widths: list[int]) -> list[int]:
        unknown = sorted(set(widths) - set(WIDTHS))
        if unknown:
            raise ValueError(f"bit_widths {unknown} cannot be stored; choose from {list(WIDTHS)}")
        if not any(widths):
            raise ValueError("bit_widths needs at least one above 0, e.g. [0, 2, 4, 6]")
        return sorted(set(widths))

    @field_validator("block_size", "group_size")
    @classmethod
    def _check_multiple(cls, size: int | str | None) -> int | str | None:
        if isinstance(size, int) and (size < 8 or size % 8):
            raise ValueError(f"{size} is not a positive multiple of 8")
        return size

    @model_validator(mode="after")
    def _check_bits(self: _Fields) -> _Fields:
        if self.bits > max(self.bit_widths) + 1:
            raise ValueError(f"bits {self.bits} cannot be spent with bit_widths {self.bit_widths}; add wider ones")
        if (self.max_kld is not None or self.survey_only) and self.scope != "global":
            raise ValueError("max_kld needs the survey of scope: global; drop one of the two")
        if self.sweep and (self.resume_dir is None or self.bits not in self.sweep):
            raise ValueError(f"sweep {self.sweep} needs resume_dir, and bits among it")
        if self.super_experts != "none" and 0 not in self.bit_widths:
            raise ValueError(f"super_experts store no codes: bit-width 0; add 0 to bit_widths {self.bit_widths}")
        return self

    @property
    def settings(self) -> QuantizerSettings:
        """The fields that the pure modules need."""
        kept = self.resume_dir is not None  # the survey then serves later runs of other sizes
        return QuantizerSettings(
            bits=self.bits,
            least_bits=0.0 if kept or self.max_kld is not None or self.survey_only else self.bits,
            codes=self.codes,
            widths=tuple(self.bit_widths),
            block_size=self.block_size,
            group_size=AUTO_GROUP_SIZE if self.group_size == "auto" else self.group_size,
            basis_bits=self.basis_bits,
            input_basis=self.input_basis,
            output_basis=self.output_basis,
            error_feedback=self.error_feedback,
            compensation=self.compensation,
            refine_passes=self.refine_passes,
            solver=self.solver,
            dampening_frac=self.dampening_frac,
            shrinkage=self.shrinkage,
        )
