"""The generator of covering arrays covers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ublk_rig.pairwise import everything, pairs_of, pairwise

if TYPE_CHECKING:
    from ublk_rig.pairwise import Row

OPTIONS: dict[str, list[Any]] = {"a": [1, 2, 3], "b": ["x", "y"], "c": [True, False], "d": [10, 20, 30, 40]}


def _allowed(row: Row) -> bool:
    return not (row["a"] == 1 and row["d"] == 40)


def test_every_possible_pair_is_covered_and_nothing_forbidden_is_chosen() -> None:
    chosen = pairwise(OPTIONS, _allowed)
    possible = set().union(*(pairs_of(row) for row in everything(OPTIONS, _allowed)))
    assert set().union(*(pairs_of(row) for row in chosen)) == possible
    assert (("a", 1), ("d", 40)) not in possible
    assert len(possible) == (3 * 2) + (3 * 2) + (3 * 4 - 1) + (2 * 2) + (2 * 4) + (2 * 4)
    assert all(_allowed(row) for row in chosen)


def test_there_are_few_of_them_and_always_the_same() -> None:
    chosen = pairwise(OPTIONS, _allowed)
    # The two longest options alone need 3 * 4 - 1.
    assert 11 <= len(chosen) <= 15
    assert chosen == pairwise(OPTIONS, _allowed)
    assert len(everything(OPTIONS, _allowed)) == 48 - 4


def test_what_is_given_is_not_covered_again() -> None:
    given = pairwise(OPTIONS, lambda row: _allowed(row) and row["a"] != 3)
    more = pairwise(OPTIONS, _allowed, given)
    possible = set().union(*(pairs_of(row) for row in everything(OPTIONS, _allowed)))
    assert set().union(*(pairs_of(row) for row in given + more)) == possible
    assert len(more) < len(pairwise(OPTIONS, _allowed))
    assert all(row["a"] == 3 for row in more)
    assert pairwise(OPTIONS, _allowed, given + more) == []
