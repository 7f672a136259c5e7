"""The training behind distillation: Adam on float32 copies of a few tensors, judged as they will be written.

A model that was pruned and repaired is near its optimum, where a step that is too long undoes in ten steps what a
hundred gain. So that one rate serves tensors of any scale, a step is relative to what it changes: the learning rate of
a tensor is `RATE` times its root mean square (Adafactor's relative step, arXiv 1804.04235), after a warm-up and along a
cosine to zero; Adam forgets squares after a hundred steps; a gradient much longer than the last ones is cut. Text that
is held back judges the weights in the type they are written in: the best are kept, the untrained ones where none is
better. On the way they may be somewhat worse, which the cosine takes back; where they are so by half the untrained
ones' error, training has diverged, and goes back to the best and on at half the rate.
"""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from cprune.act.least_squares import judges
from cprune.config import PruneConfig
from cprune.stream import counted

log = logging.getLogger(__name__)

RATE = 0.005  # of a tensor's root mean square: about the most that a step changes an element by
WARM_UP = 10  # steps, at most a fifth of all
SEQUENCES = 8  # of a step
JUDGEMENTS = 12  # of a training, about
DIVERGED = 1.5  # times the untrained weights' error
CLIP = 2.0  # of the running mean of the gradients' norms
STATE = ("done", "best_step", "untrained", "least", "rate", "norm")  # what is saved besides tensors


@dataclass(frozen=True)
class Text:
    """The sequences that are trained on and those that judge."""

    input_ids: torch.Tensor  # [N, S] int64
    mask: torch.Tensor  # [N, S] bool: the tokens that count
    order: torch.Tensor  # [steps x size] int64: the sequences of the steps, one step's after the other's
    held: torch.Tensor  # [n] int64: those that judge
    size: int  # sequences of a step

    @classmethod
    def of(cls, input_ids: torch.Tensor, mask: torch.Tensor, config: PruneConfig, *, joined: bool) -> Text:
        """Hold back the `judges` among sequences [N, S] and train on the others in drawn orders.

        Args:
            joined: after the first time round, sequences are made of the end of one and the beginning of another: the
                teacher answers to any text, and what the student sees but once it cannot learn by heart.
        """
        mask = counted(mask, skip_first=config.skip_first)
        held = judges(len(mask))
        fitted, judging = ((~held).nonzero().flatten(), held.nonzero().flatten())
        size = min(SEQUENCES, len(fitted))
        generator = torch.Generator().manual_seed(config.seed)
        rounds = -(-config.steps * size // len(fitted))
        order, other = (
            fitted[torch.cat([torch.randperm(len(fitted), generator=generator) for _ in range(rounds)])]
            for _ in range(2)
        )
        order, other = order[: config.steps * size], other[: config.steps * size]
        if not joined:
            return cls(input_ids, mask, order, judging, size)
        cut = torch.randint(1, input_ids.shape[1], (len(order),), generator=generator)
        cut[: len(fitted)] = 0
        places = cut.unsqueeze(1) + torch.arange(input_ids.shape[1])
        ids, mask = (
            torch.cat([torch.cat([whole[order], whole[other]], dim=1).gather(1, places), whole[judging]])
            for whole in (input_ids, mask)
        )
        count = len(order)
        return cls(ids, mask, torch.arange(count), torch.arange(count, count + len(judging)), size)

    def tokens(self, rows: torch.Tensor) -> int:
        """How many tokens of some sequences count."""
        return max(1, int(self.mask[rows].sum()))

    def rows_of_step(self, step: int) -> torch.Tensor:
        """The sequences of a step, counted from 0."""
        return self.order[step * self.size : (step + 1) * self.size]


class Training:
    """Some parameters of a model on their way; the model itself computes with them in its own type."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        on_disk: Mapping[str, torch.dtype],
        *,
        steps: int,
        accelerator: Accelerator,
    ) -> None:
        """
        Args:
            parameters: what is trained, by any name; of any floating-point type.
            on_disk: the type that each will be written in.
        """
        self.parameters, self.on_disk, self.steps, self.accelerator = parameters, on_disk, steps, accelerator
        self.masters = {name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()}
        groups = [{"params": [x], "scale": float(x.square().mean().sqrt())} for x in self.masters.values()]
        self.adam = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-15)  # gradients are of any scale
        self.best = self._cast()
        self.done, self.best_step = 0, 0
        self.untrained = self.least = math.inf  # errors on the text held back
        self.rate, self.norm = RATE, math.inf
        for parameter in parameters.values():
            parameter.requires_grad_(True)

    def run(
        self, backward: Callable[[int], None], judge: Callable[[], float], file: Path | None = None
    ) -> Iterator[int]:
        """Take all steps, yielding their numbers, and leave the best weights in the parameters.

        Args:
            backward: adds the gradients of step n to the parameters.
            judge: the error of the model as it stands, on text held back.
            file: where the state is kept after every judgement, so that a killed training goes on.
        """
        if file is None or not self._load(file):
            self.untrained = self.least = judge()
        every = -(-self.steps // JUDGEMENTS)
        while self.done < self.steps:
            self._step(backward)
            if self.done % every == 0 or self.done == self.steps:
                self._consider(judge)
                if file is not None:
                    self._save(file)
            yield self.done
        self._put(self.best)
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    def as_written(self) -> None:
        """Give the parameters the type and the very values that they are written with; nothing runs with them then."""
        for name, parameter in self.parameters.items():
            parameter.data = self.best[name]

    def _step(self, backward: Callable[[int], None]) -> None:
        self._put(self.masters)
        backward(self.done)
        for name, parameter in self.parameters.items():
            gradient, parameter.grad = parameter.grad, None
            self.masters[name].grad = None if gradient is None else gradient.float()
        norm = float(self.accelerator.clip_grad_norm_(list(self.masters.values()), CLIP * self.norm))
        self.done += 1
        if not math.isfinite(norm):
            return
        self.norm = norm if math.isinf(self.norm) else 0.9 * self.norm + 0.1 * min(norm, CLIP * self.norm)
        warm_up = min(1.0, self.done / max(1, min(WARM_UP, self.steps // 5)))
        falling = 0.5 * (1.0 + math.cos(math.pi * (self.done - 1) / self.steps))
        for group in self.adam.param_groups:
            group["lr"] = self.rate * group["scale"] * warm_up * falling
        self.adam.step()

    def _consider(self, judge: Callable[[], float]) -> None:
        """Keep the weights if they are the best so far; go back where they have diverged."""
        cast = self._cast()
        self._put(cast)
        error = judge()
        if error < self.least:
            self.best, self.best_step, self.least = cast, self.done, error
        elif not error <= DIVERGED * self.untrained:  # NaN too
            self.rate /= 2.0
            log.info("diverged at step %d: back to step %d, at half the rate", self.done, self.best_step)
            for name, master in self.masters.items():
                master.copy_(self.best[name])
            self.adam.state.clear()

    def _cast(self) -> dict[str, torch.Tensor]:
        return {name: x.detach().to(self.on_disk[name], copy=True) for name, x in self.masters.items()}

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def _save(self, file: Path) -> None:
        state = {name: getattr(self, name) for name in STATE}
        state |= {"masters": self.masters, "best": self.best, "adam": self.adam.state_dict()}
        partial = file.with_name(file.name + ".partial")
        torch.save(state, partial)
        partial.replace(file)

    def _load(self, file: Path) -> bool:
        try:
            state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            log.warning("training from the start: %s", error)
            return False
        for name in STATE:
            setattr(self, name, state[name])
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
        self.best = state["best"]
        self.adam.load_state_dict(state["adam"])
        log.info("going on from step %d of %d", self.done, self.steps)
        return True
