"""The router of a merged layer with C rows: what may stand in the row of an expert that now is several.

kept        the kept expert's row, as in pruning: what the others' rows drew goes where the kept rows send it
mean        the mean of the members' rows, weighted by what they contribute
logsumexp   the row nearest to log sum_j exp(w_j x), under which a softmax gives the group the mass its members had:

    minimise over d   sum_t (d x_t - (logsumexp_j w_j x_t - w_kept x_t))^2 + ridge |d|^2,    row = w_kept + d

by least squares on calibration tokens. Which is best depends on how alike the members are, so it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cprune import hf
from cprune.repaired import ROWS_KEPT

RIDGE = 0.01  # in units of the mean square of the router's inputs
Rows = Mapping[str, torch.Tensor]  # parameter of the router -> [C, ...]


class RouterFit:
    """Gathers the normal equations of `logsumexp` from the inputs of a router; its `note` is a forward pre-hook."""

    def __init__(self, layer: nn.Module, groups: Mapping[int, Sequence[int]], counts: torch.Tensor) -> None:
        """
        Args:
            groups: {kept expert: all members, itself first} of the groups that have others.
            counts: [T] bool, of the tokens that come first, those that the fit is of; what follows is left out.
        """
        router = hf.find_router(layer)
        self.weight, bias = router.weight.float().clone(), getattr(router, "bias", None)
        self.bias = bias.float().clone() if bias is not None and bias.shape == self.weight.shape[:1] else None
        self._groups, self._counts, self._next = groups, counts, 0
        size = self.weight.shape[1] + (self.bias is not None)
        self._gram, self._right = torch.zeros(size, size), torch.zeros(size, len(groups))

    def note(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """The next tokens, args[0] [..., H]."""
        x = args[0].reshape(-1, self.weight.shape[1])
        counts = self._counts[self._next : self._next + len(x)]
        self._next += len(x)
        x = x[: len(counts)][counts].float()
        logits = x @ self.weight.T + (0.0 if self.bias is None else self.bias)
        more = [logits[:, list(group)].logsumexp(1) - logits[:, kept] for kept, group in self._groups.items()]
        if self.bias is not None:
            x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        self._gram += x.T @ x
        self._right += x.T @ torch.stack(more, dim=1)

    def rows(self, kept: Sequence[int], shares: Mapping[int, Sequence[float]]) -> dict[str, Rows]:
        """{kind: the C rows}, by the names of the router's parameters.

        Args:
            shares: {kept expert: contribution of every member of its group}.
        """
        own = {"weight": self.weight[list(kept)]} | ({} if self.bias is None else {"bias": self.bias[list(kept)]})
        if not self._groups:
            return {ROWS_KEPT: own}
        mean, fitted = ({name: rows.clone() for name, rows in own.items()} for _ in range(2))
        step = self._step()
        for column, (expert, group) in enumerate(self._groups.items()):
            place, share = list(kept).index(expert), torch.tensor(shares[expert])
            if float(share.sum()) > 0.0:
                for name, rows in mean.items():
                    members = getattr(self, name)[list(group)]
                    rows[place] = torch.tensordot(share / share.sum(), members, dims=1)
            fitted["weight"][place] += step[: self.weight.shape[1], column]
            if self.bias is not None:
                fitted["bias"][place] += step[-1, column]
        return {ROWS_KEPT: own, "mean": mean, "logsumexp": fitted}

    def _step(self) -> torch.Tensor:
        shifted = self._gram.clone()
        shifted.diagonal().add_(max(RIDGE * float(self._gram.diagonal().mean()), 1e-30))
        return torch.linalg.solve(shifted, self._right)
