"""Run something once another package has been imported, without importing it for that.

compressed-tensors and llm-compressor take 10 seconds to import. With this, ``import bitsmoe_modifier`` costs nothing,
whichever of the packages is imported first, and the pure modules stay usable where neither is installed.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one package through the other finders and calls back once, after its code has run."""

    def __init__(self, name: str, callback: Callable[[], object]) -> None:
        self.name = name
        self.callback: Callable[[], object] | None = callback
        self.searching = False

    def fire(self) -> None:
        """Call back unless it has happened. The finder then stays in place: the list may be under iteration."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self.callback is None or self.searching:
            return None
        if fullname != self.name:
            # the package's import had begun before this finder was there
            if is_imported(self.name):
                self.fire()
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.fire()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def is_imported(name: str) -> bool:
    """Whether the package's code has run to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def after_import(name: str, callback: Callable[[], object]) -> None:
    """Call ``callback`` now if the module ``name`` is imported, else right after it has been.

    Where the import of ``name`` is going on further up the stack, the call comes with the first import after it. An
    error that ``callback`` raises makes the import fail that triggered it.
    """
    if is_imported(name):
        callback()
    else:
        sys.meta_path.insert(0, _AfterImport(name, callback))
