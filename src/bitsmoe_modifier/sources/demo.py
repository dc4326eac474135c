"""The model and the texts that come with the package, for those who bring none."""

from importlib.resources import files
from pathlib import Path

from ..errors import BitsMoEError


def demo_asset(name: str) -> str:
    """Path of a file of the embedded demo.

    Raises:
        BitsMoEError: where the package was installed without it.
    """
    path = Path(str(files("bitsmoe_modifier"))) / "assets" / name
    if not path.exists():
        raise BitsMoEError(f"the embedded demo is not installed ({path} is missing); give --model and the texts")
    return str(path)
