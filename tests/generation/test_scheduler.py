"""The scheduler: longest first, one kind a cohort, never over the budget unless a row is over it by itself."""

from collections.abc import Hashable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2s_ray.generation.requests import Request
from s2s_ray.generation.scheduler import Budget, Scheduler
from s2s_ray.generation.settings import GenerationSettings

SETTINGS = GenerationSettings()


def rows(lengths: Sequence[int], first: int = 0) -> list[Request]:
    return [Request(first + index, [5] * length, SETTINGS) for index, length in enumerate(lengths)]


def scheduler(slots: int = 64, tokens: int = 10_000, cohort_rows: int = 4) -> Scheduler:
    return Scheduler(Budget(slots=slots, tokens=tokens, cohort_rows=cohort_rows))


def drain(waiting: Scheduler) -> list[tuple[Hashable, list[Request]]]:
    """All cohorts, each admitted when nothing else runs."""
    cohorts = []
    while (chosen := waiting.next_cohort(0, 0)) is not None:
        cohorts.append(chosen)
    assert len(waiting) == 0
    return cohorts


def test_nothing_waits_at_first() -> None:
    waiting = scheduler()
    assert len(waiting) == 0
    assert waiting.next_cohort(0, 0) is None


def test_longest_sources_go_first_in_full_cohorts() -> None:
    waiting = scheduler(cohort_rows=4)
    waiting.add(rows([3, 90, 41, 7, 66, 12, 50, 28]), "greedy", 1)
    assert len(waiting) == 8
    lengths = [[len(r.token_ids) for r in cohort] for _, cohort in drain(waiting)]
    assert [sorted(cohort) for cohort in lengths] == [[41, 50, 66, 90], [3, 7, 12, 28]]


def test_rows_that_come_later_are_sorted_in() -> None:
    waiting = scheduler(cohort_rows=2)
    waiting.add(rows([10, 30]), "greedy", 1)
    waiting.add(rows([20, 40], first=2), "greedy", 1)
    assert [[r.row_id for r in cohort] for _, cohort in drain(waiting)] == [[1, 3], [0, 2]]


def test_a_cohort_has_one_kind_and_the_kind_with_the_longest_row_goes_first() -> None:
    waiting = scheduler(cohort_rows=4)
    waiting.add(rows([10, 20]), "greedy", 1)
    waiting.add(rows([15, 99], first=2), "beam", 4)
    assert [(kind, [r.row_id for r in cohort]) for kind, cohort in drain(waiting)] == [
        ("beam", [2, 3]),
        ("greedy", [0, 1]),
    ]


def test_a_row_over_the_token_budget_runs_alone() -> None:
    waiting = scheduler(tokens=100)
    waiting.add(rows([500, 40, 30]), "greedy", 1)
    first = waiting.next_cohort(0, 0)
    assert first is not None
    assert [r.row_id for r in first[1]] == [0]
    assert waiting.next_cohort(1, 500) is None
    assert [[r.row_id for r in cohort] for _, cohort in drain(waiting)] == [[2, 1]]


def test_a_row_with_more_beams_than_slots_runs_alone() -> None:
    waiting = scheduler(slots=4)
    waiting.add(rows([10, 10]), "beam", 8)
    assert [len(cohort) for _, cohort in drain(waiting)] == [1, 1]


def test_beams_count_as_slots_and_as_tokens() -> None:
    waiting = scheduler(slots=64, tokens=100, cohort_rows=16)
    waiting.add(rows([10] * 8), "beam", 5)
    assert [len(cohort) for _, cohort in drain(waiting)] == [2, 2, 2, 2]


@pytest.mark.parametrize(("slots", "tokens"), [(63, 0), (1, 9_990), (64, 10_000), (500, 50_000)])
def test_rows_wait_while_the_budget_is_used(slots: int, tokens: int) -> None:
    waiting = scheduler(slots=64, tokens=10_000)
    waiting.add(rows([20] * 4), "greedy", 1)
    assert waiting.next_cohort(slots, tokens) is None
    assert len(waiting) == 4


def test_a_cohort_is_held_back_until_it_can_be_full() -> None:
    waiting = scheduler(slots=16, cohort_rows=4)
    waiting.add(rows([20] * 8), "greedy", 1)
    assert waiting.next_cohort(13, 260) is None
    chosen = waiting.next_cohort(12, 240)
    assert chosen is not None
    assert len(chosen[1]) == 4


def test_the_last_rows_do_not_wait_for_company() -> None:
    waiting = scheduler(slots=16, cohort_rows=4)
    waiting.add(rows([20]), "greedy", 1)
    chosen = waiting.next_cohort(15, 300)
    assert chosen is not None
    assert len(chosen[1]) == 1


def test_empty_sources_are_scheduled_too() -> None:
    waiting = scheduler()
    waiting.add(rows([0, 0, 0]), "greedy", 1)
    assert sum(len(cohort) for _, cohort in drain(waiting)) == 3


@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 5)), max_size=60),
    slots=st.integers(1, 40),
    tokens=st.integers(1, 2_000),
    cohort_rows=st.integers(1, 10),
    order=st.randoms(use_true_random=False),
)
def test_every_row_is_admitted_once_within_the_budget(
    lengths: list[tuple[int, int]], slots: int, tokens: int, cohort_rows: int, order: Random
) -> None:
    """Cohorts come and go in any order, as rows finish; the budget holds at every moment."""
    waiting = scheduler(slots, tokens, cohort_rows)
    for row_id, (length, width) in enumerate(lengths):
        waiting.add([Request(row_id, [5] * length, SETTINGS)], width, width)
    running: list[tuple[int, int]] = []  # (slots, tokens) of each cohort
    admitted: list[int] = []
    while len(waiting) or running:
        used = sum(s for s, _ in running), sum(t for _, t in running)
        chosen = waiting.next_cohort(*used)
        if chosen is None:
            assert running, "rows wait while nothing runs"
            running.pop(order.randrange(len(running)))
            continue
        width, cohort = chosen
        assert isinstance(width, int)
        assert len(cohort) <= cohort_rows
        assert {lengths[r.row_id][1] for r in cohort} == {width}
        longest = max(len(r.token_ids) for r in cohort)
        taken = len(cohort) * width, len(cohort) * width * max(1, longest)
        within = used[0] + taken[0] <= slots and used[1] + taken[1] <= tokens
        assert within or (len(cohort) == 1 and not running)
        running.append(taken)
        admitted += [r.row_id for r in cohort]
    assert sorted(admitted) == list(range(len(lengths)))
