"""PTX text to a list of instructions: registers become slots, labels become indices, variables get addresses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.program import (
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Pair,
    Parameter,
    Program,
    Register,
    Special,
    Symbol,
    Target,
    Variable,
    Vector,
    immediate_bits,
)
from tests.ptx.types import TYPES, register_dtype

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_FUNCTION = re.compile(r"(?:\.visible\s+|\.weak\s+|\.extern\s+)*\.(entry|func)\b")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{", re.S)
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[.\s\w]*?\s)?([\w$]+)\s*(?:\[(\d+)\])?\s*$")
_VARIABLE = re.compile(
    r"\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)((?:\s*\[\d*\])*)\s*(?:=\s*([^;]*))?$",
    re.S,
)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_LINE_DIRECTIVE = re.compile(r"\.(?:loc|file)\b[^\n]*")
_STATEMENT = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_PIECE = re.compile(r"\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|[^,\s]+")
_ADDRESS = re.compile(r"\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)|(-\s*\d+))?\s*(?:,\s*\{([^}]*)\})?")
_NUMBER = re.compile(r"-?(?:0[fFdD][0-9a-fA-F]+|0[xX][0-9a-fA-F]+U?|\d+\.\d*(?:[eE][-+]?\d+)?|\d+U?)$")
_SPECIAL = re.compile(
    r"%(?:n?tid|n?ctaid|cluster_n?ctaid|n?clusterid)\.[xyz]$|%(?:laneid|n?warpid|lanemask_\w+|clock(?:64)?|globaltimer|smid|"
    r"n?smid|gridid|dynamic_smem_size|total_smem_size|cluster_n?ctarank)$"
)


def parse(ptx: str, entry: str | None = None) -> Program:
    """Read one entry point of a PTX module.

    `entry` may be left out where the module has one entry. Raises ValueError when there is no such entry,
    SyntaxError (with the line) for text that is not PTX as Triton and nvcc write it.
    """
    text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), ptx)
    found = {m.group(1): m for m in _ENTRY.finditer(text)}
    if entry is None and len(found) != 1 or entry is not None and entry not in found:
        raise ValueError(f"entry must name one of {sorted(found)}, got {entry!r}")
    match = found[entry] if entry is not None else next(iter(found.values()))
    module, globals_ = _module_scope(text)
    body = _Body(match.group(1), module)
    body.read(text, match.end(), _closing(text, match.end() - 1))
    body.resolve()
    parameters = _parameters(match.group(2) or "")
    limit = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", match.group(3))
    threads = int(np.prod([int(n) for n in limit.group(1).split(",") if n.strip()])) if limit else None
    return Program(
        name=match.group(1),
        params=[(p.name, p.type if p.type != "b8" else p.size) for p in parameters],
        parameters=parameters,
        threads=threads,
        instructions=tuple(body.instructions),
        registers=tuple(body.registers),
        shared_bytes=-(-module.shared_end // 16) * 16,
        shared=module.shared | {name: -(-module.shared_end // 16) * 16 for name in module.dynamic},
        local=module.local,
        local_bytes=-(-module.local_end // 16) * 16,
        variables=tuple(globals_),
        tables=body.tables,
    )


@dataclass
class _Module:
    shared: dict[str, int] = field(default_factory=dict)
    dynamic: list[str] = field(default_factory=list)  # extern shared arrays, all at the end of the static ones
    shared_end: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_end: int = 0

    def place(self, match: re.Match[str]) -> None:
        """Give a shared or local variable its offset."""
        space, align, type_, name, extents, _ = match.groups()
        step = int(align or TYPES[type_].size)
        if space == "shared" and "[]" in extents.replace(" ", ""):
            self.dynamic.append(name)
            return
        size = TYPES[type_].size * int(np.prod([int(n) for n in re.findall(r"\d+", extents)], dtype=np.int64))
        if space == "shared":
            self.shared[name] = -(-self.shared_end // step) * step
            self.shared_end = self.shared[name] + size
        else:
            self.local[name] = -(-self.local_end // step) * step
            self.local_end = self.local[name] + size


def _closing(text: str, start: int) -> int:
    """The index of the brace that closes the one at `start`."""
    depth = 0
    for m in re.finditer(r"[{}]", text[start:]):
        depth += 1 if m.group() == "{" else -1
        if depth == 0:
            return start + m.start()
    raise SyntaxError("a brace is never closed")


def _module_scope(text: str) -> tuple[_Module, list[Variable]]:
    pieces, position = [], 0
    for m in _FUNCTION.finditer(text):
        if m.start() < position:
            continue
        pieces.append(text[position : m.start()])
        brace, semicolon = text.find("{", m.end()), text.find(";", m.end())
        declared_only = brace < 0 or 0 <= semicolon < brace
        position = semicolon + 1 if declared_only else _closing(text, brace) + 1
    pieces.append(text[position:])
    module, variables = _Module(), []
    for statement in " ".join(pieces).split(";"):
        m = _VARIABLE.search(statement)
        if m and m.group(1) == "shared":
            module.place(m)
        elif m and m.group(1) in ("global", "const"):
            variables.append(_variable(m))
    return module, variables


def _variable(m: re.Match[str]) -> Variable:
    _, _, type_, name, extents, initial = m.groups()
    kind = TYPES[type_]
    size = kind.size * int(np.prod([int(n) for n in re.findall(r"\d+", extents)], dtype=np.int64))
    numbers = re.findall(r"-?\w+", initial or "")
    data = b"".join((immediate_bits(n, type_) & (1 << kind.bits) - 1).to_bytes(kind.size, "little") for n in numbers)
    return Variable(name, size, data)


def _parameters(text: str) -> tuple[Parameter, ...]:
    parameters, end = [], 0
    for piece in filter(str.strip, text.split(",")):
        m = _PARAM.search(piece.strip())
        if not m:
            raise SyntaxError(f"not a parameter: {piece.strip()}")
        size = TYPES[m.group(2)].size * int(m.group(4) or 1)
        step = int(m.group(1) or TYPES[m.group(2)].size)
        offset = -(-end // step) * step
        parameters.append(Parameter(m.group(3), m.group(2), size, offset))
        end = offset + size
    return tuple(parameters)


class _Scope:
    """Names that a pair of braces declares."""

    def __init__(self, parent: _Scope | None) -> None:
        self.parent = parent
        self.labels: dict[str, int] = {}
        self.registers: dict[str, int] = {}
        self.families: dict[str, str] = {}  # "%r" -> "b32" of `.reg .b32 %r<9>`

    def label(self, name: str) -> int | None:
        scope: _Scope | None = self
        while scope:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        return None


class _Body:
    """Reads the statements between an entry's braces."""

    def __init__(self, name: str, module: _Module) -> None:
        self.name, self.module = name, module
        self.instructions: list[Instruction] = []
        self.registers: list[tuple[str, np.dtype]] = []
        self.tables: dict[str, tuple[int, ...]] = {}
        self._scopes: list[_Scope] = []  # of each instruction
        self._pending_tables: list[tuple[str, list[str], _Scope]] = []

    def read(self, text: str, start: int, end: int) -> None:
        scope, position = _Scope(None), start
        line, counted = text.count("\n", 0, start) + 1, start
        space = re.compile(r"\s*")
        while True:
            position = space.match(text, position).end()  # type: ignore[union-attr]
            if position >= end:
                return
            if text[position] == "{":
                scope, position = _Scope(scope), position + 1
            elif text[position] == "}":
                assert scope.parent, "braces are balanced"
                scope, position = scope.parent, position + 1
            elif m := _LABEL.match(text, position):
                scope.labels[m.group(1)] = len(self.instructions)
                position = m.end()
            elif m := _LINE_DIRECTIVE.match(text, position):
                position = m.end()
            else:
                line, counted = line + text.count("\n", counted, position), position
                stop = text.index(";", position)
                self._statement(" ".join(text[position:stop].split()), scope, line)
                position = stop + 1

    def _statement(self, statement: str, scope: _Scope, line: int) -> None:
        if not statement or statement.startswith((".pragma", ".param", ".callprototype")):
            return
        if statement.startswith(".reg"):
            self._declare(statement, scope)
        elif statement.startswith(".branchtargets"):
            name = next(n for n, i in reversed(scope.labels.items()) if i == len(self.instructions))
            self._pending_tables.append((name, re.findall(r"[\w$]+", statement)[1:], scope))
        elif m := _VARIABLE.search(statement) if statement.startswith(".") else None:
            self.module.place(m)
        elif m := _STATEMENT.match(statement):
            negated, guard, opcode, rest = m.groups()
            pieces = _PIECE.findall(rest)
            register = self._register(guard, scope) if guard else None
            if guard and register is None:
                raise SyntaxError(f"line {line}: {guard} is not declared: {statement}")
            operands = tuple(self._operand(p, scope) for p in pieces)
            self._scopes.append(scope)
            self.instructions.append(
                Instruction(opcode, tuple(opcode.split(".")), operands, register, negated == "!", line, statement)
            )
        else:
            raise SyntaxError(f"line {line}: {statement}")

    def _declare(self, statement: str, scope: _Scope) -> None:
        m = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement)
        if not m:
            raise SyntaxError(statement)
        for name in m.group(2).split(","):
            family = re.match(r"\s*([%\w$]+)<\d+>", name)
            if family:
                scope.families[family.group(1)] = m.group(1)
            else:
                scope.registers[name.strip()] = self._add(name.strip(), m.group(1))

    def _add(self, name: str, type_: str) -> int:
        self.registers.append((name, register_dtype(type_)))
        return len(self.registers) - 1

    def _register(self, name: str, scope: _Scope) -> Register | None:
        here: _Scope | None = scope
        family = name.rstrip("0123456789")
        while here:
            if name in here.registers:
                return Register(here.registers[name], name)
            if family in here.families:
                here.registers[name] = self._add(name, here.families[family])
                return Register(here.registers[name], name)
            here = here.parent
        return None

    def _operand(self, text: str, scope: _Scope) -> Operand:
        if text[0] == "[":
            m = _ADDRESS.match(text[1:-1])
            if not m:
                raise SyntaxError(f"not an address: {text}")
            offset = int((m.group(2) or m.group(3) or "0").replace(" ", ""), 0)
            coordinates = tuple(self._operand(c.strip(), scope) for c in (m.group(4) or "").split(",") if c.strip())
            return Address(self._operand(m.group(1), scope), offset, coordinates)
        if text[0] in "{(":
            return Vector(tuple(self._operand(p.strip(), scope) for p in text[1:-1].split(",") if p.strip()))
        if text[0] == "!":
            return Negated(self._operand(text[1:], scope))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first, scope), self._operand(second, scope))
        register = self._register(text, scope)
        if register:
            return register
        if _SPECIAL.match(text):
            return Special(text)
        return Immediate(text) if _NUMBER.match(text) else Symbol(text)

    def resolve(self) -> None:
        """Turn label names into instruction indices; labels may stand behind their uses."""
        for i, (instruction, scope) in enumerate(zip(self.instructions, self._scopes, strict=True)):
            if instruction.parts[0] == "bra":
                name = getattr(instruction.operands[0], "name", "")
                index = scope.label(name)
                if index is None:
                    raise SyntaxError(f"line {instruction.line}: no label {name}")
                fields = {**instruction.__dict__, "operands": (Target(index),)}
                self.instructions[i] = Instruction(**fields)
        for name, labels, scope in self._pending_tables:
            self.tables[name] = tuple(scope.label(label) for label in labels)  # type: ignore[misc]
