"""The CUDA backend's plans, for every architecture, on any machine."""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from itertools import pairwise, product

import pytest
import torch

import da_ops
from da_ops.cli import main
from da_ops.reference import ORDERS

from .cases import LAYOUTS

planners = pytest.importorskip("da_ops._plan")
plan, schedules = planners.cuda, planners.schedules

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
STAGES = [(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (256, 75, 75)]
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def launches(shape, layout="contiguous", dtype="float16", order="spatial_channel", sm=90, wish=""):
    return plan(shape, layout == "channels_last", dtype, order, "affine", sm, 0, wish)


def passes(steps):
    """Without the launches that only make maps between them."""
    return [step for step in steps if not step["again"]]


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_take_few_launches_and_vectors(layout, dtype, sm):
    for stage in STAGES:
        for n in (1, 32, 256):
            p = launches((n, *stage), layout, dtype, sm=sm)
            assert len(passes(p["forward"])) == 3 and len(passes(p["backward"])) == 3
            assert p["vector_bytes"] == 16
            for step in p["forward"] + p["backward"]:
                assert step["shared_bytes"] <= (64 if dtype == "float64" else 48) * 1024


@pytest.mark.parametrize("order", ORDERS)
def test_passes_are_those_of_the_byte_model(order):
    p = launches((64, 256, 56, 56), order=order)
    both = order in ("spatial_channel", "channel_spatial")
    moved = [sum(s["reads"] + s["writes"] for s in p[way]) for way in ("forward", "backward")]
    assert moved == ([4, 5] if both else [3, 4])


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", range(4))
def test_no_size_exceeds_a_launch(axis, layout, dtype, sm):
    shape = [1, 1, 1, 1]
    shape[axis] = 2**31
    orders = ["channel"] if axis > 1 else ["channel", "spatial_channel"]
    for order in orders:
        p = launches(tuple(shape), layout, dtype, order, sm)
        for step in p["forward"] + p["backward"]:
            assert 1 <= step["grid"] < 2**31
            assert step["shared_bytes"] <= 64 * 1024


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_eca_gate_larger_than_the_channels_takes_no_room_for_others(layout):
    for sm, kernel_size in [(75, 16001), (90, 60001)]:
        call = ((8, 64, 56, 56), layout == "channels_last", "float16", "spatial_channel", "eca")
        layer = planners.cuda(*call, sm, 0, kernel_size=kernel_size)
        tail = planners.cuda_tail(*call, True, True, sm, kernel_size=kernel_size)
        small = planners.cuda(*call, sm, 0, kernel_size=127)
        for way in ("forward", "backward"):
            assert all(step["shared_bytes"] <= 64 * 1024 for step in layer[way] + tail[way])
            assert [s["shared_bytes"] for s in layer[way]] == [
                s["shared_bytes"] for s in small[way]
            ]


@pytest.mark.parametrize("shape", [(1, 1, 4, 2**30), (1, 1, 2**30, 4)])
def test_an_image_whose_places_exceed_32_bits_is_refused(shape):
    for layout in LAYOUTS:
        with pytest.raises(RuntimeError, match=r"at most \d+ pixels a side.*got \d+ x \d+; use"):
            launches(shape, layout)
        assert launches(shape, layout, order="channel")
        with pytest.raises(RuntimeError, match="pixels a side"):
            planners.cuda_tail(
                shape, layout == "channels_last", "float16", "spatial", "affine", True, True, 90
            )


def test_rows_that_are_no_whole_vectors_are_read_in_super_rows():
    for size, dtype, period in [(7, "float16", 8), (14, "float16", 2), (75, "float16", 8)] + [
        (7, "float32", 4),
        (14, "float32", 1),
        (7, "float64", 2),
    ]:
        p = launches((8, 256, size, size), dtype=dtype)
        assert p["rows_a_super_row"] == period
        assert period * size * size * BYTES[dtype] % 16 == 0
    assert launches((8, 3, 7, 7))["vector_bytes"] == 2  # images begin within a vector


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_limits_make_a_small_tensor_a_large_one(layout):
    shape = (2, 40, 5, 16)
    by_itself = launches(shape, layout)
    assert by_itself == launches(shape, layout, wish=",grid=1048576,partials=32")
    assert all(step["grid"] == 1 for step in launches(shape, layout, wish=",grid=1")["forward"])
    limited = launches(shape, layout, wish="portable,partials=2,lanes=2,height=32")
    assert limited["tiles_an_image"] > 4 * by_itself["tiles_an_image"]
    names = [step["name"] for step in limited["forward"]]
    assert names == ["channel mean", "masks", "pooling", "masks", "scale"]


# Shapes whose waves are to be full: the stages, and the maps of SSD300.
TABLE = [*STAGES, (1024, 38, 38), (512, 19, 19), (512, 10, 10), (256, 5, 5), (256, 3, 3)]
BATCHES = sorted({*range(1, 17), *range(17, 257, 13), 32, 64, 100, 128, 256})
ROUND = 4 * 256 * 16  # bytes that a block's threads have in flight
# Rounds for each slot from which on waves are always full. Of fewer, some numbers of images can be
# cut into no number of blocks that comes near the slots, but for tiles so small that what every
# wave takes before it streams would double the time: 70 images at 120 slots, say.
MANY = 6
# The classes of calls, by the rounds for each slot from which on they are; the share of each that
# may be less than nine tenths full on a GPU, and how full all are. Of 154 images of 5x5 pixels, a
# block each, 34 have no place in the first wave of 120, say.
CLASSES = {MANY: (0, 0.9), 2: (0.02, 0.64), 1: (0.2, 0.64), 1 / 3: (0.4, 0.5)}


def work(p):
    """Of a direction's launches, those that read or write full-size tensors."""
    return [step for way in ("forward", "backward") for step in p[way] if step["reads"]]


def filled(steps, size):
    """Rounds of a tensor of so many bytes for each slot, and the least full of the launches."""
    slots = max(step["waves"]["slots"] for step in steps)
    return size / (slots * ROUND), min(step["waves"]["efficiency"] for step in steps)


def fullness(sm, batches):
    """By class, how full each call's least full launch is: of the slots in all waves; or, with less
    than a round for each, of as many slots for each multiprocessor as one of these has blocks."""
    found: dict[float, list[float]] = {least: [] for least in CLASSES}
    for stage, layout, dtype, n in product(TABLE, LAYOUTS, ("float16", "float32"), batches):
        p = launches((n, *stage), layout, dtype, sm=sm)
        steps, multiprocessors = work(p), p["multiprocessors"]
        rounds, full = filled(steps, n * math.prod(stage) * BYTES[dtype])
        if rounds < 1:
            slots = max(step["waves"]["slots"] for step in steps)
            blocks = -(-steps[0]["waves"]["blocks"] // multiprocessors) * multiprocessors
            full *= max(slots / blocks, 1)
        for least, values in found.items():
            if rounds >= least:
                values.append(full)
                break
    return found


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_waves_are_full(sm):
    """To nine tenths, but for a few calls of one or two waves. With less than a round of reads for
    each slot no tiles fill a wave, and idle slots are no fault: time goes by latency, and a
    multiprocessor with two blocks gives each more than one with three. Then it is multiprocessors
    that are to have equally many. With less than a round for each of those there are not enough."""
    for least, values in fullness(sm, BATCHES).items():
        share, fullest = CLASSES[least]
        assert min(values) >= fullest, least
        assert sum(full < 0.9 for full in values) <= share * len(values), least


@pytest.mark.slow
def test_waves_are_full_of_any_number_of_images():
    """Few of all are not, on any GPU, most of these images of 5x5 and 3x3 pixels; the planner takes
    what is full, if it thinks that this takes no more than twice as long."""
    found = [fullness(sm, range(1, 257)) for sm in ARCHITECTURES]
    waves = [full < 0.9 for of in found for least in of if least >= 1 for full in of[least]]
    small = [full < 0.9 for of in found for full in of[1 / 3]]
    print(f"{sum(waves)} of {len(waves)}; of less than a wave {sum(small)} of {len(small)}")
    assert sum(waves) < 0.008 * len(waves) and sum(small) < 0.45 * len(small)


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_waves_are_counted_honestly(layout, dtype, sm):
    """Work over what the slots could do while the waves last; slots that the memory allows."""
    for n, stage in product((1, 3, 64), STAGES):
        p = launches((n, *stage), layout, dtype, sm=sm)
        tile = math.prod(map(int, re.findall(r"\d+", p["tile"])))
        for step in work(p):
            w = step["waves"]
            assert w["blocks"] == n * p["tiles_an_image"]
            assert w["waves"] == -(-w["blocks"] // w["slots"])
            could = w["waves"] * w["slots"] * tile
            assert w["efficiency"] == pytest.approx(n * math.prod(stage) / could)
            blocks, rest = divmod(w["slots"], p["multiprocessors"])
            assert not rest and 1 <= blocks <= (2 if dtype == "float64" else 3)
            room = shared_kib(sm) * 1024
            assert blocks * (step["shared_bytes"] + 1024 * (sm >= 80)) <= room


def shared_kib(sm):
    """Of a multiprocessor."""
    return {75: 64, 80: 164, 90: 228, 100: 228}.get(sm, 100)


def test_what_is_less_than_a_wave_takes_the_smallest_tiles():
    few, many = (launches((n, 64, 56, 56)) for n in (1, 64))
    assert few["tiles_an_image"] > many["tiles_an_image"]
    assert all(step["waves"]["blocks"] < step["waves"]["slots"] for step in work(few))
    assert launches((0, 64, 56, 56))["forward"][0]["waves"]["efficiency"] == 0


def test_what_is_less_than_a_wave_is_spread_evenly_over_multiprocessors():
    """Two blocks for each, rather than three, of no less, for all but a few."""
    for n, multiprocessors in ((2, 10), (20, 100)):
        call = ((n, 2048, 7, 7), False, "float16", "spatial_channel", "affine", 75)
        p = plan(*call, multiprocessors, "portable")
        for step in work(p):
            assert step["waves"]["blocks"] == 2 * multiprocessors


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("order", ORDERS)
def test_passes_walk_the_batch_to_and_fro(order, way):
    """The last one from the end, so that the next layer finds first what was written last."""
    walk = [
        step["backwards"] for step in launches((64, 256, 56, 56), order=order)[way] if step["reads"]
    ]
    assert walk[-1]
    assert all(one != next for one, next in pairwise(walk))


def simulated(passes, backwards, lines, room):
    """Lines of an L2 that forgets the least recently used, of `lines` a tensor, found in a pass."""
    cache, found = OrderedDict(), []
    for tensors, back in zip(passes, backwards, strict=True):
        found.append(0)
        for line in reversed(range(lines)) if back else range(lines):
            for tensor in tensors:
                found[-1] += (tensor, line) in cache
                cache[tensor, line] = True
                cache.move_to_end((tensor, line))
                if len(cache) > room:
                    cache.popitem(last=False)
    return found


@pytest.mark.parametrize("share", [0.2, 0.5, 1, 1.5, 1.9, 2.3, 2.7, 3.5, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_expected_in_l2_is_what_a_cache_has(order, share):
    """`share`: tensors that there is room for."""
    shape, lines = (16, 256, 32, 32), 1000
    size = math.prod(shape) * 2
    p = plan(shape, False, "float16", order, "affine", 90, 0, "", int(share * size / 0.7))
    for way, passes in schedules()[order].items():
        steps = [step for step in p[way] if step["reads"]]
        tensors = [step["reads"] + step["writes"] for step in passes]
        walk = [step["backwards"] for step in steps]
        want = simulated(tensors, walk, lines, int(share * lines))
        got = [step["in_l2"] / size for step in steps]
        assert got == pytest.approx([n / lines for n in want], abs=0.01)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_launches_begin_early_from_hopper_on(sm):
    assert launches((8, 64, 7, 7), sm=sm)["early_launches"] == (sm >= 90)


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_masks_are_made_by_a_launch_only_where_that_saves_time(sm):
    """By instructions of a multiprocessor, of which a launch takes so many to get going."""
    price, made = 3500 * (1 if sm >= 90 else 2), set()
    for stage in STAGES:
        for n in (1, 8, 32, 64, 256):
            p = launches((n, *stage), sm=sm)
            tiles = p["forward"][0]["grid"]
            for step in p["forward"] + p["backward"]:
                if not step["again"]:
                    continue
                once = step["once"] // min(step["grid"], p["multiprocessors"])
                again = step["again"] // min(tiles, p["multiprocessors"])
                assert again > once + price
                made.add((n, *stage))
    assert (256, 256, 56, 56) in made and not made & {(1, 64, 56, 56), (1, 2048, 7, 7)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_made_by_every_block_need_no_launch(layout):
    for stage in STAGES:
        for n in (1, 64):
            p = launches((n, *stage), layout, wish=f"portable,launch={10**9}")
            assert len(p["forward"]) == 3 and len(p["backward"]) == 3


def test_sums_of_many_tiles_are_folded_by_a_launch():
    p = launches((1, 16, 300, 300))
    assert p["tiles_an_image"] > 32
    names = [step["name"] for step in p["forward"]]
    assert names[-2:] == ["masks", "scale"]


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_gpu_is_filled(sm):
    for stage in STAGES:
        p = launches((64, *stage), sm=sm)
        assert p["forward"][0]["grid"] >= p["multiprocessors"]


@pytest.mark.parametrize("shape", [(256, 56, 56), (512, 28, 28), (1024, 14, 14)])
def test_many_images_take_one_wave_of_large_tiles(shape):
    """As measured on an H200: more, smaller tiles take longer, and so do maps made between."""
    p = launches((64, *shape), "channels_last")
    for step in p["forward"] + p["backward"]:
        assert step["waves"]["waves"] == 1 and not step["again"]


def test_explain_prints_any_architecture(capsys):
    command = "explain 64x256x56x56 --dtype float16 --layout contiguous --device sm_90"
    assert main(command.split()) == 0
    text = capsys.readouterr().out
    assert "on sm_90" in text and "backend cuda" in text
    for line in ("channel mean", "pooling", "scale", "combine"):
        assert line in text
    combine = r"combine .*, (\d+) \+ (\d+) blocks of 256 .*; makes the parameters' gradients too"
    tiles, more = map(int, re.search(combine, text).groups())
    step = launches((64, 256, 56, 56))["backward"][-1]
    assert (step["waves"]["blocks"], step["grid"]) == (tiles, tiles + more)
    assert "blocks of 256 threads" in text and "KiB shared memory" in text
    step = next(s for s in launches((64, 256, 56, 56))["backward"] if s["again"])
    assert f"; {step['once']} instructions instead of {step['again']} in the next launch" in text
    assert "50% of the floor" in text and "60% of the floor" in text
    assert re.search(r"396 at once: \d+ waves, 9\d% full", text)
    assert re.search(r"pooling .* 35.0 MiB \(36%\) of what it reads expected in L2", text)

    assert main([*command.split(), "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    moved = math.prod((64, 256, 56, 56)) * 2
    assert d["forward"]["bytes_moved"] == 4 * moved and d["backward"]["bytes_moved"] == 5 * moved
    launch = d["forward"]["passes"][0]["launch"]
    assert launch["threads"] == 256 and launch["waves"]["slots"] == 396

    assert main(["explain", "1x64x7x7", "--dtype", "float16", "--device", "sm_90"]) == 0
    small = capsys.readouterr().out
    assert re.search(r"396 at once: less than a wave, \d+% of it in use", small)


@pytest.mark.parametrize("shape", [(1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (-1, 1, 1, 1)])
def test_planners_refuse_what_they_cannot_divide_by(shape):
    call = shape, False, "float32", "spatial_channel"
    for plan in (
        lambda: planners.cpu(*call, 1),
        lambda: planners.cuda(*call, "affine", 90, 0),
        lambda: planners.cuda_tail(*call, "affine", True, True, 90),
    ):
        with pytest.raises(ValueError, match="expected N of at least 0, and C, H and W"):
            plan()


@pytest.mark.parametrize("device", ["sm_70", "sm90", "sm_x", "cuda"])
def test_an_architecture_that_is_none(device):
    with pytest.raises(ValueError, match=r"^da_attention: device must be an NVIDIA architecture"):
        da_ops.explain(torch.empty(1, 1, 1, 1), device=device)
