"""Which problems get one launch that keeps the image on the chip, on every architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from da_ops.cli import main
from da_ops.reference import GATES, ORDERS

from .cases import LAYOUTS

_plan = pytest.importorskip("da_ops._plan")
plan, proofs = _plan.cuda, _plan.proofs

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of a block
STAGES = [(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
STAGES += [(128, 28, 28), (256, 14, 14), (512, 7, 7)]
MAPS = [(256, 75, 75), (512, 38, 38), (1024, 38, 38), (1024, 19, 19), (512, 19, 19), (512, 10, 10)]


def chosen(shape, layout="contiguous", dtype="float16", sm=90, wish="onchip", **options):
    order, gate = options.get("order", "spatial_channel"), options.get("gate", "affine")
    p = plan(shape, layout == "channels_last", dtype, order, gate, sm, 0, wish)
    return p, p["one_launch_forward"], p["one_launch_backward"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 32, 64, 256])
def test_hopper_serves_every_stage_and_map_in_one_launch(layout, n):
    for shape in STAGES + MAPS:
        p, forward, backward = chosen((n, *shape), layout)
        assert "refused" not in forward
        if "refused" in backward:  # eight rows of dy and x, which begin alike, and maps as large
            assert (layout, *shape) == ("contiguous", 256, 75, 75)
            continue
        assert len(p["forward"]) == 1 and p["backward"][0]["name"] == "on chip"
        assert len(p["backward"]) == 2  # and what finishes the parameters' gradients
        if shape in STAGES:
            assert forward["x_kept"] == 1  # read once


@pytest.mark.parametrize(
    ("shape", "blocks"),  # by one to three blocks a multiprocessor; half, forward
    [
        ((256, 56, 56), {8, 16}),
        ((512, 28, 28), {4, 8}),
        ((1024, 14, 14), {2, 4}),
        ((64, 56, 56), {2, 4}),
        ((2048, 7, 7), {1, 2}),
        ((128, 28, 28), {1}),
        ((256, 14, 14), {1}),
        ((512, 7, 7), {1}),
        ((64, 14, 14), {1}),
        ((256, 75, 75), {16, 32, 64}),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_has_the_blocks_that_it_fills(shape, blocks, layout):
    _, forward, _ = chosen((256, *shape), layout)
    assert forward["blocks_an_image"] in blocks
    assert (forward["barrier"] == "block") == (forward["blocks_an_image"] == 1)


@pytest.mark.parametrize("sm", SHARED_KIB)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_planned_fits_the_architecture(sm, dtype):
    reserved = 0 if sm == 75 else 1  # KiB, of each block's, for the system
    for layout in LAYOUTS:
        for shape in STAGES + MAPS:
            p, forward, backward = chosen((64, *shape), layout, dtype, sm)
            for way, launch in (("forward", forward), ("backward", backward)):
                if "refused" in launch:
                    continue
                step = p[way][0]
                assert step["shared_bytes"] <= SHARED_KIB[sm] * 1024
                assert step["threads"] <= 256
                fitting = (SHARED_KIB[sm] + reserved) / (step["shared_bytes"] / 1024 + reserved)
                # All blocks wait for one another, and so all must be there at once.
                assert step["grid"] <= min(3, int(fitting)) * p["multiprocessors"]
                assert step["grid"] == launch["blocks_an_image"] * launch["images_at_once"]
                assert launch["waves"] == -(-64 // launch["images_at_once"])
                assert launch["barrier"] != "cluster" or sm >= 90


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gate", GATES)
def test_every_order_and_gate(order, gate):
    p, forward, backward = chosen((32, 512, 28, 28), order=order, gate=gate)
    assert "refused" not in forward and "refused" not in backward
    assert sum(step["reads"] + step["writes"] for step in p["forward"]) == 2
    assert sum(step["reads"] + step["writes"] for step in p["backward"]) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sm", SHARED_KIB)
def test_a_slab_that_fits_is_cut_in_two_where_copies_go_on_behind_the_threads(sm, layout):
    """One part is added up while the other is on its way; both of whole rounds, or as good as."""
    small = [(64, 14, 14), (128, 7, 7), (256, 7, 7)]
    for shape, dtype in [*((shape, "float16") for shape in small), ((128, 7, 7), "float32")]:
        _, *both = chosen((1, *shape), layout, dtype, sm, wish="block")
        for launch in both:
            assert launch["x_kept"] == 1
            assert launch["chunks"] == (1 if sm == 75 else min(2, launch["rounds"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_a_cluster_send_masks_by_mail_where_there_is_room(layout):
    for wish, mail in [("cluster:2", True), ("cluster:1", False), ("counter:2", False)]:
        _, *both = chosen((8, 128, 14, 14), layout, wish=wish)
        assert [launch["mail"] for launch in both] == [mail, mail]
    by_row = "channel" if layout == "contiguous" else "spatial"
    assert not chosen((8, 128, 14, 14), layout, order=by_row, wish="cluster:2")[1]["mail"]
    crowded = chosen((64, 256, 56, 56), "contiguous", wish="cluster:16")[1]
    assert crowded["x_kept"] == 1 and not crowded["mail"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_exchanges_no_masks_that_each_block_can_make_at_once(layout):
    """A column is a thread's: 14x14 pixels are, 28x28 are not; rows are the block's own."""
    for shape, alone in [((8, 128, 14, 14), True), ((8, 128, 28, 28), layout == "channels_last")]:
        for wish in ("cluster:2", "counter:4"):
            _, _, backward = chosen(shape, layout, wish=wish)
            assert backward["recalls_alone"] == alone


def test_it_is_not_the_default_before_results_show_it_faster():
    for sm in SHARED_KIB:
        p, forward, _ = chosen((64, 256, 56, 56), sm=sm, wish="")
        assert sum(step["reads"] for step in p["forward"]) == 3
        assert "no results" in forward["refused"]


def test_limits_follow_a_wish():
    shape = (64, 512, 28, 28)
    assert chosen(shape, wish="cluster:8,kept=0")[1]["x_kept"] == 0
    for wish in ("cluster:16,chunks=8,kept=5", "counter:16,chunks=8,kept=5"):
        _, forward, backward = chosen(shape, wish=wish)
        assert forward["x_kept"] == backward["x_kept"] == 1
        assert backward["dy_kept"] == 1 / 4
    assert chosen(shape, wish="cluster:8,chunks=4")[1]["chunks"] == 4


def test_a_wish_is_fulfilled_or_refused_with_the_reason():
    shape = (64, 512, 28, 28)
    _, forward, _ = chosen(shape, wish="cluster:8")
    assert (forward["barrier"], forward["blocks_an_image"]) == ("cluster", 8)
    assert chosen(shape, wish="counter")[1]["barrier"] == "counter"
    assert chosen(shape, wish="portable")[1]["refused"] == "DA_OPS_PLAN=portable"
    assert "compute capability" in chosen(shape, wish="cluster:8", sm=80)[1]["refused"]
    assert "no cluster is so large" in chosen(shape, wish="cluster:32")[1]["refused"]
    assert "float64" in chosen(shape, dtype="float64")[1]["refused"]


def test_blackwell_has_clusters_in_all_its_parts():
    for sm in (100, 120):
        assert chosen((64, 512, 7, 7), wish="cluster:2", sm=sm)[1]["barrier"] == "cluster"


def test_the_default_rests_on_results():
    """One launch is the default where a committed file shows it right and faster, nowhere else."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    for sm, file in proofs().items():
        assert json.loads((folder / file).read_text())["checks"]["onchip"], sm
    for sm in SHARED_KIB:
        refused = chosen((256, 256, 14, 14), wish="", sm=sm)[1].get("refused", "")
        assert refused.startswith("no results show it faster") == (sm not in proofs())


@pytest.mark.parametrize(
    "wish",
    ["chip", "cluster:", "cluster:0", "cluster:-1", "block:1:2", "8", "chip,grid=3", "portable,",
     "portable,grid", "portable,grid=0", "onchip,chip_lanes=3", "grid=3", "portable,grids=3",
     "group", "group:2"],
)  # fmt: skip
def test_a_wish_that_is_none(wish, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"^DA_OPS_PLAN: expected portable, onchip"):
        chosen((1, 8, 8, 8), wish=wish)
    monkeypatch.setenv("DA_OPS_PLAN", wish)
    assert main(["explain", "1x8x8x8", "--device", "sm_90"]) == 1
    assert f"got {wish}" in capsys.readouterr().err


def test_explain_shows_it(monkeypatch, capsys):
    command = "explain 64x256x56x56 --dtype float16 --device sm_90"
    assert main(command.split()) == 0
    assert "one launch forward no (no results" in capsys.readouterr().out
    monkeypatch.setenv("DA_OPS_PLAN", "onchip")
    assert main(command.split()) == 0
    text = capsys.readouterr().out
    assert "on chip" in text and "blocks an image (cluster)" in text
    assert text.count("100% of the floor") == 2
