"""Gluon's operations in numpy: Triton's own interpreter, and what Gluon has beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partialmethod
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language import _layouts as kinds
from triton.experimental.gluon.language._semantic import GluonCallerContext, GluonSemantic
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorDescHandle, TensorHandle

from tests.device.gluon import layouts
from tests.device.gluon.scheduler import KernelError, Scheduler, Task, merge
from tests.device.gluon.shared import Barrier, Copy, Memory, Store, View, fence
from tests.device.shim import poison

FENCE = "fence.proxy.async; // $0"
MOVE = "add.f32 $0, $1, 0f00000000;"
# Of launches that start early; here they run one after the other.
NOTHING = ("griddepcontrol.wait; // dummy $0", "griddepcontrol.launch_dependents; // dummy $0")


@dataclass(frozen=True)
class Options(InterpreterOptions):
    debug: bool = True
    enable_iisan: bool = True  # checks the alignment of coordinates
    num_warps: int = 4
    num_ctas: int = 1


class Product:
    """The accumulator of a warpgroup_mma, which reads its operands, and has no result, until somebody waits for it."""

    def __init__(self, views: list[View], dtype: tl.dtype) -> None:
        self.views, self.dtype, self.done = views, dtype, False
        self.sums: np.ndarray

    def finish(self) -> None:
        self.done = True
        for view in self.views:
            view.release(self)

    @property
    def data(self) -> np.ndarray:
        if not self.done:
            raise KernelError("a product is used before it was waited for")
        return self.sums


class Builder(InterpreterBuilder):
    """Handles of tensors are numpy arrays that know their layout; those of shared memory are `View`s."""

    def __init__(self, options: Options, scheduler: Scheduler, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.options, self.scheduler, self.grid_dim, self.module_map = options, scheduler, grid, {}

    @property
    def task(self) -> Task:
        return self.scheduler.current

    # Types and layouts: those of the language itself.

    get_auto_layout, get_coalesced_layout = kinds.AutoLayout, kinds.CoalescedLayout
    get_blocked_layout, get_slice_layout = kinds.BlockedLayout, kinds.SliceLayout
    get_dot_operand_layout, get_distributed_linear_layout = kinds.DotOperandLayout, kinds.DistributedLinearLayout
    get_swizzled_shared_layout, get_shared_linear_layout = kinds.SwizzledSharedLayout, kinds.SharedLinearLayout
    get_distributed_ty = _core.distributed_type

    def get_mma_layout(self, version: list[int], warps: list[int], cga: list[Any], shape: list[int]) -> Any:
        return kinds.NVMMADistributedLayout(version, warps, shape, cga)

    def get_nvmma_shared_layout(self, width: int, bits: int, transposed: bool, fp4: bool, cga: Any, rank: int) -> Any:
        return kinds.NVMMASharedLayout(width, bits, rank, transposed, fp4, cga)

    def get_shared_mem_desc_ty(self, element: tl.dtype, shape: list[int], layout: Any, allocated: list[int]) -> Any:
        return SimpleNamespace(dtype=element, shape=tuple(shape), layout=layout)

    def get_gluon_layout_from_tensor(self, handle: TensorHandle) -> kinds.DistributedLayout:
        return handle.layout

    def get_gluon_layout_from_memdesc(self, view: View) -> kinds.SharedLayout:
        return view.layout

    def is_convert_layout_trivial(self, target: _core.distributed_type, value: TensorHandle) -> bool:
        return layouts.is_trivial(_bits(value), value.data.shape, value.layout, target.layout)

    def to_linear_layout(self, layout: Any, shape: list[int]) -> Any:
        return layouts.linear(layout, shape)

    # Tensors.

    def _reshaped(self, *args: Any, operation: str) -> Any:
        """What the base class computes, with the layout that the compiler infers."""
        operands = [arg for arg in args if hasattr(arg, "data")]
        options = tuple(tuple(arg) if isinstance(arg, list | tuple) else arg for arg in args[len(operands) :])
        known = tuple((operand.data.shape, operand.layout) for operand in operands)
        layout = layouts.reshaped(operation, _bits(operands[0]), known, options)
        results = getattr(super(), operation)(*args)
        for result in results if isinstance(results, tuple) else (results,):
            result.layout = layout
        return results

    create_reshape = partialmethod(_reshaped, operation="create_reshape")
    create_trans = partialmethod(_reshaped, operation="create_trans")
    create_join = partialmethod(_reshaped, operation="create_join")
    create_split = partialmethod(_reshaped, operation="create_split")
    create_expand_dims = partialmethod(_reshaped, operation="create_expand_dims")

    def create_broadcast(self, value: TensorHandle, target: _core.distributed_type) -> TensorHandle:
        return _laid_out(super().create_broadcast(value, target.shape).data, value.dtype, target.layout)

    def create_convert_layout(self, target: _core.distributed_type, value: TensorHandle) -> TensorHandle:
        return _laid_out(value.data, value.dtype, target.layout)

    def create_set_auto_layout(self, layout: kinds.DistributedLayout, value: TensorHandle) -> TensorHandle:
        return _laid_out(value.data, value.dtype, layout)

    def create_splat(self, target: _core.distributed_type, value: TensorHandle) -> TensorHandle:
        return _laid_out(super().create_splat(target, value).data, value.dtype, target.layout)

    def create_get_program_id(self, axis: int) -> TensorHandle:
        return self.get_int32(self.task.cta.program[axis])

    def create_inline_asm(self, asm: str, constraints: str, values: list[Any], types: list[Any], *rest: Any) -> Any:
        if asm == MOVE:
            moved = TensorHandle(values[0].data + np.float32(0), values[0].dtype)
            return SimpleNamespace(get_result=lambda place: moved)
        if asm == FENCE:
            self.create_fence_async_shared(False)
        elif asm not in NOTHING:
            raise NotImplementedError(f"inline assembly that nobody said the meaning of: {asm!r}")
        return SimpleNamespace(get_result=lambda place: poison(types[place], (1,)))

    # Global memory.

    def create_masked_store(self, *args: Any) -> Any:
        self.scheduler.events += 1
        return super().create_masked_store(*args)

    def create_atomic_rmw(self, operation: Any, pointer: Any, value: Any, *rest: Any) -> TensorHandle:
        """Others may run after it: those whose turn it is to take what is counted, or who change what is looked at."""
        looks = str(operation).endswith(".ADD") and not value.data.any()
        self.scheduler.events += not looks
        found = super().create_atomic_rmw(operation, pointer, value, *rest)
        self.scheduler.wait_until(lambda: True, lambda: "what an atomic operation finds in memory")
        return found

    # Shared memory.

    def create_local_alloc(self, kind: Any, value: TensorHandle | None = None) -> View:
        memory = Memory(kind.dtype, int(np.prod(kind.shape)))
        self.task.cta.memories.append(memory)
        view = View(memory, 0, kind.dtype, kind.shape, kind.layout)
        if value is not None:
            self.create_local_store(view, value)
        return view

    def create_local_dealloc(self, view: View) -> None:
        pass

    def create_local_load(self, kind: _core.distributed_type, view: View) -> TensorHandle:
        return _laid_out(view.read(self.task), view.dtype, kind.layout)

    def create_local_store(self, view: View, value: TensorHandle) -> None:
        view.write(value.data, self.task)
        self.scheduler.events += 1

    def create_memdesc_index(self, kind: Any, view: View, index: TensorHandle) -> View:
        place, size = int(index.data.item()), view.size // view.shape[0]
        if not 0 <= place < view.shape[0]:
            raise KernelError(f"index {place} of shared memory {list(view.shape)}")
        if view.given is not None:
            raise NotImplementedError("a part of what was sliced or permuted")
        return View(view.memory, view.start + place * size, view.dtype, kind.shape, kind.layout)

    def create_memdesc_subslice(self, kind: Any, view: View, offsets: list[int]) -> View:
        part = tuple(slice(first, first + size) for first, size in zip(offsets, kind.shape, strict=True))
        return replace(view, shape=kind.shape, given=view.places[part])

    def create_memdesc_trans(self, view: View, order: list[int]) -> View:
        given = view.places.transpose(order)
        return replace(view, shape=given.shape, given=given, layout=_changed("create_memdesc_trans", view, order))

    def create_memdesc_reshape(self, view: View, shape: list[int]) -> View:
        given = view.places.reshape(shape)
        return replace(view, shape=given.shape, given=given, layout=_changed("create_memdesc_reshape", view, shape))

    def create_memdesc_reinterpret(self, kind: Any, view: View) -> View:
        new = View(view.memory, view.start, kind.dtype, kind.shape, kind.layout)
        if view.given is not None or new.size > view.size:
            raise KernelError(f"shared memory {list(view.shape)} taken for {list(kind.shape)}")
        return new

    def create_fence_async_shared(self, cluster: bool) -> None:
        fence(self.task.cta, self.task)

    # Barriers.

    def create_mbarrier_init(self, view: View, count: int) -> None:
        view.memory.barriers[view.start] = Barrier(count)

    def create_mbarrier_inval(self, view: View) -> None:
        del view.memory.barriers[view.start]

    def create_mbarrier_expect(self, view: View, size: int, condition: TensorHandle) -> None:
        if condition.data.item():
            self._barrier(view).arrive(self.task, 1, expected=size)

    def create_mbarrier_arrive(self, view: View, count: int, mask: int, condition: TensorHandle) -> None:
        if condition.data.item():
            self._barrier(view).arrive(self.task, count)

    def create_mbarrier_wait(self, view: View, phase: TensorHandle, condition: TensorHandle, deps: list[Any]) -> None:
        barrier, parity = self._barrier(view), int(phase.data.item())
        if parity not in (0, 1):
            raise KernelError(f"phase {parity}")
        if not condition.data.item():
            return
        if not barrier.passed(parity):
            place = list(view.memory.barriers).index(view.start)
            waits_for = f"phase {parity} of barrier {place}"
            self.scheduler.wait_until(lambda: barrier.passed(parity), lambda: f"{waits_for}: {barrier}")
        merge(self.task.clock, barrier.known)

    def _barrier(self, view: View) -> Barrier:
        self.scheduler.events += 1
        if view.start not in view.memory.barriers:
            raise KernelError("a barrier that nobody has initialised")
        return view.memory.barriers[view.start]

    # Copies.

    def create_async_copy_global_to_local(
        self, view: View, pointers: TensorHandle, mask: Any, other: Any, *rest: Any
    ) -> None:
        """Where the mask is off, zeros: such copies read no bytes and fill the rest."""
        if not isinstance(mask, TensorHandle):
            mask = TensorHandle(np.ones(view.shape, dtype=bool), tl.int1)
        zeros = TensorHandle(np.zeros_like(view.numbers[view.places]), view.dtype)
        load = functools.partial(super().create_masked_load, pointers, mask, zeros, None, None, False)
        self.task.copies.append(Copy(view, lambda: load().data, self.task, usual=True))

    def create_async_copy_mbarrier_arrive(self, view: View, increment: bool) -> None:
        """Each thread arrives when its copies have landed; its arrival is counted beforehand if `increment`."""
        self.task.copies = [copy for copy in self.task.copies if not copy.landed]
        count = 0 if increment else 32 * self.task.warps
        self._barrier(view).arrive(self.task, count, copies=self.task.copies)

    def create_async_commit_group(self) -> None:
        before = [copy for group in self.task.groups for copy in group]
        self.task.groups.append([copy for copy in self.task.copies if copy not in before])

    def create_async_wait_group(self, most: int) -> None:
        while len(self.task.groups) > most:
            for copy in self.task.groups.pop(0):
                copy.land()

    def create_async_tma_copy_global_to_local(
        self,
        source: TensorDescHandle,
        coordinates: list[TensorHandle],
        barrier: View,
        target: View,
        condition: TensorHandle,
        multicast: bool,
        offsets: Any,
    ) -> None:
        if multicast or offsets is not None:
            raise NotImplementedError("multicast, or im2col")
        if not condition.data.item():
            return
        box = tuple(source.block_shape)
        if box != target.shape:
            raise KernelError(f"a box {list(box)} into shared memory {list(target.shape)}")
        load = functools.partial(super().create_descriptor_load, source, coordinates, None, None)
        self._barrier(barrier).bring(Copy(target, lambda: load().data, self.task, usual=False))

    def create_async_tma_copy_local_to_global(
        self, target: TensorDescHandle, coordinates: list[TensorHandle], source: View
    ) -> None:
        put, dtype = super().create_descriptor_store, source.dtype
        store = Store(source, lambda data: put(target, TensorHandle(data, dtype), coordinates), self.task)
        self.task.stores.append(store)

    def create_async_tma_store_wait(self, most: int, read_only: bool) -> None:
        for store in self.task.stores[: max(0, len(self.task.stores) - most)]:
            store.release()
        if not read_only:
            while len(self.task.stores) > most:
                self.task.stores.pop(0).finish()
                self.scheduler.events += 1

    # Products.

    def create_warpgroup_mma(
        self, a: Any, b: View, sums: Any, use_sums: TensorHandle, precision: Any, imprecise: int, is_async: bool
    ) -> Product:
        product = Product([x for x in (a, b) if isinstance(x, View)], sums.dtype)
        operands = (TensorHandle(x.read(self.task, product), x.dtype) if isinstance(x, View) else x for x in (a, b))
        before = sums.sums if isinstance(sums, Product) else sums.data  # those of one accumulator follow each other
        if not use_sums.data.item():
            before = np.zeros_like(before)
        product.sums = super().create_dot(*operands, TensorHandle(before, sums.dtype), precision, imprecise).data
        self.task.products.append(product)
        if not is_async:
            self.create_warpgroup_mma_wait([], 0)
        return product

    def create_warpgroup_mma_wait(self, values: list[Any], most: int) -> list[Any]:
        while len(self.task.products) > most:
            self.task.products.pop(0).finish()
        return values


class Semantic(GluonSemantic):
    """Gluon's own rules of types, shapes and layouts, on a `Builder`."""

    builder: Builder

    def _knowing_layouts(self, *args: Any, operation: str, **kwargs: Any) -> Any:
        """What asks the builder for the layout of a result, which it infers from those of operands."""
        for arg in args:
            if isinstance(arg, gl.tensor) and isinstance(arg.type, _core.distributed_type):
                arg.handle.layout = arg.type.layout
        return getattr(super(), operation)(*args, **kwargs)

    reshape = partialmethod(_knowing_layouts, operation="reshape")
    permute = partialmethod(_knowing_layouts, operation="permute")
    join = partialmethod(_knowing_layouts, operation="join")
    split = partialmethod(_knowing_layouts, operation="split")
    expand_dims = partialmethod(_knowing_layouts, operation="expand_dims")
    convert_layout = partialmethod(_knowing_layouts, operation="convert_layout")

    def binary_op_sanitize_overflow_impl(self, lhs: gl.tensor, rhs: gl.tensor, binary_op: Callable[..., Any]) -> None:
        """What Triton asserts in seven operations, in one."""
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        name = binary_op.__name__
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
        found = operation(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        if found.max() > kind.get_int_max_value() or found.min() < kind.get_int_min_value():
            raise KernelError(f"int{kind.int_bitwidth} overflow detected for operation {name}")

    def warp_specialize(self, functions_and_args: Any, worker_num_warps: Any, registers: Any, generator: Any) -> Any:
        parent, scheduler = self.builder.task, self.builder.scheduler
        (first, arguments), *others = functions_and_args
        workers = []
        for place, ((function, values), warps) in enumerate(zip(others, worker_num_warps, strict=True), 1):
            worker = Task(f"{parent.name}, partition {place}", warps, parent.cta)
            parent.tell(worker.clock)

            def body(function: Any = function, values: Any = values, warps: int = warps) -> None:
                generator.call_JitFunction(function, list(values), {}, GluonCallerContext(warps))

            scheduler.add(worker, body)
            workers.append(worker)
        result = generator.call_JitFunction(first, list(arguments), {})
        scheduler.wait_until(lambda: all(worker.done for worker in workers), lambda: "its partitions")
        for worker in workers:
            merge(parent.clock, worker.clock)
        return result


def _laid_out(data: np.ndarray, dtype: tl.dtype, layout: kinds.DistributedLayout) -> TensorHandle:
    handle = TensorHandle(data, dtype)
    handle.layout = layout
    return handle


def _bits(value: TensorHandle) -> int:
    return 64 if value.dtype.scalar.is_ptr() else value.dtype.scalar.primitive_bitwidth


def _changed(operation: str, view: View, order: list[int]) -> kinds.SharedLayout:
    return layouts.changed(operation, view.dtype.primitive_bitwidth, view.shape, view.layout, tuple(order))
