"""Which layers the kernels take on which GPU: `unsupported` says why not."""

from types import SimpleNamespace

import pytest
import torch
from bitsmoe_kernels import unsupported

from bitsmoe_modifier.storage.layout import ExpertsLayout

LAYOUT = ExpertsLayout(2, 128, 128, 128, 128, 64, 64, 4, 0, 64)


@pytest.mark.parametrize(
    ("major", "shared", "words"),
    [(7, 64, "older than sm_80"), (8, 99, ""), (9, 227, ""), (8, 98, "100352 bytes of shared memory"), (12, None, "")],
)
def test_a_gpu_that_is_too_small_is_refused_in_words(monkeypatch, major, shared, words):
    properties = SimpleNamespace() if shared is None else SimpleNamespace(shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    reason = unsupported(LAYOUT)
    assert words in reason
    assert bool(reason) == bool(words)
