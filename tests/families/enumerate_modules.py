"""Every module of the installed transformers with routed experts, found in its source: nothing is listed by hand."""

import ast
from pathlib import Path

import transformers

_DECORATOR = "use_experts_implementation"


def modules_with_experts() -> dict[str, list[str]]:
    """Module names, each with its experts classes: those with transformers' decorator, or that end in "Experts"."""
    found: dict[str, list[str]] = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "Experts" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and (_is_decorated(node) or _is_named(node.name)):
                found.setdefault(file.parent.name, []).append(node.name)
    return found


def _is_decorated(node: ast.ClassDef) -> bool:
    names = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
    return any(isinstance(name, ast.Name) and name.id == _DECORATOR for name in names)


def _is_named(name: str) -> bool:
    return name.endswith("Experts") and "Shared" not in name
