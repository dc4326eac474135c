"""The runtime module on the plain path, against dense experts in float64."""

import copy
import itertools
import pickle
import sys
import types
from collections.abc import Callable

import pytest
import torch

from bitsmoe_modifier.devices import is_offloaded
from bitsmoe_modifier.method.gating import Gating
from bitsmoe_modifier.runtime import decoded, experts, native_product
from bitsmoe_modifier.runtime.experts import BitsMoEExperts
from bitsmoe_modifier.storage.packed import TENSOR_NAMES, PackedExperts
from helpers import RandomLayer, other_defaults, random_layer

LAYERS = {
    "both-bases": {},
    "int8-int4": {"basis_bits": (8, 4)},
    "no-bases": {"basis_bits": (0, 0)},
    "input-basis-only": {"basis_bits": (4, 0)},
    "output-basis-only": {"basis_bits": (0, 16)},
    "truncated-bf16": {"basis_bits": (16, 16), "rank_in": 48, "rank_out": 32},
    "one-width": {"widths": (2,)},
    "trellis": {"stripes": 2},
    "all-dropped": {"widths": (0,)},
    "mostly-dropped": {"widths": (0, 0, 0, 6)},
    "odd-sizes": {"num_experts": 3, "hidden": 80, "intermediate": 24, "group_size": 8},
    "one-group": {"intermediate": 16, "group_size": 16, "block_size": 32},
    "super-experts": {"dense": (1, 3)},
    "super-experts-no-bases": {"dense": (0,), "basis_bits": (0, 0)},
    "only-super-experts": {"num_experts": 2, "dense": (1, 0)},
    "biases": {"bias": True},
    "biases-super-experts": {"bias": True, "dense": (2,), "basis_bits": (8, 0)},
}
GATINGS = {
    "silu": Gating(),
    "gelu": Gating("gelu"),
    "gelu_tanh": Gating("gelu_tanh"),
    "relu": Gating("relu"),
    "clamped": Gating("silu", limit=0.7, alpha=1.702, up_shift=1.0),
}


def _routing(tokens: int, choices: int, num_experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct random experts for every token, with positive weights."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, num_experts, generator=gen).argsort(1)[:, :choices]
    return ids, torch.rand(tokens, choices, generator=gen)


def _inputs(
    layer: RandomLayer, tokens: int, dtype: torch.dtype, choices: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, expert ids and weights."""
    layout = layer.layout
    x = torch.randn(tokens, layout.hidden_size, generator=torch.Generator().manual_seed(1))
    ids, p = _routing(tokens, choices, layout.num_experts)
    return x.to(dtype), ids, p.to(dtype)


def _oracle(layer: RandomLayer, gating: Gating, x: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Every pair's dense expert in float64."""
    gate_up, down = layer.dense()
    packed, y = layer.packed, torch.zeros(x.shape, dtype=torch.float64)
    for token, choice in itertools.product(*map(range, ids.shape)):
        e = int(ids[token, choice])
        if not 0 <= e < layer.layout.num_experts:
            continue
        a = gate_up[e] @ x[token].double()
        if packed.in_bias is not None:
            a = a + packed.in_bias[e].double()
        out = down[e] @ gating(*a.chunk(2))
        if packed.out_bias is not None:
            out = out + packed.out_bias[e].double()
        y[token] += p[token, choice].double() * out
    return y


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius error relative to the expected output."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


# Every rounding is relative to its operand: four roundings of weights and activations per product and the sums of up to
# 100 terms between them; errors of different elements are independent. 8 units in the last place hold with room.
_TOLERANCE = {torch.float64: 1e-14, torch.float32: 8 * 2**-23, torch.bfloat16: 8 * 2**-8, torch.float16: 8 * 2**-11}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
# more than `FEW_PAIRS` pairs, and fewer; and more where products are compiled
@pytest.mark.parametrize(("tokens", "per_expert"), [(9, 0), (3, 0), (9, 16)], ids=["decoded", "packed", "compiled"])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_equals_dense_experts(
    kind: str, tokens: int, per_expert: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "FEW_PER_EXPERT", per_expert)
    layer = random_layer(**LAYERS[kind])
    x, ids, p = _inputs(layer, tokens, dtype)
    y = BitsMoEExperts(layer.packed, Gating())(x, ids, p)
    assert y.dtype == dtype
    expected = _oracle(layer, Gating(), x, ids, p)
    if kind == "all-dropped":
        assert torch.equal(y, torch.zeros_like(y))
    else:
        assert _error(y, expected) < _TOLERANCE[dtype]


@pytest.mark.parametrize("gating", GATINGS)
def test_forward_applies_the_gating(gating: str) -> None:
    layer = random_layer(seed=3)
    x, ids, p = _inputs(layer, 7, torch.float32)
    y = BitsMoEExperts(layer.packed, GATINGS[gating])(4 * x, ids, p)
    assert _error(y, _oracle(layer, GATINGS[gating], 4 * x, ids, p)) < _TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", LAYERS)
def test_dense_weights_are_the_decoded_factors(kind: str) -> None:
    layer = random_layer(**LAYERS[kind])
    gate_up, down = BitsMoEExperts(layer.packed, Gating()).dense_weights()
    expected_in, expected_out = layer.dense()
    assert gate_up.dtype == down.dtype == torch.float32
    assert gate_up.shape == expected_in.shape
    assert down.shape == expected_out.shape
    assert _error(gate_up, expected_in) < 1e-6
    assert _error(down, expected_out) < 1e-6


@pytest.mark.parametrize("choices", [1, 2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
def test_any_batch_size(tokens: int, choices: int) -> None:
    layer = random_layer(dense=(2,))
    x, ids, p = _inputs(layer, tokens, torch.float32, choices)
    y = BitsMoEExperts(layer.packed, Gating())(x, ids, p)
    assert y.shape == x.shape
    if tokens:
        assert _error(y, _oracle(layer, Gating(), x, ids, p)) < _TOLERANCE[torch.float32]


def test_foreign_ids_contribute_nothing() -> None:
    layer = random_layer(bias=True, dense=(1,))
    x, ids, p = _inputs(layer, 8, torch.float32)
    foreign = ids.clone()
    foreign[::2, 1] = torch.tensor([4, -1, 99, 2**31])
    y = BitsMoEExperts(layer.packed, Gating())(x, foreign, p)
    assert _error(y, _oracle(layer, Gating(), x, foreign, p)) < _TOLERANCE[torch.float32]
    nobody = BitsMoEExperts(layer.packed, Gating())(x, torch.full_like(ids, 4), p)
    assert torch.equal(nobody, torch.zeros_like(x))


def test_repeated_ids_add_up() -> None:
    layer = random_layer()
    x, _, p = _inputs(layer, 5, torch.float32)
    ids = torch.full((5, 2), 3)
    y = BitsMoEExperts(layer.packed, Gating())(x, ids, p)
    assert _error(y, _oracle(layer, Gating(), x, ids, p)) < _TOLERANCE[torch.float32]


def test_routing_may_have_other_dtypes_and_strides() -> None:
    layer = random_layer()
    x, ids, p = _inputs(layer, 6, torch.bfloat16)
    module = BitsMoEExperts(layer.packed, Gating())
    y = module(x, ids, p.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(module(x.T.contiguous().T, ids.int(), p.float().T.contiguous().T), y)


def test_chunks_and_cache_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small machine that decodes one expert at a time and keeps none computes the same bits."""
    monkeypatch.setattr(experts, "FEW_PER_EXPERT", 0)
    layer = random_layer(num_experts=6)
    x, ids, p = _inputs(layer, 20, torch.float32, choices=3)
    module = BitsMoEExperts(layer.packed, Gating())
    cold, few = module(x, ids, p), module(x[:4], ids[:4], p[:4])
    assert torch.equal(module(x, ids, p), cold)
    monkeypatch.setattr(experts, "CHUNK_BYTES", 1)
    monkeypatch.setattr(decoded, "CACHE_BYTES", 0)
    small = BitsMoEExperts(layer.packed, Gating())
    assert torch.equal(small(x, ids, p), cold)
    assert torch.equal(small(x[:4], ids[:4], p[:4]), few)
    assert small._cache.nbytes == 0


def test_few_pairs_leave_no_decoded_expert_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "FEW_PER_EXPERT", 0)
    layer = random_layer(num_experts=8, basis_bits=(0, 0))
    module = BitsMoEExperts(layer.packed, Gating())
    x, ids, p = _inputs(layer, 8, torch.float32)
    module(x, ids, p)
    assert module._cache.nbytes == 0
    x, ids, p = _inputs(layer, 9, torch.float32)
    module(x, ids, p)
    assert module._cache.nbytes > 0


def test_everything_decoded_can_be_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "FEW_PER_EXPERT", 0)
    monkeypatch.setattr(decoded, "CACHE_BYTES", 0)
    layer = random_layer(num_experts=6)
    module = BitsMoEExperts(layer.packed, Gating())
    x, ids, p = _inputs(layer, 20, torch.float32, choices=3)
    expected = module(x, ids, p)
    module.keep_decoded(True)
    assert torch.equal(module(x, ids, p), expected)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_decode", None)  # an error where anything is decoded again
        assert torch.equal(module(x, ids, p), expected)
    module.keep_decoded(False)
    assert module._cache.nbytes == 0
    module(x, ids, p)
    assert module._cache.nbytes == 0


def test_decodes_only_active_experts_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(num_experts=8)
    module = BitsMoEExperts(layer.packed, Gating())
    decoded_experts: list[list[int]] = []
    decode = module._decode

    def spy(wanted: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        decoded_experts.append(wanted)
        return decode(wanted, dtype)

    monkeypatch.setattr(module, "_decode", spy)
    monkeypatch.setattr(experts, "FEW_PAIRS", 0)
    monkeypatch.setattr(experts, "FEW_PER_EXPERT", 0)
    two_experts = 2 * 4 * 48 * (2 * 64 + 64)
    monkeypatch.setattr(experts, "CHUNK_BYTES", two_experts)
    x = torch.randn(3, 64)
    module(x, torch.tensor([[0, 7], [5, 2], [2, 0]]), torch.ones(3, 2))
    assert decoded_experts == [[0, 2], [5, 7]]
    module(x, torch.tensor([[0, 7], [5, 2], [2, 1]]), torch.ones(3, 2))
    assert decoded_experts[2:] == [[1]], "experts in the cache are not decoded again"


def test_cache_stays_in_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = (torch.zeros(100), torch.zeros(50))  # 600 bytes
    monkeypatch.setattr(decoded, "CACHE_BYTES", 1300)
    monkeypatch.setattr(decoded.DecodedCache, "_filled", type(decoded.DecodedCache._filled)())
    first, second = decoded.DecodedCache(), decoded.DecodedCache()
    for key in "abc":
        first.put(key, entry)
    assert [first.get(k) is not None for k in "abc"] == [False, True, True]
    first.get("b")
    first.put("d", entry)
    assert [first.get(k) is not None for k in "bcd"] == [True, False, True], "the least recently used one goes"
    second.put("a", entry)  # two layers: 650 bytes each
    first.put("e", entry)
    assert (first.nbytes, second.nbytes) == (600, 600)
    second.put("a", entry)  # by a thread that found nothing, as did another
    assert second.nbytes == 600
    third = decoded.DecodedCache()
    third.put("a", (torch.zeros(100),))  # 433 bytes each
    assert (first.nbytes, second.nbytes, third.nbytes) == (0, 0, 400), "no layer waits for its turn to give back"
    first.put("huge", (torch.zeros(1000),))
    assert first.get("huge") is None
    first.clear()
    assert first.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("kind", [{"stripes": 2}, {"dense": (1,), "bias": True}], ids=["trellis", "scalar"])
def test_defaults_of_the_user_change_nothing(kind: dict[str, object], tokens: int, dtype: torch.dtype) -> None:
    layer = random_layer(**kind)
    x, ids, p = _inputs(layer, tokens, torch.float32)
    expected = BitsMoEExperts(layer.packed, Gating())
    want, weights = expected(x, ids, p), expected.dense_weights()
    module = BitsMoEExperts(layer.packed, Gating())
    with other_defaults(dtype):
        found = module(x, ids, p)
        assert all(map(torch.equal, module.dense_weights(), weights))
    assert torch.equal(found, want)


@pytest.mark.parametrize("change", ["half", "float", "bfloat16", "double"])
def test_dtypes_are_part_of_the_format(change: str) -> None:
    layer = random_layer(dense=(0,), bias=True, basis_bits=(16, 8))
    module = BitsMoEExperts(layer.packed, Gating())
    x, ids, p = _inputs(layer, 4, torch.float32)
    before = module(x, ids, p)
    changed = getattr(module, change)().to(torch.float16)
    assert {n: t.dtype for n, t in changed.packed.items()} == {n: t.dtype for n, t in layer.packed.items()}
    assert torch.equal(changed(x, ids, p), before)


def test_meta_placeholder_takes_the_stored_tensors() -> None:
    layer = random_layer(dense=(0,), bias=True)
    empty = PackedExperts(**{n: torch.empty_like(t, device="meta") for n, t in layer.packed.items()})
    module = BitsMoEExperts(empty, Gating())
    assert all(p.is_meta and not p.requires_grad for p in module.parameters())
    assert "not loaded" in repr(module)
    module.to_empty(device="cpu").load_state_dict(dict(layer.packed.items()))
    assert module.spec == layer.layout
    assert (module.num_experts, module.hidden_dim, module.intermediate_dim) == (4, 64, 48)
    assert f"experts={layer.layout.num_experts}" in repr(module)
    x, ids, p = _inputs(layer, 4, torch.float32)
    assert torch.equal(module(x, ids, p), BitsMoEExperts(layer.packed, Gating())(x, ids, p))


def test_header_survives_the_meta_device() -> None:
    """Offloading replaces parameters by meta tensors between calls; the sizes must stay known."""
    layer = random_layer()
    assert BitsMoEExperts(layer.packed, Gating()).to("meta").spec == layer.layout


def test_new_tensors_replace_everything_derived_from_the_old() -> None:
    first, second = random_layer(seed=0, dense=(1,)), random_layer(seed=1, dense=(2,))
    module = BitsMoEExperts(first.packed, Gating())
    x, ids, p = _inputs(first, 8, torch.float32)
    module(x, ids, p)
    resized = {n: torch.empty_like(t) for n, t in second.packed.items()}
    for name, tensor in resized.items():  # payload lengths differ
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    module.load_state_dict(dict(second.packed.items()))
    assert _error(module(x, ids, p), _oracle(second, Gating(), x, ids, p)) < _TOLERANCE[torch.float32]


def test_state_dict_holds_the_stored_tensors() -> None:
    layer = random_layer(basis_bits=(0, 16))
    state = BitsMoEExperts(layer.packed, Gating()).state_dict()
    assert set(state) <= set(TENSOR_NAMES)
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {n: (t.dtype, t.shape) for n, t in layer.packed.items()}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_start_with_an_empty_cache(duplicate: Callable[[BitsMoEExperts], BitsMoEExperts]) -> None:
    layer = random_layer()
    module = BitsMoEExperts(layer.packed, Gating())
    x, ids, p = _inputs(layer, 9, torch.float32)
    y = module(x, ids, p)
    assert module._cache.nbytes > 0
    other = duplicate(module)
    assert other._cache.nbytes == 0
    assert torch.equal(other(x, ids, p), y)


@pytest.mark.parametrize("tokens", [9, 4], ids=["decoded", "packed"])
def test_serves_every_autograd_mode(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What inference decoded must not be an inference tensor, which a later backward could not use."""
    monkeypatch.setattr(native_product, "native_library", lambda source: None)  # which has no gradient, and other bits
    layer = random_layer(dense=(1,))
    module = BitsMoEExperts(layer.packed, Gating())
    x, ids, p = _inputs(layer, tokens, torch.float32)
    with torch.inference_mode():
        expected = module(x, ids, p).clone()
    x.requires_grad_(True)
    y = module(x, ids, p)
    assert torch.equal(y, expected)
    y.sum().backward()
    eps, direction = 1e-2, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x64 = x.double()
        slope = (module(x64 + eps * direction, ids, p) - module(x64 - eps * direction, ids, p)).sum() / (2 * eps)
    assert float((x.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-2)


def test_dispatches_to_the_kernels_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared once per dtype, again after a move, never when the plain path is forced or the layer is offloaded."""
    prepared: list[PackedExperts] = []
    kernels = types.ModuleType("bitsmoe_kernels")
    kernels.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    kernels.unsupported = lambda layout, dtype, device: "no kernel" if dtype == torch.float64 else ""
    sides = {"side_in": types.SimpleNamespace(), "side_out": types.SimpleNamespace()}

    def prepare(packed: PackedExperts) -> types.SimpleNamespace:
        if no_memory:
            raise no_memory.pop()
        prepared.append(packed)
        return types.SimpleNamespace(packed=packed, **sides)

    kernels.prepare = prepare
    no_memory = [torch.OutOfMemoryError()]
    kernels.moe_forward = lambda x, ids, p, experts, gating: "kernels"
    monkeypatch.setitem(sys.modules, "bitsmoe_kernels", kernels)
    monkeypatch.setattr(BitsMoEExperts, "forward_plain", lambda *_: "plain")

    class OnCuda(torch.Tensor):
        is_cuda = True

    def run(dtype: torch.dtype = torch.bfloat16) -> str:
        return module(torch.zeros(1, 64, dtype=dtype).as_subclass(OnCuda), torch.zeros(1, 1), torch.zeros(1, 1))

    module = BitsMoEExperts(random_layer().packed, Gating())
    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert (run(), run(), len(prepared)) == ("kernels", "kernels", 1), "what failed is tried again"
    assert run(torch.float64) == "plain"
    module.to("cpu")
    assert (run(), len(prepared)) == ("kernels", 2)
    monkeypatch.setenv("BITSMOE_FORCE_PLAIN", "1")
    assert run() == "plain"
    monkeypatch.delenv("BITSMOE_FORCE_PLAIN")
    module = BitsMoEExperts(random_layer().packed, Gating())
    monkeypatch.setattr(experts, "is_offloaded", lambda _: True)
    assert run() == "plain"


def test_a_hook_of_a_model_on_several_gpus_is_no_offloading() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="the base install has no accelerate")
    module = BitsMoEExperts(random_layer().packed, Gating())
    assert not is_offloaded(module)
    hooks.attach_execution_device_hook(module, "cpu")  # as every module of such a model has
    assert not is_offloaded(module)
    module._hf_hook = hooks.AlignDevicesHook("cpu", offload=True)
    assert is_offloaded(module)
