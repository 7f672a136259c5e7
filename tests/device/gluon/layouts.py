"""What Gluon's compiler says of layouts: the result's of a change of shape, where shared memory has what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language._layouts import DistributedLayout, SharedLayout

Shape = tuple[int, ...]


@functools.cache
def _context() -> Any:
    context = ir.context()
    ir.load_dialects(context)
    return context


def _compiler() -> Any:
    """A builder of real IR."""
    return gluon_ir.GluonOpBuilder(_context())


def _with_arguments(types: list[Any], build: Callable[..., Any]) -> Any:
    """What `build` makes of the arguments of a function with these types."""
    builder = _compiler()
    module = builder.create_module()
    module.set_attr("ttg.num-warps", builder.get_int32_attr(4))
    module.set_attr("ttg.num-ctas", builder.get_int32_attr(1))
    module.set_attr("ttg.threads-per-warp", builder.get_int32_attr(32))
    module.set_attr("ttg.target", builder.get_string_attr("cuda:90"))
    function = builder.get_or_insert_function(module, "f", builder.get_function_ty(types, []), "public", False)
    module.push_back(function)
    builder.set_insertion_point_to_start(function.add_entry_block())
    return build(builder, *(function.args(place) for place in range(len(types))))


def _tensor_type(bits: int, shape: Shape, layout: DistributedLayout) -> Any:
    builder = _compiler()
    return builder.get_distributed_ty(_integer(bits), list(shape), layout._to_ir(builder))


def _integer(bits: int) -> Any:
    return getattr(_compiler(), f"get_int{bits}_ty")()


@functools.cache
def reshaped(
    operation: str, bits: int, operands: tuple[tuple[Shape, DistributedLayout], ...], options: tuple[Any, ...]
) -> DistributedLayout:
    """The layout of the (first) result of an operation that changes shapes."""

    def build(builder: Any, *values: Any) -> DistributedLayout:
        plain = [list(option) if isinstance(option, tuple) else option for option in options]
        result = getattr(builder, operation)(*values, *plain)
        return builder.get_gluon_layout_from_tensor(result[0] if isinstance(result, tuple) else result)

    return _with_arguments([_tensor_type(bits, shape, layout) for shape, layout in operands], build)


@functools.cache
def is_trivial(bits: int, shape: Shape, source: DistributedLayout, target: DistributedLayout) -> bool:
    """Whether every thread already has what it is to have."""
    goal = _tensor_type(bits, shape, target)
    return _with_arguments(
        [_tensor_type(bits, shape, source)], lambda builder, value: builder.is_convert_layout_trivial(goal, value)
    )


def linear(layout: Any, shape: list[int]) -> Any:
    """A layout by its bases."""
    builder = _compiler()
    return builder.to_linear_layout(layout._to_ir(builder), shape)


@functools.cache
def changed(operation: str, bits: int, shape: Shape, layout: SharedLayout, order: Shape) -> SharedLayout:
    """The layout of a place in shared memory that is looked at in another way."""

    def build(builder: Any, place: Any) -> SharedLayout:
        return builder.get_gluon_layout_from_memdesc(getattr(builder, operation)(place, list(order)))

    builder = _compiler()
    place = builder.get_shared_mem_desc_ty(_integer(bits), list(shape), layout._to_ir(builder), list(shape))
    return _with_arguments([place], build)


@functools.cache
def places(layout: SharedLayout, shape: Shape) -> np.ndarray:
    """[shape] how many elements after the start each one lies; dimensions that the layout lacks are outermost."""
    outer = len(shape) - _rank(layout, shape)
    bases = linear(layout, list(shape[outer:])).offset_bases
    coordinates = np.zeros((1, len(shape) - outer), dtype=np.int64)
    for basis in bases:
        coordinates = np.concatenate([coordinates, coordinates ^ np.array(basis)])
    inner = np.full(shape[outer:], -1, dtype=np.int64)
    inner[tuple(coordinates.T)] = np.arange(len(coordinates))
    if len(coordinates) != inner.size or (inner < 0).any():
        raise NotImplementedError(f"a layout that leaves holes or repeats itself: {layout}")
    start = np.arange(int(np.prod(shape[:outer]))).reshape(*shape[:outer], *[1] * inner.ndim)
    found = start * inner.size + inner
    found.setflags(write=False)
    return found


def _rank(layout: SharedLayout, shape: Shape) -> int:
    if hasattr(layout, "rank"):
        return layout.rank
    return len(layout.order) if hasattr(layout, "order") else len(shape)
