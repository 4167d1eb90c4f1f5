"""The CUDA backend's plans of the residual tail, for every architecture, on any machine."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest

from da_ops.backends.base import TailKind
from da_ops.backends.tail import tail_walks
from da_ops.reference import ORDERS

from .cases import LAYOUTS
from .test_plan import (
    ARCHITECTURES,
    BATCHES,
    BYTES,
    MANY,
    STAGES,
    TABLE,
    filled,
    shared_kib,
    simulated,
)
from .test_plan import launches as of_layer

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
KINDS = {"training": True, "frozen": False}


def launches(
    shape,
    layout="contiguous",
    dtype="float16",
    order="spatial_channel",
    batch=True,
    shortcut=True,
    sm=90,
    multiprocessors=0,
    wish="",
    **of_shortcut,
):
    channels_last = layout == "channels_last"
    kind = order, "affine", batch, shortcut
    return planners.cuda_tail(
        shape, channels_last, dtype, *kind, sm, multiprocessors, wish, **of_shortcut
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


@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("order", [*ORDERS, "none"])
def test_passes_without_a_shortcut(order, batch):
    """Three tensors fewer; u is read by the last pass of a frozen norm, too."""
    p = launches((64, 256, 56, 56), order=order, batch=batch, shortcut=False)
    forward, backward = (
        sum(s["reads"] + s["writes"] for s in p[way]) for way in ("forward", "backward")
    )
    assert forward == MOVED[order][0] - 1 - (not batch) and backward == MOVED[order][1] - 2
    first, *between, last = passes(p["backward"])
    for step in (first, last):
        assert step["reads"] == 2  # dout, u
    assert (first["writes"], last["writes"]) == (0, 1)
    assert all((step["reads"], step["writes"]) == (1, 0) for step in between)


@pytest.mark.parametrize("batch", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("order", [*ORDERS, "none"])
def test_a_shortcuts_norm_takes_no_pass_forward_and_batch_norms_backward(order, batch):
    shape = (64, 256, 56, 56)
    plain = launches(shape, order=order)
    p = launches(shape, order=order, shortcut_norm=True, shortcut_batch=batch)

    def told(steps):
        return [(step["name"], step["reads"], step["writes"]) for step in steps]

    assert told(p["forward"]) == told(plain["forward"])
    before = len(plain["backward"])
    assert told(p["backward"])[:before] == told(plain["backward"])
    sums, _, last = told(p["backward"][before:])
    assert sums[1:] == (2, 0)  # d, the shortcut
    assert last[1:] == (1 + batch, 1)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_take_few_launches_and_vectors(layout, dtype, sm):
    for stage in STAGES:
        for n in (1, 32, 256):
            p = launches((n, *stage), layout, dtype, sm=sm)
            assert p["vector_bytes"] == 16
            assert len(p["forward"]) <= 7 and len(p["backward"]) <= 9
            for step in p["forward"] + p["backward"]:
                assert step["shared_bytes"] <= (64 if dtype == "float64" else 48) * 1024


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_one_row_or_column_fit_in_shared_memory(layout, dtype, sm):
    """The pixels around a band are several times as many as its own."""
    for order, n, size in product(
        ORDERS, (1, 256), ((1, 4096), (4096, 1), (1, 2**29 - 1), (2**29 - 1, 1))
    ):
        p = launches((n, 8, *size), layout, dtype, order, sm=sm)
        for step in p["forward"] + p["backward"]:
            at_once = 2 if step["name"] in ("masks", "terms of dx") else 1
            assert at_once * (step["shared_bytes"] + 1024 * (sm >= 80)) <= shared_kib(sm) * 1024


def test_norm_and_relu_are_one_launch_but_for_a_batchs_statistics():
    shape = (64, 256, 56, 56)
    for shortcut in (True, False):
        p = launches(shape, order="none", batch=False, shortcut=shortcut)
        assert (len(p["forward"]), len(p["backward"])) == (1, 3)
        p = launches(shape, order="none", batch=True, shortcut=shortcut)
        assert [step["name"] for step in p["forward"]][:2] == ["statistics", "norm"]
        assert (len(p["forward"]), len(p["backward"])) == (3, 3)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_waves_are_full_as_those_of_the_layer(layout, sm):
    """Those of the passes with fewer slots are; sums of u alone have three a multiprocessor."""
    multiprocessors = of_layer((1, *TABLE[0]), sm=sm)["multiprocessors"]
    for stage, dtype, n in product(TABLE, ("float16", "float32"), BATCHES[::3]):
        p = launches((n, *stage), layout, dtype, sm=sm)
        steps = passes(p["forward"] + p["backward"])
        slots = [step["waves"]["slots"] // multiprocessors for step in steps]
        assert max(slots) == 3 and (sm == 75 or min(slots) == 2)
        few = [step for step, held in zip(steps, slots, strict=True) if held < 3]
        rounds, full = filled(few, n * math.prod(stage) * BYTES[dtype])
        assert rounds < 1 or full >= (0.9 if rounds >= MANY else 0.64), (n, stage, dtype)


@pytest.mark.parametrize("n", [1, 64, 128, 256])
def test_maps_by_pixel_take_one_wave_and_a_few_channels_fill_a_gpu_too(n):
    for way in ("forward", "backward"):
        for step in launches((n, 256, 56, 56), order="spatial")[way]:
            if step["name"] in ("masks", "terms of dx"):
                assert step["waves"]["waves"] == 1
            if step["name"] in ("norm", "parameter gradients"):
                assert step["waves"]["blocks"] == 256 // 4 + (step["name"] != "norm")
    (norm,) = (s for s in launches((n, 2048, 7, 7))["forward"] if s["name"] == "norm")
    assert norm["waves"]["blocks"] == 2048 // 8


@pytest.mark.parametrize("shortcut_norm", [True, False])
@pytest.mark.parametrize("order", [*ORDERS, "none"])
def test_passes_walk_in_turn_and_find_what_was_read_last(order, shortcut_norm):
    of_shortcut = {"shortcut_norm": shortcut_norm, "shortcut_batch": shortcut_norm}
    p = launches((64, 256, 56, 56), order=order, **of_shortcut)
    for way in ("forward", "backward"):
        steps = passes(p[way])
        assert steps[-1]["backwards"]
        assert all(a["backwards"] != b["backwards"] for a, b in pairwise(steps))
        assert steps[0]["in_l2"] == 0 and all(s["in_l2"] > 0 for s in steps[1:])


@pytest.mark.parametrize("share", [0.5, 1.5, 2.3, 3.5, 7])
@pytest.mark.parametrize("order", [*ORDERS, "none"])
@pytest.mark.parametrize("shortcut", [True, False, "normed"])
@pytest.mark.parametrize("mode", KINDS)
def test_what_is_expected_in_l2_is_what_a_cache_has(mode, shortcut, order, share):
    """`share`: tensors that there is room for."""
    shape, lines = (16, 256, 32, 32), 200
    size = math.prod(shape) * 2
    p = planners.cuda_tail(
        shape, False, "float16", order, "affine", KINDS[mode], bool(shortcut), 90, 0, "",
        int(share * size / 0.7), shortcut == "normed", shortcut == "normed",
    )  # fmt: skip
    kind = TailKind(mode, bool(shortcut), "batch" if shortcut == "normed" else None)
    for way, walks in tail_walks(order, kind)._asdict().items():
        steps = passes(p[way])
        # The statistics of a shortcut, which come first, are an operator of their own.
        walked = [step for walk in walks for step in walk][-len(steps) :]
        for step, named in zip(steps, walked, strict=True):
            assert (step["reads"], step["writes"]) == (len(named.reads), len(named.writes))
        walk = [step["backwards"] for step in steps]
        tensors = [list(dict.fromkeys(step.reads + step.writes)) for step in walked]
        want = simulated(tensors, walk, lines, int(share * lines))
        assert [s["in_l2"] / size for s in steps] == pytest.approx(
            [n / lines for n in want], abs=0.03
        )


def test_limits_of_a_plan_are_obeyed_and_unknown_ones_named():
    p = launches((2, 8, 9, 9), wish="portable,grid=3")
    assert all(step["grid"] <= 3 for step in p["forward"] + p["backward"])
    with pytest.raises(ValueError, match="DA_OPS_PLAN: expected"):
        launches((2, 8, 9, 9), wish="whatever")
    with pytest.raises(ValueError, match="unknown order sideways"):
        launches((2, 8, 9, 9), order="sideways")
