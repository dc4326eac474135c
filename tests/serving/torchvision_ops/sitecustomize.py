"""Lets torchvision be imported beside a torch for CPUs, in this process and, by PYTHONPATH, in those it starts.

vLLM's files of multimodal models import torchvision's transforms, which are plain Python. The wheel that pip finds is
built for CUDA: its compiled operators do not load, and the import stops where it registers shapes for two of them. So
the two are declared first. They are not run here.
"""

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Declare(importlib.abc.MetaPathFinder):
    """Finds nothing; acts when torchvision is looked for, so that other programs do not import torch for it."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in _OPERATORS:
                torch.library.define(f"torchvision::{operator}", _SCHEMA)


sys.meta_path.insert(0, _Declare())
