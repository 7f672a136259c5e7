"""How many rows the experts of a layer take: what the cost of a forward depends on beside its shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Load:
    """How many experts have how many rows: a histogram without the names, or its expectation (then not whole)."""

    rows: tuple[tuple[int, float], ...]  # (rows, experts that have so many), rows ascending, without 0

    @cached_property
    def touched(self) -> float:
        """Experts with a row."""
        return sum(experts for _, experts in self.rows)

    @cached_property
    def pairs(self) -> float:
        """(token, expert) rows in all."""
        return sum(rows * experts for rows, experts in self.rows)

    def tiles(self, m: int, group: int = 1) -> float:
        """Tiles of m rows, or groups of so many tiles of one expert."""
        size = m * group
        if size not in self._tiles:
            self._tiles[size] = sum(-(-rows // size) * experts for rows, experts in self.rows)
        return self._tiles[size]

    def levelled(self, third: int) -> tuple[float, float, float]:
        """Tiles of one, two and three thirds, as `group_tokens_launches` cuts a level map."""
        found = [0.0, 0.0, 0.0]
        for rows, experts in self.rows:
            thirds = -(-rows // third)
            own = -(-thirds // 3)
            one, three = int(thirds == 1), max(thirds - 2 * own, 0)
            for place, tiles in enumerate((one, own - three - one, three)):
                found[place] += tiles * experts
        return tuple(found)

    @cached_property
    def _tiles(self) -> dict[int, float]:
        return {}


def load_of(histogram: Sequence[int]) -> Load:
    """The load of known rows per expert."""
    if any(rows < 0 for rows in histogram):
        raise ValueError(f"histogram must have no negative count, got {min(histogram)}")
    return Load(tuple((rows, float(experts)) for rows, experts in sorted(Counter(histogram).items()) if rows))


@lru_cache(maxsize=4096)
def uniform_load(experts: int, tokens: int, share: float) -> Load:
    """The expected load where each of `experts` takes each of `tokens` with probability `share`: binomial rows."""
    if share >= 1:
        return Load(((tokens, float(experts)),) if tokens else ())
    mean, deviation = tokens * share, math.sqrt(tokens * share * (1 - share))
    low, high = max(0, int(mean - 7 * deviation)), min(tokens, int(mean + 7 * deviation) + 12)
    whole = math.lgamma(tokens + 1)
    odds = math.log(share), math.log1p(-share)
    chance = [
        math.exp(whole - math.lgamma(r + 1) - math.lgamma(tokens - r + 1) + r * odds[0] + (tokens - r) * odds[1])
        for r in range(low, high + 1)
    ]
    return Load(tuple((low + i, experts * p) for i, p in enumerate(chance) if low + i and p > 1e-11))
