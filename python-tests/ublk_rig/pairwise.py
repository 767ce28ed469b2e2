"""Covering arrays: few combinations of many options in which every two values meet at least once.

Most defects that depend on options depend on two of them, and there are far fewer pairs than combinations.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def everything(options: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]) -> list[Row]:
    """Every combination that is allowed."""
    rows = (dict(zip(options, values, strict=True)) for values in itertools.product(*options.values()))
    return [row for row in rows if allowed(row)]


def pairs_of(row: Row) -> set[Pair]:
    """The pairs of values that a combination has."""
    return set(itertools.combinations(row.items(), 2))


def pairwise(
    options: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool], given: Sequence[Row] = ()
) -> list[Row]:
    """Combinations that have, with those that are given, each pair of values that any allowed combination has.

    Greedy: always the combination with the most pairs that are still missing; of several the one whose pairs were
    used least, so that the same do not meet again and again; then the first, so that the answer is the same every
    time.
    """
    candidates = [(row, pairs_of(row)) for row in everything(options, allowed)]
    missing = set().union(*(pairs for _, pairs in candidates)).difference(*map(pairs_of, given))
    used = Counter(pair for row in given for pair in pairs_of(row))
    chosen = []

    def worth(candidate: tuple[Row, set[Pair]]) -> tuple[int, int]:
        _, pairs = candidate
        return len(pairs & missing), -sum(used[pair] for pair in pairs)

    while missing:
        row, pairs = max(candidates, key=worth)
        chosen.append(row)
        used.update(pairs)
        missing -= pairs
    return chosen
