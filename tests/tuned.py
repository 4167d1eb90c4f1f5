"""What the tests of tuned plans share: calls, plans, rounds of planted times."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import torch

import da_ops
from da_ops.backends import tuned
from da_ops.backends.base import Call
from da_ops.backends.tuned import PLANS, Tuned
from da_ops.tuning import trial

from .cases import make

SHAPE = (2, 70, 9, 11)
PLAN = "slabs=1,slab_rows=3"  # which adds in another order than the default at that shape


def call(shape=SHAPE, dtype=torch.float32, channels_last=False, order="spatial_channel", sm=None):
    return Call(shape, dtype, channels_last, order, "affine", sm)


def put(plan=PLAN, backward=False, **changes):
    """Put a plan in force as if it had been measured."""
    key = replace(tuned.key("cpu", call(), backward), **changes)
    PLANS.put(key, Tuned(plan, 0.8, 0.7, 0.9))
    return key


def job(*plans, **changes):
    return trial.Job(
        **{
            "backend": "cpu",
            "shape": SHAPE,
            "dtype": "float32",
            "channels_last": False,
            "order": "spatial_channel",
            "gate": "affine",
            "backward": False,
            "device": "cpu",
            "threads": 1,
            "seconds": 0.0,
            "unchecked": list(plans),
            "right": [],
            **changes,
        }
    )


def rounds(**ratios):
    """Rounds in which the default takes from 1 to 2 s, and each plan its ratio of that."""
    mixer = random.Random(0)
    found = []
    for each in zip(*ratios.values(), strict=True):
        default = 1 + mixer.random()
        found.append({"": default, **{k: r * default for k, r in zip(ratios, each, strict=True)}})
    return found


def noisy(middle, n=40, seed=0, spread=0.1):
    mixer = random.Random(seed)
    return [middle * math.exp(mixer.gauss(0, spread)) for _ in range(n)]


def bits(function=da_ops.da_attention, **options):
    return make(SHAPE, **options).results(function, backend="cpu")
