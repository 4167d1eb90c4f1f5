"""What runs the CUDA sources on the CPU finds each planted bug, and nothing in correct kernels."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from .simt.build import KINDS, ROOT, run

ORDERS = {
    "ascending": {"SIMT_ORDER": "ascending"},
    "descending": {"SIMT_ORDER": "descending"},
    "random": {"SIMT_ORDER": "random"},
    "random again": {"SIMT_ORDER": "random", "SIMT_SEED": "2"},
    "two teams": {"SIMT_ORDER": "random", "SIMT_LIVE": "2"},
}
RACE = "WARNING: ThreadSanitizer: data race"
POISONED = "ERROR: AddressSanitizer: use-after-poison"
EARLY = r"simt: Mail::wait\(\): mail came before the last was waited for"
DEADLOCK = "simt: deadlock: a barrier that not all of its threads reach"
NO_WAIT = "simt: an early launch that did not wait for the one before it"
FOUND = {
    ("past_array", "address"): POISONED,
    ("past_shared", "address"): "ERROR: AddressSanitizer: heap-buffer-overflow",
    ("peer_has_returned", "address"): POISONED,
    ("misaligned_cast", "address"): "runtime error: .*misaligned address",
    ("misaligned_load16", "plain"): r"simt: load16\(\): \S+ is not a multiple of 16",
    ("early_return", "plain"): DEADLOCK,
    ("divergent_shuffle", "plain"): DEADLOCK,
    ("no_barrier", "thread"): RACE,
    ("warp_synchronous", "thread"): RACE,
    ("shuffle_as_fence", "thread"): RACE,
    ("no_wait", "thread"): RACE,
    ("no_wait", "plain"): "wrong result",  # NaN: the copy has not landed
    ("no_wait_between", "plain"): r"simt: Bulk::load\(\) before the last was waited for",
    ("no_barrier_before_load", "thread"): RACE,
    ("no_cluster_barrier", "thread"): RACE,
    ("no_team_barrier", "thread"): RACE,
    ("counted_too_early", "thread"): RACE,
    ("counted_without_fence", "thread"): RACE,
    ("flag_too_early", "thread"): RACE,
    ("late_wait_for_launch", "thread"): RACE,
    ("late_wait_for_launch", "plain"): "wrong result",  # NaN: what is to be read is not there yet
    ("no_wait_for_launch", "plain"): NO_WAIT,
    ("some_wait_for_launch", "plain"): NO_WAIT,
    ("no_wait_for_mail", "thread"): RACE,
    ("mail_too_early", "thread"): f"{RACE}|{EARLY}",
    ("mail_too_early", "plain"): EARLY,
}


@pytest.fixture(scope="session")
def harness(executable):
    return lambda kind: executable(ROOT / "tests" / "simt" / "harness.cpp", kind)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_correct_kernels_are_clean(harness, kind, order):
    done = run(harness(kind), **ORDERS[order])
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
@pytest.mark.parametrize(("bug", "kind"), FOUND)
def test_a_planted_bug_is_found(harness, bug, kind, order):
    done = run(harness(kind), bug, SIMT_ORDER=order, SIMT_LIVE="4")
    assert done.returncode != 0
    assert re.search(FOUND[bug, kind], done.stderr), done.stderr


def test_a_deadlock_report_names_block_threads_and_barrier(harness):
    done = run(harness("plain"), "early_return")
    assert done.stderr.splitlines() == [
        DEADLOCK,
        "  block 0 threads 0..31 wait at sync()",
        "  block 0 threads 32..44 wait at shuffle_xor()",
        "  block 0 threads 45..45 returned",
        "  block 0 threads 46..63 wait at shuffle_xor()",
    ]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_half_becomes_the_right_float(harness, name):
    got = np.frombuffer(run(harness("plain"), f"widen_{name}").stdout, np.float32)
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    want = patterns.view(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(got, want)
    numbers = ~np.isnan(want)
    assert (np.signbit(got) == np.signbit(want))[numbers].all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_floats_are_rounded_to_the_nearest_half(harness, name):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    halves = patterns.view(getattr(torch, name)).float().numpy()
    # Each half itself, the point between it and the next one in size, and what lies around them.
    step = 1 << (12 if name == "float16" else 15)
    around = [offset + nudge for offset in (0, step) for nudge in (-1, 0, 1)]
    bits = np.add.outer(np.array(around, np.int64), halves.view(np.uint32).astype(np.int64))
    subnormal = np.abs(halves[np.abs(halves) < 2.0**-13]).astype(np.float64)
    middles = (subnormal + 2.0**-25).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16)
    floats = np.concatenate(
        [
            (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32).ravel(),
            *(direction * np.nextafter(middles, to) for direction in (1, -1) for to in (0, 1)),
            middles,
            -middles,
            random.astype(np.uint32).view(np.float32),
        ]
    ).astype(np.float32)
    done = run(harness("address"), f"narrow_{name}", stdin=floats.tobytes())
    assert done.returncode == 0, done.stderr
    got = torch.frombuffer(bytearray(done.stdout), dtype=torch.int16)
    want = torch.from_numpy(floats).to(getattr(torch, name))
    numbers = ~want.isnan()
    assert torch.equal(got[numbers], want.view(torch.int16)[numbers])
    assert got.view(want.dtype)[~numbers].isnan().all()
