"""Gluon's own front end, led along the way that a launch takes: what it would compile is computed at once."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.compiler.code_generator import CodeGenerator, normalize_value
from triton.compiler.errors import CompilationError
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language._core import distributed_type
from triton.experimental.gluon.language._semantic import GluonCallerContext
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia import hopper
from triton.language.core import _unwrap_if_constexpr, constexpr
from triton.runtime.interpreter import InterpretedFunction, TensorDescHandle, TensorHandle
from triton.runtime.jit import JITFunction, mangle_type

from tests.device.gluon.builder import Builder, Options, Semantic
from tests.device.gluon.scheduler import Cta, KernelError, Scheduler, Task


class _Return(Exception):  # noqa: N818 (no error)
    def __init__(self, value: Any) -> None:
        self.value = value


class _Static:
    """What the front end computes itself, by identity: the hash of a jit function would look at all that it calls."""

    def get(self, fn: Any) -> Callable[..., Any] | None:
        table = CodeGenerator.statically_implemented_functions
        return next((compute for known, compute in table.items() if known is fn), None)


class Walker(CodeGenerator):
    """One call of a function. Names, operators, calls and types are the compiler's; branches and loops are taken."""

    statically_implemented_functions = _Static()

    def __init__(self, function: JITFunction, semantic: Semantic, context: GluonCallerContext) -> None:
        self.semantic, self.builder, self.caller_context = semantic, semantic.builder, context
        self.jit_fn, self.gscope = function, function.get_capture_scope()
        self.lscope: dict[str, Any] = {}
        self.local_defs: dict[str, Any] = {}
        self.pending_annotations: dict[str, Any] = {}
        self.name_loc_as_prefix = self.cur_node = None

    def call(self, values: dict[str, Any]) -> Any:
        """The result for these arguments."""
        self.lscope.update(values)
        try:
            self.visit_compound_statement(_body(self.jit_fn.fn))
        except _Return as result:
            return result.value
        except Exception as error:
            line = self.jit_fn.def_file_line_number - 1 + self.cur_node.lineno
            error.add_note(f"{self.jit_fn.file_name}:{line}: {ast.unparse(self.cur_node)[:99]}")
            raise
        return constexpr(None)

    def visit(self, node: ast.AST | None) -> Any:
        if node is None:
            return None
        if isinstance(node, ast.stmt):
            self.cur_node = node
        return getattr(self, f"visit_{type(node).__name__}", self.generic_visit)(node)

    def dereference_name(self, name: str) -> Any:
        for scope in (self.lscope, self.gscope, self.builtin_namespace):
            if name in scope:
                return scope[name]
        raise NameError(f"{name} is not defined")

    def visit_Return(self, node: ast.Return) -> None:
        raise _Return(normalize_value(self.visit(node.value)))

    def visit_If(self, node: ast.If) -> None:
        self.visit_compound_statement(node.body if self._holds(node.test) else node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        return self.visit(node.body if self._holds(node.test) else node.orelse)

    def visit_While(self, node: ast.While) -> None:
        while self._holds(node.test):
            self._once(node.body)

    def _once(self, body: list[ast.stmt], **names: Any) -> None:
        """A round of a loop; what it defines ends with it."""
        before = self.lscope.keys() - names.keys()
        self.lscope |= names
        self.visit_compound_statement(body)
        self.lscope = {name: value for name, value in self.lscope.items() if name in before}

    def visit_For(self, node: ast.For) -> None:
        bounds = [self.visit(argument) for argument in node.iter.args]
        names = dict(
            zip(("start", "stop", "step"), bounds if len(bounds) > 1 else [constexpr(0), *bounds], strict=False)
        )
        names |= {keyword.arg: self.visit(keyword.value) for keyword in node.iter.keywords}
        start, stop, step = (self._integer(names.get(name, constexpr(1))) for name in ("start", "stop", "step"))
        kind = ast.unparse(node.iter.func).rpartition(".")[2]
        if kind not in ("range", "static_range"):
            raise NotImplementedError(f"a loop over {kind}")
        for value in range(start, stop, step):
            item = constexpr(value)
            if kind == "static_range":
                self.set_value(node.target.id, item)
                self.visit_compound_statement(node.body)
            else:
                self._once(node.body, **{node.target.id: self.semantic.to_tensor(item)})

    def _holds(self, test: ast.expr) -> bool:
        value = self.visit(test)
        return bool(value.handle.data.item()) if isinstance(value, gl.tensor) else bool(_unwrap_if_constexpr(value))

    @staticmethod
    def _integer(value: Any) -> int:
        return int(value.handle.data.item() if isinstance(value, gl.tensor) else _unwrap_if_constexpr(value))

    def call_Function(self, node: ast.Call, fn: Any, args: list[Any], kws: dict[str, Any]) -> Any:
        if isinstance(fn, InterpretedFunction):
            fn = _compilable(fn.fn)
        if isinstance(fn, JITFunction):
            return self.call_JitFunction(fn, args, kws)
        if fn in (gl.reduce, tl.reduce, tl.core.reduce):
            return self._reduce(*args, **kws)
        try:
            return super().call_Function(node, fn, args, kws)
        except CompilationError as error:
            raise error.__cause__ or error  # noqa: B904 (what went wrong, without the front end's frame around it)

    def call_JitFunction(
        self, fn: JITFunction, args: Any, kwargs: Any, caller_context: GluonCallerContext | None = None
    ) -> Any:
        bound = fn.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = {name: normalize_value(value) for name, value in bound.arguments.items()}
        return Walker(fn, self.semantic, caller_context or self.caller_context).call(values)

    def _reduce(self, values: Any, axis: Any, combine_fn: Any, keep_dims: Any = False) -> Any:
        """From the first to the last along `axis`."""
        axis, combine = _unwrap_if_constexpr(axis), _compilable(_unwrap_if_constexpr(combine_fn).fn)
        if isinstance(values, gl.tensor):
            return self._reduce(gl.tuple([values]), axis, combine_fn, keep_dims)[0]
        if _unwrap_if_constexpr(keep_dims) or axis is None:
            raise NotImplementedError("a reduction of all dimensions, or one that keeps them")
        found = None
        for place in range(int(values[0].shape[axis])):
            parts = [self._part(value, axis, place) for value in values]
            if found is not None:
                parts = self.call_JitFunction(combine, [*found, *parts], {})
            found = (parts,) if isinstance(parts, gl.tensor) else tuple(parts)
        return gl.tuple(found)

    @staticmethod
    def _part(value: gl.tensor, axis: int, place: int) -> gl.tensor:
        if len(value.shape) == 1:
            return gl.tensor(TensorHandle(value.handle.data[place : place + 1], value.dtype), value.dtype)
        data = value.handle.data.take(place, axis)
        kind = distributed_type(value.dtype, list(data.shape), gl.SliceLayout(axis, value.type.layout))
        return gl.tensor(TensorHandle(data, value.dtype), kind)


@functools.cache
def _compilable(python: Callable[..., Any]) -> JITFunction:
    """In a process that interprets, `triton.jit` gives what Gluon's front end does not know."""
    return JITFunction(python)


@functools.cache
def _body(python: Callable[..., Any]) -> list[ast.stmt]:
    (definition,) = _compilable(python).parse().body
    return definition.body


def launch(kernel: GluonJITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """In place of GluonJITFunction.run: all CTAs of a grid side by side."""
    if warmup:
        return
    named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    values = inspect.getcallargs(kernel.fn, *args, **named)
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    grid = tuple(grid(values) if callable(grid) else grid)
    grid += (1,) * (3 - len(grid))
    scheduler, warps = Scheduler(), kwargs.get("num_warps", 4)
    semantic = Semantic(Builder(Options(num_warps=warps), scheduler, grid))
    given = {name: constexpr(value) if name in constants else _argument(value) for name, value in values.items()}
    given = {name: normalize_value(value) for name, value in given.items()}
    for program in np.ndindex(*grid):
        walker = Walker(kernel, semantic, GluonCallerContext(warps))
        scheduler.add(Task(f"CTA {program}", warps, Cta(program)), functools.partial(walker.call, given))
    scheduler.run()
    for task in scheduler.tasks:
        for store in task.stores:
            if not store.released:
                raise KernelError(f"{task.name} ends while a store still reads its shared memory")
            store.finish()


def _argument(value: Any) -> Any:
    """What a kernel is given, as the front end has it."""
    if isinstance(value, torch.Tensor):
        return _scalar(value.data_ptr(), tl.str_to_ty(mangle_type(value), None), np.uint64)
    if isinstance(value, int) and not isinstance(value, bool):
        wide = not -(2**31) <= value < 2**31
        return _scalar(value, tl.int64 if wide else tl.int32, np.int64 if wide else np.int32)
    if isinstance(value, hopper.TensorDescriptor):
        return _descriptor(value)
    if value is None or isinstance(value, bool | float):
        return constexpr(value)
    raise NotImplementedError(f"an argument of type {type(value)}")


def _scalar(value: int, kind: tl.dtype, numbers: type) -> gl.tensor:
    return gl.tensor(TensorHandle(np.array([value], dtype=numbers), kind), kind)


def _descriptor(source: hopper.TensorDescriptor) -> tma.tensor_descriptor:
    if source.padding != "zero" or source.round_f32_to_tf32:
        raise NotImplementedError("padding other than zeros, or rounding on the way")
    base = _argument(source.base)
    shape = [_argument(size) for size in source.shape]
    strides = [_scalar(stride, tl.int64, np.int64) for stride in source.strides]
    handles = ([x.handle for x in values] for values in (shape, strides))
    handle = TensorDescHandle(base.handle, *handles, list(source.block_shape), ir.PADDING_OPTION.PAD_ZERO)
    handle.validate()
    kind = tl.block_type(base.dtype.element_ty, list(source.block_shape))
    return tma.tensor_descriptor(handle, shape, strides, kind, source.layout)
