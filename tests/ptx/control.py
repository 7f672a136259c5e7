"""Which threads execute what next: branches, barriers, and threads that wait for one another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from tests.ptx.errors import ExecutionError, HangError
from tests.ptx.machine import BUILDERS, Kind, Machine, Operation, builder, unknown
from tests.ptx.program import Instruction, Symbol, Target
from tests.ptx.types import Array, Mask

MOST_INSTRUCTIONS = 20_000_000  # of one CTA; more means a loop that does not end


@builder("bra")
def build_branch(machine: Machine, ins: Instruction) -> Operation:
    target = ins.operands[0]
    assert isinstance(target, Target), "the parser resolves labels"
    return Operation(lambda act: None, Kind.BRANCH, target=target.index)


@builder("brx")
def build_table_branch(machine: Machine, ins: Instruction) -> Operation:
    """brx.idx: every thread goes where its index says."""
    index, table = machine.read(ins.operands[0], "u32"), ins.operands[1]
    if not isinstance(table, Symbol) or table.name not in machine.program.tables:
        raise unknown(ins)
    targets = np.array(machine.program.tables[table.name])

    def run(act: Mask) -> Array:
        chosen = index(act)
        if (chosen[machine.active(act)] >= len(targets)).any():
            raise ExecutionError(f"a table branch has {len(targets)} targets")
        return targets[np.minimum(chosen, len(targets) - 1)]

    return Operation(run, Kind.TABLE)


@builder("ret", "exit")
def build_exit(machine: Machine, ins: Instruction) -> Operation:
    return Operation(lambda act: None, Kind.EXIT)


@builder("trap", "brkpt")
def build_trap(machine: Machine, ins: Instruction) -> Operation:
    def run(act: Mask) -> None:
        raise ExecutionError(f"thread {machine.active(act)[0]} traps")

    return Operation(run)


@builder("call")
def build_call(machine: Machine, ins: Instruction) -> Operation:
    """Calls stand on paths such as a failed assertion; only reaching one is an error."""

    def run(act: Mask) -> None:
        raise ExecutionError(f"thread {machine.active(act)[0]} calls a function; only inlined code can be executed")

    return Operation(run)


@dataclass
class _Barrier:
    """A named barrier that threads wait at."""

    needs: int | None  # threads, None for all that live
    arrived: int = 0  # threads that do not wait


class Scheduler:
    """Runs the CTAs of one launch on a machine."""

    def __init__(self, machine: Machine, most: int = MOST_INSTRUCTIONS, polite: bool = False) -> None:
        self.most, self.polite = most, polite  # polite: a loop is left to other CTAs after each round
        self.machine, self.program = machine, machine.program
        self.instructions = machine.program.instructions
        self.code = [self._bind(ins) for ins in self.instructions]
        self.counts = [0] * len(self.code)

    def _bind(self, ins: Instruction) -> tuple[int, object, bool, Operation]:
        make = BUILDERS.get(ins.parts[0])
        if make is None:
            raise unknown(ins)
        try:
            operation = make(self.machine, ins)
        except (KeyError, IndexError, StopIteration, NotImplementedError) as error:
            raise NotImplementedError(f"line {ins.line}: {ins.text}") from error
        guard = self.machine.read(ins.guard, "pred") if ins.guard else None
        return int(operation.kind), guard, ins.guard_negated, operation

    def opcodes(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for ins, count in zip(self.instructions, self.counts, strict=True):
            total[ins.opcode] += count
        return {opcode: n for opcode, n in total.items() if n}

    def run_cta(self, index: tuple[int, ...]) -> None:
        self.begin(index)
        while self.turn():
            pass

    def begin(self, index: tuple[int, ...]) -> None:
        self.index = index
        threads = self.machine.threads
        self.place = np.zeros(threads, np.int64)  # the next instruction of each thread
        self.alive = np.ones(threads, bool)
        self.blocked = np.zeros(threads, bool)  # to be tried again when something happened
        self.waiting = np.full(threads, -1)  # the number of the barrier
        self.barriers: dict[int, _Barrier] = {}
        self.left = self.most
        self.tried = -1
        self.current = 0

    def turn(self) -> bool:
        """Let some threads run; whether there are any left, or else what is under way arrives."""
        try:
            if self.alive.any():
                self._turn()
        except ExecutionError as error:
            ins = self.instructions[min(self.current, len(self.instructions) - 1)]
            where = "" if isinstance(error, HangError) else f", at line {ins.line}: {ins.text}"
            raise type(error)(f"{error}{where} (CTA {self.index})") from error
        if self.alive.any():
            return True
        for writes in self.machine.state.pop("leaving", {}).values():
            for write in writes:
                write()
        return False

    def _turn(self) -> None:
        """Let the group of threads at the smallest instruction run."""
        able = self.alive & (self.waiting < 0)
        ready = able & ~self.blocked
        if not ready.any():
            if not self.blocked.any() or self.tried == self.machine.events:
                self._hang()
            self.tried = self.machine.events
            self.blocked[:] = False
            ready = able
        start = int(self.place[ready].min())
        group = able & (self.place == start)
        self.blocked[group] = False
        others = self.alive & ~group
        if others.any():
            ahead = self.place[others & (self.waiting < 0)]
            ahead = ahead[ahead > start]
            stop = int(ahead.min()) if len(ahead) else len(self.code)
            self._run(start, group, stop, alone=False)
        else:
            self._run(start, None if group.all() else group, len(self.code), alone=True)

    def _hang(self) -> None:
        stuck = {int(self.place[t]): int(t) for t in np.flatnonzero(self.alive)[::-1]}
        where = "; ".join(
            f"thread {t} at line {self.instructions[p].line}: {self.instructions[p].text}"
            for p, t in sorted(stuck.items())
        )
        raise HangError(f"no thread can go on: {where}")

    def _run(self, pc: int, group: Mask, stop: int, alone: bool) -> None:
        """Execute from `pc` until the group parts, ends, or comes to `stop`, where others wait for it."""
        machine, code, counts = self.machine, self.code, self.counts
        threads = machine.threads
        size = threads if group is None else int(np.count_nonzero(group))
        machine.group = group
        every = slice(None) if group is None else group
        budget = self.left
        end = len(code)
        while True:
            if pc >= stop:
                if pc >= end:
                    raise ExecutionError("the kernel runs past its last instruction")
                self.place[every] = pc
                break
            kind, guard, negated, operation = code[pc]
            self.current = pc
            counts[pc] += 1
            budget -= 1
            if budget < 0:
                raise HangError(
                    f"a CTA executed {self.most} instructions; line {self.instructions[pc].line} is in a loop"
                )
            act, taking = group, size
            if guard is not None:
                flags = guard(group)
                act = ~flags if negated else flags
                if group is not None:
                    act = act & group
                taking = int(np.count_nonzero(act))
                if taking == 0:
                    pc += 1
                    continue
                if taking == threads:
                    act = None
            if kind == Kind.PLAIN:
                operation.run(act)
                pc += 1
                continue
            if kind == Kind.BRANCH and taking == size and alone:
                back, pc = self.polite and operation.target <= pc, operation.target
                if back:
                    self.place[every] = pc
                    break
                continue
            if kind == Kind.SYNC and act is None or kind == Kind.BARRIER and self._trivial(operation, taking, act):
                operation.run(act)
                if kind == Kind.BARRIER:
                    machine.shared.synchronise()
                pc += 1
                continue
            self.place[every] = pc + 1
            if self._special(kind, operation, act, pc):
                if taking == size and alone and group is None and (self.place == pc + 1).all() and self.alive.all():
                    pc += 1
                    continue
            break
        self.left = budget

    def _trivial(self, operation: Operation, taking: int, act: Mask) -> bool:
        """Whether all living threads arrive at once."""
        if taking != np.count_nonzero(self.alive):
            return False
        assert operation.barrier, "the builder sets it"
        number, needs = operation.barrier(act)
        return not operation.arrives_only and needs in (None, taking) and number not in self.barriers

    def _special(self, kind: int, operation: Operation, act: Mask, pc: int) -> bool:
        """Instructions that change where threads stand; true where nothing changed."""
        doing = np.ones(self.machine.threads, bool) if act is None else act
        if kind == Kind.BRANCH:
            self.place[doing] = operation.target
        elif kind == Kind.TABLE:
            self.place[doing] = operation.run(act)[doing]
        elif kind == Kind.EXIT:
            self.alive[doing] = False
            self.machine.events += 1
            for number in list(self.barriers):
                self._release(number, operation)
        elif kind == Kind.BARRIER:
            self._arrive(operation, doing, pc)
        elif kind == Kind.WAIT:
            ready = operation.run(act)
            if ready is None:
                return True
            self._block(doing & ~ready, pc)
        elif kind == Kind.SYNC:
            assert operation.need, "the builder sets it"
            missing = operation.need(act) & self.alive & ~doing
            if not missing.any():
                operation.run(act)
                return True
            warps = self.machine.lanes // 32
            incomplete = np.isin(warps, warps[missing])
            complete = doing & ~incomplete
            self._block(doing & incomplete, pc)
            if complete.any():
                operation.run(complete)
        return False

    def _block(self, threads: Array, pc: int) -> None:
        self.place[threads] = pc
        self.blocked |= threads

    def _arrive(self, operation: Operation, doing: Array, pc: int) -> None:
        assert operation.barrier, "the builder sets it"
        number, needs = operation.barrier(doing)
        barrier = self.barriers.setdefault(number, _Barrier(needs))
        if barrier.needs != needs:
            raise ExecutionError(
                f"barrier {number} waits for {barrier.needs} threads in one place and {needs} in another"
            )
        if operation.arrives_only:
            barrier.arrived += int(np.count_nonzero(doing))
        else:
            self.waiting[doing] = number
            self.place[doing] = pc
        self._release(number, operation)

    def _release(self, number: int, operation: Operation) -> None:
        """Open a barrier when enough threads have come."""
        barrier, waiting = self.barriers[number], self.waiting == number
        count = int(np.count_nonzero(waiting)) + barrier.arrived
        needed = int(np.count_nonzero(self.alive)) if barrier.needs is None else barrier.needs
        if count < needed:
            return
        for pc in np.unique(self.place[waiting]):
            here = waiting & (self.place == pc)
            bound = self.code[pc][3]
            warps = self.machine.lanes // 32
            torn = self.alive & ~here & np.isin(warps, warps[here])
            if bound.aligned and torn.any():
                self.current = int(pc)
                raise ExecutionError(f"a barrier is executed by a part of the warp of thread {np.flatnonzero(torn)[0]}")
            bound.run(here)
            self.place[here] = pc + 1
        self.waiting[waiting] = -1
        self.machine.shared.synchronise()
        del self.barriers[number]
        self.machine.events += 1
