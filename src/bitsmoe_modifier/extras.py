"""What the base install leaves out, and the message that says how to get it."""

from importlib.util import find_spec

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
        raise BitsMoEError(
            f"{purpose} needs {package}, which is not installed: pip install 'bitsmoe-modifier[{extra}]'"
        )
