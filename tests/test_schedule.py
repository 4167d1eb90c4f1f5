"""The schedule that all backends walk: one table, in C++ and in Python."""

from __future__ import annotations

import pytest

from build_tools import schedule as generator
from da_ops.backends import native
from da_ops.backends.schedule import BOTH, NONE, SCHEDULES
from da_ops.reference import ORDERS


def test_the_table_in_python_is_the_header_s():
    schedules = native.planner().schedules()
    text = generator.FILE.read_text()
    assert generator.renewed(text, schedules) == text, "run python -m build_tools.schedule"


def test_the_orders_are_the_reference_s():
    assert tuple(SCHEDULES) == ORDERS


@pytest.mark.parametrize("order", ORDERS)
def test_every_mask_is_made_once_and_gone_back_through_once(order):
    schedule = SCHEDULES[order]
    for passes in (schedule.forward, schedule.backward):
        *sums, last = passes
        for axis in range(2):
            assert sum(p.complete[axis] for p in sums) == schedule.masks[axis]
        assert all(any(p.sums) and not p.writes for p in sums)
        assert last.writes and last.sums == last.complete == NONE
    # The mask that is multiplied with last is the first to be gone back through.
    made = [p.complete for p in schedule.forward[:-1]]
    assert [p.complete for p in schedule.backward[:-1]] == made[::-1]
    assert schedule.outer == (NONE if made[0] == BOTH else made[0])
