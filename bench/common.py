"""Paired, interleaved timing: every round runs each candidate once, in a shuffled order.

A slow moment of the machine then hits all candidates alike, and ratios are taken per round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """Seconds of one candidate, one number a round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, seconds."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int, seed: int = 1, settle: float = 0
) -> list[Series]:
    """Time every candidate ``rounds`` times; one warm-up round is not counted.

    ``settle``: seconds before each, so that what one leaves to the kernel, as namespaces to take
    apart, is not charged to whoever comes next.
    """
    order = list(candidates)
    chance = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(rounds + 1):
        chance.shuffle(order)
        for name in order:
            time.sleep(settle)
            began = time.perf_counter()
            candidates[name]()
            if turn:
                times[name].append(time.perf_counter() - began)
    return [Series(name, tuple(times[name])) for name in candidates]


def ratio(series: Series, base: Series, seed: int = 1) -> tuple[float, float, float]:
    """Median of the per-round ratios with a bootstrapped 95 % interval."""
    ratios = [a / b for a, b in zip(series.seconds, base.seconds, strict=True)]
    chance = random.Random(seed)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(1000))
    return statistics.median(ratios), medians[25], medians[974]


def print_table(all_series: Sequence[Series], base: Series) -> None:
    """Median, quartile spread and paired ratio to ``base`` of each candidate."""
    print(f"{'':<24}{'median':>10}{'spread':>10}   ratio to {base.name} (95 %)")
    for series in all_series:
        middle, low, high = ratio(series, base)
        print(
            f"{series.name:<24}{series.median * 1000:>7.1f} ms{series.spread * 1000:>7.1f} ms"
            f"   {middle:.2f} ({low:.2f}-{high:.2f})"
        )
