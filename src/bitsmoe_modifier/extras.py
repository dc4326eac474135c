"""What the base install leaves out, and the message that says how to get it."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

from .errors import BitsMoEError


def installed(package: str) -> bool:
    """Whether ``import package`` would find it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def require(package: str, purpose: str, extra: str = "quantize") -> None:
    """Refuse what a package of an extra is needed for, in the words of the one who wants it, before any work.

    Args:
        package: name for ``import``.
        purpose: what needs it, as the start of a sentence.
        extra: of this package, that installs it.

    Raises:
        BitsMoEError: when it is not installed.
    """
    if not installed(package):
        raise BitsMoEError(f"{purpose} needs {package}, which is not installed: {install_line(extra)}")


def install_line(extra: str) -> str:
    """The command that adds an extra of this package, from where it came: a clone, a wheel, or an index."""
    return f"pip install '{_origin()}[{extra}]'"


def _origin() -> str:
    """What to give to pip: the folder of the sources, the wheel's file, or the name where an index has it."""
    sources = Path(__file__).resolve().parents[2]
    if (sources / "pyproject.toml").exists():
        return str(sources)
    try:
        record = distribution("bitsmoe-modifier").read_text("direct_url.json")
    except PackageNotFoundError:
        record = None
    if record is None:  # pip keeps no address of what it got from an index
        return "bitsmoe-modifier"
    address = urlparse(json.loads(record).get("url", ""))
    place = Path(unquote(address.path))
    return str(place) if address.scheme == "file" and place.exists() else "."
