"""Any module of the package can be the first one that a process imports: nothing goes round in a circle."""

import json
import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

import bitsmoe_modifier

#: Imports the libraries once, then every module in a fork of that process, as the first of this package.
_RUN = """
import importlib, json, os, sys, traceback

for library in json.loads(sys.argv[1]):
    importlib.import_module(library)
failed = {}
for name in json.loads(sys.argv[2]):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            os.write(write, traceback.format_exc()[-2000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        if said := pipe.read():
            failed[name] = said
    os.waitpid(child, 0)
print(json.dumps(failed))
"""
#: modules that run something, or need packages of an environment of their own
_OTHERS = ("bitsmoe_modifier.__main__",)


def _modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(bitsmoe_modifier.__path__, "bitsmoe_modifier.")]
    needs = {"bitsmoe_modifier.serving": "vllm", "bitsmoe_modifier.calibration": "llmcompressor"}
    left_out = tuple(f"{room}." for room, package in needs.items() if find_spec(package) is None)
    return [name for name in found if name not in _OTHERS and not name.startswith(left_out)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("order", ["after the libraries", "before them"])
def test_every_module_can_come_first(order: str) -> None:
    """All of them after the libraries that they plug into; before them, those that import these libraries first."""
    modules, libraries = _modules(), ["torch", "transformers"]
    if order == "before them":
        modules = [name for name in modules if name.endswith((".survey", ".targets", ".quantizer"))]
    else:
        libraries += ["compressed_tensors", *(["llmcompressor"] if find_spec("llmcompressor") else [])]
    assert "bitsmoe_modifier.loading.quantizer" in modules
    command = [sys.executable, "-c", _RUN, json.dumps(libraries), json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n".join(f"{name}: {said}" for name, said in failed.items())
