"""What the CPU kernels decide by size: each way is right, and the ways differ in nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .cases import DTYPES, FEW_CASES, LAYOUTS, assert_equal, assert_promised, make
from .plans import cpu_plan, text

plan = pytest.importorskip("da_ops._plan").cpu
ROOT = Path(__file__).resolve().parents[1]
# Four images for three threads: three whole ones, one that is shared out. With and without what is
# left over of a row in whole vectors; a few rows being whole vectors; longer than the vectors that
# are added up at once; rows of which several are added up, or written, at a time, and a few are
# left.
SHAPES = [(4, 32, 8, 8), (4, 33, 5, 7), (4, 40, 6, 7), (4, 19, 23, 25), (4, 90, 7, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
def test_streaming_and_sharing_do_not_show(fused_cpu, order, gate, dtype, layout, shape):
    """The same bits, stored past the caches or not, and however many threads share an image."""
    call = make(shape, order, gate, dtype=dtype, layout=layout)
    with cpu_plan("cache=0"):
        want = call.results(backend=fused_cpu)
    others = text(cache=1), text(cache=0, shared=0, joint=0), text(cache=1, shared=0, joint=0)
    for limits in others:
        for threads in (1, 2, 3):
            with cpu_plan(limits, threads):
                assert_equal(call.results(backend=fused_cpu), want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "gate"), FEW_CASES)
@pytest.mark.parametrize(
    "limits",
    [
        text(slabs=1, long_row=0),  # of 64 rows
        text(slabs=99, near=0),  # of eight
        text(slab_rows=3, long_row=0, near=0),
        text(slab_rows=1, shared=0, cache=1),
    ],
)
def test_any_slabs(fused_cpu, limits, order, gate, layout, shape):
    """Slabs of few rows or many, the last one shorter; rows summed alone or together."""
    call = make(shape, order, gate, layout=layout)
    with cpu_plan(limits, threads=2):
        assert_promised(call, call.results(backend=fused_cpu))


def chosen(
    limits,
    shape=(2, 64, 8, 8),
    dtype="float32",
    layout="contiguous",
    threads=2,
    tensors=2,
    order="spatial_channel",
):
    last = layout == "channels_last"
    return plan(shape, last, dtype, order, threads, limits, tensors=tensors)


@pytest.mark.skipif(
    not Path("/sys/devices/system/cpu/cpu0/cache/index3/size").exists(), reason="no cache is told"
)
def test_of_the_cache_that_is_told_no_more_counts_than_a_processor_has():
    """A virtual machine may be told of its host's."""
    most = 2**24 * os.sysconf("SC_NPROCESSORS_ONLN")
    pixels = most // 16  # a quarter of that in float32
    assert chosen("", (1, 1, 1, pixels + 1))["stream"]
    assert not chosen(text(cache=most), (1, 1, 1, pixels))["stream"]


def test_where_the_ways_part():
    """At the sizes that the limits say, of elements, bytes, or bytes of the sums' type."""
    size = 2 * 64 * 8 * 8
    for tensors in (2, 3, 5):  # of four bytes an element, in half of the cache
        room = 2 * 4 * tensors * size
        assert chosen(text(cache=room - 2 * tensors), tensors=tensors)["stream"]
        assert not chosen(text(cache=room), tensors=tensors)["stream"]
        assert not chosen(text(cache=room // 2), dtype="float16", tensors=tensors)["stream"]
    # A tail's du, which is read next, where it alone is more than the cache.
    assert chosen(text(cache=4 * size - 1))["stream_du"]
    assert not chosen(text(cache=4 * size))["stream_du"]
    assert not any(chosen(text(cache=0))[name] for name in ("stream", "stream_du"))  # unknown
    assert chosen(text(shared=size))["threads"] == 2
    assert chosen(text(shared=size + 1))["threads"] == 1
    assert chosen(text(long_row=63))["sum_together"]
    assert not chosen(text(long_row=64))["sum_together"]
    for dtype, sum_bytes in (("float16", 4), ("float32", 4), ("float64", 8)):
        assert chosen(text(near=2 * 64 * sum_bytes - 1), dtype=dtype)["scale_together"]
        assert not chosen(text(near=2 * 64 * sum_bytes), dtype=dtype)["scale_together"]
    image = 64 * 8 * 8 * 4  # bytes
    assert chosen(text(joint=image))["joint"]
    assert not chosen(text(joint=image + 1))["joint"]
    assert not chosen(text(joint=0), layout="channels_last")["joint"]
    assert chosen(text(cache=0, hot=4 * size))["hot"]
    assert not chosen(text(cache=0, hot=4 * size - 1))["hot"]
    assert chosen(text(slabs=4))["slab_rows"] == 16
    assert chosen(text(slabs=1, slab_rows=60))["slabs"] == 2
    assert chosen(text(slabs=1, slab_rows=10**6), (1, 9000, 2, 2))["slab_rows"] == 1024


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", range(1, 6))
def test_every_image_and_row_has_its_place(threads, layout):
    for n in range(1, 12):
        for edge in (1, 3, 8, 40):
            p = chosen(text(shared=0), (n, 67, edge, edge), layout=layout, threads=threads)
            rows = edge * edge if layout == "channels_last" or edge == 1 else 67
            assert p["slabs"] * p["slab_rows"] >= rows > (p["slabs"] - 1) * p["slab_rows"]
            # Whole images for each thread; a last round for less than half of them is shared out.
            last = n % threads
            shared = n if n < threads else 0 if 2 * last >= threads else last
            assert p["whole_images"] == n - shared


@pytest.mark.parametrize("order", ["spatial_channel", "channel", "none"])
def test_one_pixel_is_a_row_of_channels_in_either_layout(order):
    contiguous, last = (
        chosen(text(joint=0), (4, 3000, 1, 1), layout=layout, order=order) for layout in LAYOUTS
    )
    assert contiguous == last
    assert contiguous["slabs"] == 1 and contiguous["sum_together"]


def test_small_images_without_attention_are_one_matrix():
    """Of their pixels, where these are rows: threads share out the batch, not its images."""
    shape = (16, 512, 7, 7)
    small = chosen(text(), shape, layout="channels_last", order="none")
    assert small["whole_images"] == 0 and small["slabs"] * small["slab_rows"] >= 16 * 49
    others = [
        chosen(text(), shape, order="none"),
        chosen(text(), shape, layout="channels_last", order="channel"),
        chosen(text(), (16, 512, 8, 8), layout="channels_last", order="none"),
    ]
    assert all(other["whole_images"] == 16 for other in others)


def test_few_long_rows_are_shared_out():
    """One by one, if nobody adds up their columns: those of a single image, too."""
    for channels, edge, slabs in ((2, 300, 2), (8, 300, 8), (8, 100, 2), (64, 112, 16)):
        shape = (1, channels, edge, edge)
        for order in ("channel", "none"):
            assert chosen(text(), shape, order=order)["slabs"] == slabs
        assert chosen(text(), shape)["slabs"] == -(-channels // 8)
    assert chosen(text(), (1, 64, 56, 56), order="none")["slabs"] == 8  # of what a thread is worth


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


EXPLAIN = """
import json, torch, da_ops
x = torch.ones(2, 3, 4, 4)
da_ops.DAModule(3, backend="cpu")(x)
print(json.dumps(da_ops.explain(x).to_dict()["details"]))
"""


@pytest.mark.parametrize(("limits", "stream"), [("", False), ("cache=1,slabs=2", True)])
def test_the_environment_says_them(fused_cpu, limits, stream):
    done = python(EXPLAIN, DA_OPS_CPU_PLAN=limits)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stream"] is stream


@pytest.mark.parametrize(
    "limits",
    ["cache", "cache=", "cache=x", "cache=-1", "slabs=0", "cash=1", "cache=1,", ",cache=1",
     "cache=1 slabs=2", "cache=1234567890123456"],
)  # fmt: skip
def test_limits_that_are_none(fused_cpu, limits):
    message = "DA_OPS_CPU_PLAN: expected a number for some of cache, shared, .* got "
    with pytest.raises(ValueError, match=f"^{message}{limits}$"):
        chosen(limits)
    with pytest.raises(RuntimeError, match=f"{message}{limits}"):
        torch.ops.da_ops._cpu_plan(limits)


def test_a_call_refuses_limits_that_are_none(fused_cpu):
    done = python("import torch, da_ops; da_ops.DAModule(3)(torch.ones(1, 3, 4, 4))",
                  DA_OPS_CPU_PLAN="cash=1")  # fmt: skip
    assert done.returncode == 1
    assert "DA_OPS_CPU_PLAN: expected a number for some of cache" in done.stderr
    assert "got cash=1" in done.stderr
