"""Errors that a user can act on. Every message names the offender and the remedy."""


class BitsMoEError(ValueError):
    """Base class: something the user gave us cannot be used as it is."""


def check_at_least(least: float, **options: float | None) -> None:
    """Refuse options that are below ``least``, or no number; None is not given.

    Raises:
        BitsMoEError: naming the option as the command line does.
    """
    for name, value in options.items():
        if value is not None and not value >= least:
            raise BitsMoEError(f"--{name.replace('_', '-')} {value} must be {least} or more")


class RecipeError(BitsMoEError):
    """A recipe field, or the model it is applied to, cannot be quantized as asked."""


class CalibrationError(BitsMoEError):
    """The calibration data, or what the model computed from it, cannot be used."""


class CheckpointError(BitsMoEError):
    """A stored checkpoint is damaged, of another version, or does not fit the model."""
