"""A GPU that is not there: its tensors have shapes and no values, and what it is asked to do is counted.

Within `SimulatedGPU` the device "cuda" exists for Python code. Tensors on it are fake (torch's FakeTensorMode), those
on the host are real. What is read back from the device is made up: random numbers in [0, 1), True, 0. CUDA's autocast
is torch's own. Stood in for: the choice of an attention kernel (flash in 16 bits, else memory-efficient), which asks
the GPU, and masks on the device, which are taken as all True.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # isort: skip

from benchmarks.measuring import is_view

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
# What autograd is told of the device: it would ask a real GPU for the stream of a tensor on "cuda".
UNSEEN = torch.device("meta")
SPARSE_READS = {aten.index.Tensor, aten.embedding.default, aten.gather.default, aten.index_select.default}
OVERWRITING = {aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default, aten.normal_.default}
FLASH_HEAD_DIM = 256  # the widest head of the flash kernel
swap_tensors = torch.utils.swap_tensors
attention = functional.scaled_dot_product_attention


class Work(NamedTuple):
    """What one operator does on the device."""

    phase: str
    flops: int  # of matrix products, convolutions and attention
    low_precision: bool  # in 16 bits
    moved: int  # bytes read and written
    cast: bool  # a conversion of dtype


class SimulatedGPU(TorchDispatchMode):
    """A context in which the device "cuda" is simulated and counted.

    An operator counts as a launch if it is no view, however many kernels it starts. Memory is that of tensors, storage
    by storage, as long as they are held.

    Attributes:
        phase: the name under which work is counted.
        work: how often which work was launched, since `start`.
        names, host, transfers, waits: since `start`, by name of operator: launches; operators on host tensors; copies
            between host and device that convert nothing; and by phase: how often the host waited for a value.
        live: bytes that are held on the device.
        peaks: by phase, the most bytes that were held at once, since `start`.
        held: `live` at `start`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "rest"
        self.live = self.held = 0
        self._known: set[int] = set()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._random = torch.Generator().manual_seed(0)
        self._stack = ExitStack()
        self._backward = False
        self._changed: set[int] = set()  # ids of the tensors that the last operator changed in place
        self._leaves: list[Any] = []
        self.start()

    def start(self) -> None:
        """Forget what was counted; what is held stays held."""
        self.held = self.live
        self.work: Counter[Work] = Counter()
        self.names: Counter[str] = Counter()
        self.host: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.peaks: dict[str, int] = {self.phase: self.live}

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what happens within under the name of a phase; that of an inner phase is not the outer one's."""
        outer, self.phase = self.phase, phase
        self._weigh()
        try:
            yield
        finally:
            self.phase = outer
            self._weigh()

    def __enter__(self) -> SimulatedGPU:
        for change in [*_pretences(self._fake), *self._around_autograd()]:
            self._stack.enter_context(change)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self,
        function: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.ops.prim.device.default:
            return self._device_for_cpp(args[0])
        if function is aten.is_pinned.default:
            return True
        target = kwargs.get("device")
        if target is not None and torch.device(target).type in (DEVICE.type, UNSEEN.type):
            target = kwargs["device"] = DEVICE
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if not here and target != DEVICE:
            if not is_view(function):
                self.host[str(function)] += 1
            return function(*args, **kwargs)
        if function is aten._to_copy.default or function is aten.copy_.default:
            return self._copy(function, args, kwargs)
        if function in (aten._local_scalar_dense.default, aten.equal.default):
            self._count(function, args, kwargs, None)
            self.waits[self.phase] += 1
            return function is not aten.equal.default and {torch.bool: True, torch.int64: 0}.get(args[0].dtype, 0.0)
        if function is aten.nonzero.default:
            self.waits[self.phase] += 1
            with self._fake:
                result = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        else:
            known = _without_masks(function, args)
            with self._fake:
                result = function(*known, **kwargs)
        self._count(function, args, kwargs, result)
        self._expect_history(function, inputs, result)
        return result

    # ----------------------------------------------------------------------------------------------- autograd

    def adopt(self, parameters: Sequence[Tensor]) -> None:
        """Let autograd make its nodes for leaves that train, before autocast asks for their device."""
        with self._unseen(True):
            self._leaves += [leaf.view_as(leaf).grad_fn.next_functions[0][0] for leaf in parameters]

    def _device_for_cpp(self, tensor: Tensor) -> torch.device:
        """The device that C++ asks for: autograd must not see "cuda", autocast must.

        Autograd asks in a backward pass, and for what an operator has made before it has a history.
        """
        new = getattr(tensor, "_awaits_history", False) and tensor.grad_fn is None
        return UNSEEN if self._backward or new or id(tensor) in self._changed else DEVICE

    def _expect_history(self, function: torch._ops.OpOverload, inputs: Sequence[Tensor], result: Any) -> None:
        self._changed = set()
        if function is aten.detach.default or not torch.is_grad_enabled():
            return
        if not any(tensor.requires_grad for tensor in inputs):
            return
        known = {id(tensor) for tensor in inputs}
        for tensor in tree_leaves(result):
            if id(tensor) in known:
                self._changed.add(id(tensor))
            elif isinstance(tensor, FakeTensor):
                tensor._awaits_history = True

    @contextmanager
    def _unseen(self, backward: bool) -> Iterator[None]:
        before, self._backward = self._backward, backward
        try:
            yield
        finally:
            self._backward = before

    def _around_autograd(self) -> list[Any]:
        """Changes by which a backward pass is noticed, and within it a forward that gradient checkpointing repeats."""
        backward, enter, leave = torch.autograd.backward, torch.autocast.__enter__, torch.autocast.__exit__
        before: list[bool] = []

        def noticed(*args: Any, **kwargs: Any) -> None:
            with self._unseen(True):
                backward(*args, **kwargs)

        def entered(autocast: torch.autocast) -> Any:
            before.append(self._backward)
            self._backward = False
            return enter(autocast)

        def left(autocast: torch.autocast, *error: Any) -> Any:
            self._backward = before.pop()
            return leave(autocast, *error)

        return [
            patch.object(torch.autograd, "backward", noticed),
            patch.object(torch.autocast, "__enter__", entered),
            patch.object(torch.autocast, "__exit__", left),
        ]

    # ------------------------------------------------------------------------------------------------- copies

    def _copy(self, function: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A conversion, a transfer, both, or, where a backward pass took "cuda" for another device, nothing."""
        if function is aten.copy_.default:
            into, source = args[:2]
            device, dtype = into.device, into.dtype
        else:
            into, source = None, args[0]
            device = torch.device(kwargs.get("device") or source.device)
            dtype = kwargs.get("dtype") or source.dtype
        crosses, converts = device.type != source.device.type, dtype != source.dtype
        reordered = kwargs.get("memory_format") not in (None, torch.preserve_format)
        if into is None and not (crosses or converts or reordered):
            with self._fake:
                return aten.alias.default(source)
        if crosses and device.type == "cpu":
            self.waits[self.phase] += not kwargs.get("non_blocking", False)
            made_up = self._made_up(source.shape, dtype)
            result = made_up if into is None else into.copy_(made_up)
        else:
            with self._fake:
                result = function(*args, **kwargs)
        if crosses:
            self.transfers[str(function)] += 1
        if converts or not crosses:
            self._count(function, args, kwargs, result, cast=converts)
        else:
            self._hold(result)
        self._expect_history(function, [source] if into is None else [into, source], result)
        return result

    def _made_up(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A host tensor in place of one whose values nobody knows."""
        if dtype.is_floating_point:
            return torch.rand(shape, generator=self._random).to(dtype)
        return torch.full(shape, dtype == torch.bool, dtype=dtype)

    # ----------------------------------------------------------------------------------------------- counting

    def _count(
        self, function: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any,
        cast: bool = False,
    ) -> None:  # fmt: skip
        self._hold(result)
        if is_view(function):
            return
        self.names[str(function)] += 1
        flops, formula = 0, flop_registry.get(function._overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
        narrow = any(leaf.dtype.itemsize == 2 for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        moved = 0 if "empty" in str(function) else _moved(function, args, kwargs, result)
        self.work[Work(self.phase, flops, narrow, moved, cast)] += 1

    def _hold(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if not isinstance(tensor, FakeTensor) or tensor.device.type != DEVICE.type:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and size:
                self._known.add(key)
                self.live += size
                weakref.finalize(storage, self._release, key, size).atexit = False
                self._weigh()

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _weigh(self) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)


@cache
def _written(function: torch._ops.OpOverload) -> tuple[str | int, ...]:
    """Which arguments are changed in place, by position or, keyword-only, by name."""
    arguments = function._schema.arguments
    return tuple(
        argument.name if argument.kwarg_only else index
        for index, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _bytes(tree: Any) -> dict[int, int]:
    """Bytes of the tensors in a tree; an expanded one counts as what lies in memory."""
    sizes = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            size = leaf.numel() * leaf.element_size()
            sizes[id(leaf)] = min(size, leaf.untyped_storage().nbytes()) if 0 in leaf.stride() else size
    return sizes


def _moved(function: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes that an operator reads and writes at least."""
    reads, results = _bytes((args, kwargs)), _bytes(result)
    changed = _bytes([args[k] if isinstance(k, int) and k < len(args) else kwargs.get(k) for k in _written(function)])
    written = sum({**changed, **results}.values())
    if function in SPARSE_READS:
        return 2 * written
    if function in OVERWRITING:
        reads = {key: size for key, size in reads.items() if key not in changed}
    return sum(reads.values()) + written


def _without_masks(function: torch._ops.OpOverload, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of an indexing with its masks as numbers: a host mask as it is, one on the device as all True."""
    if function not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return args
    indices: list[Any] = []
    for index in args[1]:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            indices.append(index)
            continue
        known = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
        indices += [*known.nonzero().unbind(1)]
    return [args[0], indices, *args[2:]]


# -------------------------------------------------------------------------------------------------- pretences


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` by the kernel that a GPU would choose."""
    if not isinstance(query, FakeTensor):
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    low = query.dtype in (torch.float16, torch.bfloat16)
    if low and attn_mask is None and query.shape[-1] % 8 == 0 and query.shape[-1] <= FLASH_HEAD_DIM:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    with_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, with_gradient, dropout_p, is_causal, scale=scale
    )[0]


def _swap(tensor: Tensor, other: Tensor) -> None:
    """`Module.to` swaps fake parameters, which weak references forbid; setting their data does what it wants."""
    if isinstance(tensor, FakeTensor):
        tensor.data = other.data
    else:
        swap_tensors(tensor, other)


@contextmanager
def _settings(fake: FakeTensorMode) -> Iterator[None]:
    """PyTorch's own: `torch.tensor` makes its tensor on the host and moves it by an operator that a mode sees, and
    foreach operators take fake tensors."""
    with fake:  # sets the guard of CUDA devices to one that needs none
        pass
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    _foreach_supported_types.append(FakeTensor)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        _foreach_supported_types.remove(FakeTensor)


def _pretences(fake: FakeTensorMode) -> list[Any]:
    """What makes Python code believe in the device; nothing of it computes."""
    true: Callable[..., bool] = lambda *args, **kwargs: True  # noqa: E731
    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    return [
        _settings(fake),
        patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": str(DEVICE)}),
        patch.object(torch.cuda, "_lazy_init", nothing),
        patch.object(torch.cuda, "synchronize", nothing),
        patch.object(torch.cuda, "is_bf16_supported", true),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.utils, "swap_tensors", _swap),
        # By one copy, as a real tensor has it; a fake one would ask number by number.
        patch.object(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
        patch.object(functional, "scaled_dot_product_attention", _attend),
    ]
