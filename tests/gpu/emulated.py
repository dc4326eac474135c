"""A second device in the place of a GPU: tensors with real data in main memory that torch treats as on another device.

`torch.device("emulated")` is torch's place for backends from outside (PrivateUse1), registered here from Python. Its
tensors hold a CPU tensor each. While `emulated_gpu()` lasts, every operation on them is checked as CUDA checks it
(`mixed_devices`), runs on what they hold, and gives tensors on the same device. What only a CPU can do with a tensor
(``numpy``, ``data_ptr``) raises. ``is_cuda`` is True, for branches that ask for it.

To be imported only by processes of their own (`test_emulated.py` starts them): the device stays registered, and torch
takes it for the machine's accelerator.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("emulated")

#: the one emulated GPU
GPU = torch.device("emulated", 0)

_ATEN = torch.ops.aten
#: from any device to any
_COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN.copy.default}
#: of what follows the tensor that is indexed, numbers may stay on the CPU
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default, _ATEN._index_put_impl_.default}
#: elementwise, yet without an exception for numbers on the CPU (their iterators do not ask for it)
_STRICT = {
    _ATEN.clamp.Tensor,
    _ATEN.clamp_.Tensor,
    _ATEN.addcmul.default,
    _ATEN.addcmul_.default,
    _ATEN.addcdiv.default,
    _ATEN.addcdiv_.default,
    _ATEN.lerp.Tensor,
    _ATEN.lerp_.Tensor,
}
#: products that CUDA has for floating-point numbers only
_FLOAT_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "linear", "addbmm")


@dataclass(frozen=True)
class _Address:
    """Of data on the GPU: no number, so that it cannot be handed to code that is compiled for a CPU."""

    place: int


class GPUTensor(torch.Tensor):
    """A tensor on the emulated GPU.

    Attributes:
        held: the CPU tensor with its data.
    """

    __slots__ = ("_is_param", "held")
    held: torch.Tensor
    _is_param: bool
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None:  # taken for the class of a parameter
            return torch.nn.Parameter(held, requires_grad)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=GPU,
        )
        made.held, made._is_param = held, False
        return made

    # libraries that move tensors between devices give a copy the class and the attributes of what it is a copy of

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.nn.Parameter if self._is_param else torch.Tensor

    @__class__.setter
    def __class__(self, kind: type) -> None:
        self._is_param = issubclass(kind, torch.nn.Parameter)

    @property
    def is_cuda(self) -> bool:
        """True: code for GPUs is what runs."""
        return True

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as by CUDA."""
        if force:
            return self.held.numpy(force=True)
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def data_ptr(self) -> Any:
        """To be compared with others, and with nothing else."""
        return _Address(self.held.data_ptr())

    def untyped_storage(self) -> Any:
        """Refused: its bytes are of no device."""
        raise RuntimeError("the storage of a tensor on device emulated:0 was asked for")

    def tolist(self) -> Any:
        """Values, copied to the CPU."""
        return self.held.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = GPUTensor(self.held.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GPUTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Sees the operations without a tensor of the GPU as well: they may make one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


#: all that ran on the GPU: by operation the dtypes of its tensors
operations: dict[Any, set[tuple[torch.dtype, ...]]] = defaultdict(set)


@contextmanager
def emulated_gpu() -> Iterator[torch.device]:
    """Let torch make tensors on the emulated GPU while the block lasts."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    # a Parameter cannot become a GPUTensor, as its data would
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Everything():
            yield GPU
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operation, checked and run on the CPU; what it makes is where CUDA would have made it."""
    tensors: list[torch.Tensor] = []
    held_args = tuple([_held(value, tensors) for value in args])
    held_kwargs = {name: _held(value, tensors) for name, value in kwargs.items()}
    here = any(isinstance(tensor, GPUTensor) for tensor in tensors)
    device = kwargs.get("device")
    there = here if device is None else torch.device(device).type == GPU.type
    if not here and not there:
        return func(*args, **kwargs)
    if here:
        mixed_devices(func, args, tensors)
        operations[func].add(tuple([tensor.dtype for tensor in tensors]))
    generator = kwargs.get("generator")
    if there and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
    name = func.overloadpacket.__name__
    if here and name in _FLOAT_PRODUCTS and not all(t.is_floating_point() or t.is_complex() for t in tensors):
        raise RuntimeError(f'"{name}_cuda" not implemented for {[t.dtype for t in tensors]}')
    if device is not None:
        held_kwargs["device"] = torch.device("cpu")
    if func is _ATEN.histc.default:  # which a CPU has for floating-point numbers only
        made = func(held_args[0].float(), *held_args[1:]).to(held_args[0].dtype)
    else:
        made = func(*held_args, **held_kwargs)
    if here != there and made is held_args[0]:
        made = made.clone()  # a copy on another device, in any case
    written = _written(func)
    if not written:
        if not there:
            return made
        # a view of an ordinary tensor is one in inference mode, too
        ordinary = _aliased(func) and isinstance(args[0], torch.Tensor) and not args[0].is_inference()
        with torch.inference_mode(False) if ordinary and torch.is_inference_mode_enabled() else nullcontext():
            return _wrapped(made)
    targets = [args[at] if at < len(args) else kwargs.get(name) for at, name in written]
    if torch.Tag.inplace_view in func.tags:
        _reshaped(func, args, kwargs)
    for target in targets:
        if isinstance(target, GPUTensor) and (target.shape, target.stride()) != (
            target.held.shape,
            target.held.stride(),
        ):
            target.data = GPUTensor(target.held)  # an empty one was given for the result
    return targets[0] if isinstance(made, torch.Tensor) else None if made is None else tuple(targets)


def _empty(size: Any, stride: Any, dtype: Any = None, **_: Any) -> GPUTensor:
    return GPUTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: torch.Tensor, target: torch.Tensor, _non_blocking: bool = False) -> torch.Tensor:
    _held(target, []).copy_(_held(source, []))
    return target


# what a copy to the GPU is made of, where no mode is: in other threads, and inside of torch.tensor
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty_strided", _empty, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


def _held(value: Any, tensors: list[torch.Tensor]) -> Any:
    """An argument as the CPU takes it; tensors in it are added to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.held if isinstance(value, GPUTensor) else value
    return [_held(item, tensors) for item in value] if isinstance(value, (list, tuple)) else value


def _wrapped(made: Any) -> Any:
    if isinstance(made, torch.Tensor):
        return GPUTensor(made)
    return type(made)(_wrapped(item) for item in made) if isinstance(made, (list, tuple)) else made


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((at, a.name) for at, a in arguments if a.alias_info is not None and a.alias_info.is_write)


@cache
def _aliased(func: Any) -> bool:
    """Whether an operation gives views of what it is given."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _reshaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give a tensor the shape that what it holds got in place, as torch's own wrappers of tensors do it."""
    meta = torch._C._meta_in_tls_dispatch_include()
    with no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(meta)


def mixed_devices(func: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Raise as CUDA does where an operation has tensors of two devices that it does not take together."""
    away = [tensor for tensor in tensors if not isinstance(tensor, GPUTensor)]
    if not away or func in _COPIES:
        return
    first = args[0] if args else None
    if func in _INDEXING:
        values = args[2] if len(args) > 2 else None
        if isinstance(first, GPUTensor) and (values is None or isinstance(values, GPUTensor) or values.ndim == 0):
            return
    elif torch.Tag.pointwise in func.tags and func not in _STRICT and all(tensor.ndim == 0 for tensor in away):
        kept = not _written(func) or isinstance(first, GPUTensor)
        if kept and (len(away) == 1 or func is _ATEN.where.self):
            return
    shapes = [f"{'cuda:0' if isinstance(t, GPUTensor) else t.device} {list(t.shape)}" for t in tensors]
    raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found {', '.join(shapes)}")


def on_gpu(value: Any) -> Any:
    """Tensors of a structure (tuples, lists, dicts) moved to the emulated GPU."""
    return pytree.tree_map(lambda t: t.to(GPU) if isinstance(t, torch.Tensor) else t, value)


def raised(run: Callable[[], Any]) -> str:
    """What an operation says that must fail; "" where it does not."""
    try:
        run()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return ""
