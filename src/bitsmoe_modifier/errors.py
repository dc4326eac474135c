"""Errors that a user can act on. Every message names the offender and the remedy."""


class BitsMoEError(ValueError):
    """Base class: something the user gave us cannot be used as it is."""


class RecipeError(BitsMoEError):
    """A recipe field, or the model it is applied to, cannot be quantized as asked."""


class CalibrationError(BitsMoEError):
    """The calibration data, or what the model computed from it, cannot be used."""


class CheckpointError(BitsMoEError):
    """A stored checkpoint is damaged, of another version, or does not fit the model."""
