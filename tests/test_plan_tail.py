"""The CUDA backend's plans of the residual tail, for every architecture, on any machine."""

from __future__ import annotations

from itertools import pairwise

import pytest

from da_ops.reference import ORDERS

from .cases import LAYOUTS
from .test_plan import ARCHITECTURES, BYTES, STAGES

planners = pytest.importorskip("da_ops._plan")
# Passes over the tensor, forward in training and backward.
MOVED = {
    "spatial_channel": (6, 9),
    "channel_spatial": (6, 8),
    "parallel": (5, 8),
    "spatial": (5, 8),
    "channel": (5, 7),
    "none": (4, 7),
}


def launches(
    shape,
    layout="contiguous",
    dtype="float16",
    order="spatial_channel",
    batch=True,
    sm=90,
    multiprocessors=0,
    wish="",
):
    channels_last = layout == "channels_last"
    return planners.cuda_tail(
        shape, channels_last, dtype, order, "affine", batch, sm, multiprocessors, wish
    )


def passes(steps):
    """Without the small launches between them."""
    return [step for step in steps if step["reads"]]


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("order", [*ORDERS, "none"])
def test_passes_are_those_of_the_byte_model(order, batch):
    """A frozen norm has no statistics to make, and nothing of u in the gradient of u."""
    p = launches((64, 256, 56, 56), order=order, batch=batch)
    moved = [sum(s["reads"] + s["writes"] for s in p[way]) for way in ("forward", "backward")]
    assert moved == [n - (not batch) for n in MOVED[order]]
    assert [s["writes"] for s in passes(p["forward"])][-1] == 1
    first, *_, last = passes(p["backward"])
    assert (first["reads"], first["writes"]) == (3, 1)  # dout, out, u; the shortcut's gradient
    assert (last["reads"], last["writes"]) == (1 + batch, 1)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_take_few_launches_and_vectors(layout, dtype, sm):
    for stage in STAGES:
        for n in (1, 32, 256):
            p = launches((n, *stage), layout, dtype, sm=sm)
            assert p["vector_bytes"] == 16
            assert len(p["forward"]) <= 7 and len(p["backward"]) <= 11
            for step in p["forward"] + p["backward"]:
                assert step["shared_bytes"] <= (64 if dtype == "float64" else 48) * 1024


@pytest.mark.parametrize("layout", LAYOUTS)
def test_waves_are_full_where_there_is_enough_to_do(layout):
    for stage in STAGES:
        p = launches((256, *stage), layout)
        for step in passes(p["forward"] + p["backward"]):
            assert step["waves"].get("slots") == 132 * 2
            assert step["waves"].get("efficiency") >= 0.85


@pytest.mark.parametrize("order", [*ORDERS, "none"])
def test_passes_walk_in_turn_and_find_what_was_read_last(order):
    p = launches((64, 256, 56, 56), order=order)
    for way in ("forward", "backward"):
        steps = passes(p[way])
        assert steps[-1]["backwards"]
        assert all(a["backwards"] != b["backwards"] for a, b in pairwise(steps))
        assert steps[0]["in_l2"] == 0 and all(s["in_l2"] > 0 for s in steps[1:])


def test_limits_of_a_plan_are_obeyed_and_unknown_ones_named():
    p = launches((2, 8, 9, 9), wish="portable,grid=3")
    assert all(step["grid"] <= 3 for step in p["forward"] + p["backward"])
    with pytest.raises(ValueError, match="DA_OPS_PLAN: expected"):
        launches((2, 8, 9, 9), wish="whatever")
    with pytest.raises(ValueError, match="unknown order sideways"):
        launches((2, 8, 9, 9), order="sideways")
