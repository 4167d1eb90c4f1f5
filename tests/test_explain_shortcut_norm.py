"""explain of a residual tail whose shortcut goes through a norm of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import da_ops
from da_ops import DAModule, DAResidual, cli
from da_ops.backends import BACKENDS
from da_ops.backends.base import MODES, STATISTICS, Call, TailKind
from da_ops.backends.tail import fused_plan, tail_walks

from .test_explain_tail import PORTABLE, SHAPE, WAYS, hooked, moved
from .test_residual_layer import norm_of
from .test_residual_shortcut_modules import NORMS, takes_the_norm

KINDS = list(product(MODES, STATISTICS))
# Passes over the shortcut that its norm adds, forward and backward: one read for the batch's
# statistics; sums of two tensors, and the way through the norm, which by the batch's statistics
# reads two, else one, and writes one.
PORTABLE_NORM = {"batch": (1, 2 + 3), "own": (0, 2 + 2)}
# On the CPU what comes to the norm is near: it reads the shortcut and writes that over again.
CPU_NORM = {"batch": (1, 1 + 2), "own": (0, 1 + 1)}
# PyTorch's batch norm.
PLAIN_NORM = {"batch": (3, 5), "own": (2, 4)}
# With the image in cache; the floor is lower where no sums over the batch are needed backward.
IN_CACHE = {
    ("training", "batch"): (5, 10),
    ("training", "own"): (4, 9),
    ("frozen", "batch"): (4, 9),
    ("frozen", "own"): (3, 8),
    ("evaluation", "batch"): (4, None),
    ("evaluation", "own"): (3, None),
}
FLOOR = {**IN_CACHE, ("frozen", "own"): (3, 6)}


def more(answer, plain):
    """Units of u that one moves more than the other."""
    pairs = zip(moved(answer), moved(plain), strict=True)
    return tuple(None if one is None else one - other for one, other in pairs)


def but_backward(mode, counts):
    """In evaluation there is none."""
    return counts[0], None if mode == "evaluation" else counts[1]


@pytest.mark.parametrize(("mode", "statistics"), KINDS)
@pytest.mark.parametrize("order", PORTABLE)
def test_an_image_in_cache(fused_cpu, monkeypatch, order, mode, statistics):
    u = torch.empty(SHAPE)
    monkeypatch.setenv("DA_OPS_CPU_PLAN", f"cache={2**30}")
    answer = da_ops.explain(u, order=order, tail=mode, shortcut_norm=statistics)
    assert moved(answer) == IN_CACHE[mode, statistics]
    told = answer.to_dict()
    for way, floor in zip(WAYS, FLOOR[mode, statistics], strict=True):
        assert (told[way] is None) == (floor is None)
        assert floor is None or told[way]["floor_bytes"] == floor * u.nbytes
    assert told["tail"]["shortcut"] and told["tail"]["shortcut_norm"] == statistics
    assert told["tail"]["unfused"] is told["tail"]["shortcut_norm_unfused"] is None
    monkeypatch.setenv("DA_OPS_CPU_PLAN", "cache=1")
    answer = da_ops.explain(u, order=order, tail=mode, shortcut_norm=statistics)
    plain = da_ops.explain(u, order=order, tail=mode)
    assert more(answer, plain) == but_backward(mode, CPU_NORM[statistics])


def test_what_is_read_again_must_have_stayed_in_cache_beside_the_shortcut(fused_cpu, monkeypatch):
    """Backward, where five tensors go by between two reads of u."""
    u = torch.empty(SHAPE)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for images, backward in (4.9, 4 + 2 + 3 + 3), (5.1, 10):
        monkeypatch.setenv("DA_OPS_CPU_PLAN", f"cache={int(images * u[0].nbytes)}")
        answer = da_ops.explain(u, tail="training", shortcut_norm="batch")
        assert moved(answer) == (5, backward)


@pytest.mark.parametrize(("mode", "statistics"), KINDS)
@pytest.mark.parametrize("order", PORTABLE)
def test_launches_of_an_architecture(fused_cpu, order, mode, statistics):
    u = torch.empty(SHAPE, dtype=torch.float16)
    answer, plain = (
        da_ops.explain(u, order=order, device="sm_90", tail=mode, shortcut_norm=norm)
        for norm in (statistics, None)
    )
    assert more(answer, plain) == but_backward(mode, PORTABLE_NORM[statistics])
    # The launches of the tail are those without the norm; before them and after them come its own.
    forward, backward = (
        [p.name for p in getattr(answer.plan, way).passes][slice(*cut)]
        for way, cut in (
            ("forward", (None, -len(plain.plan.forward.passes))),
            ("backward", (len(plain.plan.backward.passes), None)),
        )
    )
    assert (
        forward
        == ["statistics of the shortcut", "norm of the shortcut"][: 2 * (statistics == "batch")]
    )
    assert backward == [
        "sums for the shortcut's norm",
        "its parameter gradients",
        "combine for the shortcut",
    ]
    assert all(name in str(answer) for name in forward)
    # Those of the byte model for any backend.
    kind = TailKind(mode, True, statistics)
    call = Call(SHAPE, torch.float16, False, order, "sigmoid")
    portable = fused_plan(replace(BACKENDS["cuda"], residual_plan=None), call, kind)
    for way in WAYS:
        passes, want = (getattr(plan, way).passes for plan in (answer.plan, portable))
        told = [(p.name, p.reads, p.writes) for p in passes if p.reads]
        assert told == [(p.name, p.reads, p.writes) for p in want]


def test_statistics_of_the_shortcut_are_launches_of_their_own(fused_cpu):
    """One walk over the batch, which ends with the first image, and as many blocks as u's take."""
    u = torch.empty(SHAPE, dtype=torch.float16, device="meta")
    answer = da_ops.explain(u, device="sm_90", tail="training", shortcut_norm="batch")
    its, its_norm, own, own_norm, *_ = (p.launch for p in answer.plan.forward.passes)
    assert its.backwards and its.in_l2 == 0
    assert replace(own, backwards=True) == its and own_norm == its_norm


@pytest.mark.parametrize(("mode", "statistics"), KINDS)
def test_in_plain_pytorch(mode, statistics):
    u = torch.empty(SHAPE)
    told, without = (
        da_ops.explain(u, tail=mode, shortcut_norm=norm).to_dict()["tail"]
        for norm in (statistics, None)
    )
    want = but_backward(mode, PLAIN_NORM[statistics])
    for key, (way, passes) in product(
        ("plain_bytes", "plain_without_attention_bytes"), zip(WAYS, want, strict=True)
    ):
        own = told[key].get(way), without[key].get(way)
        assert own == (None, None) if passes is None else own[0] - own[1] == passes * u.nbytes


@pytest.mark.parametrize("by_slab", [True, False])
def test_every_pass_reads_what_is_there(by_slab):
    """The shortcut's gradient is written twice, first as what comes to its norm."""
    for order, statistics in product(PORTABLE, STATISTICS):
        kind = TailKind("training", True, statistics)
        forward, backward = tail_walks(order, kind, by_slab=by_slab)
        for walks, there, results in (
            (forward, {"u", "shortcut"}, ["out"]),
            (backward, {"dout", "out", "u", "shortcut"}, ["d_shortcut", "du", "d_shortcut"]),
        ):
            written = []
            for step in (step for walk in walks for step in walk):
                assert there.issuperset(step.reads)
                there.update(step.writes)
                written += step.writes
            assert written == results


@pytest.mark.parametrize(
    ("norm", "attention", "its", "mode", "statistics"),
    [
        (nn.BatchNorm2d(64), DAModule(64), nn.BatchNorm2d(64), "training", "batch"),
        (nn.BatchNorm2d(64), DAModule(64), nn.BatchNorm2d(64).eval(), "training", "own"),
        (nn.BatchNorm2d(64).eval(), None, nn.BatchNorm2d(64), "frozen", "batch"),
        (nn.BatchNorm2d(64).eval(), DAModule(64), nn.BatchNorm2d(64).eval(), "frozen", "own"),
        (nn.BatchNorm2d(64).eval(), None, nn.BatchNorm2d(64).eval(), "evaluation", "own"),
        (nn.BatchNorm2d(64).eval(), None, FrozenBatchNorm2d(64).eval(), "evaluation", "own"),
        (None, DAResidual(64), nn.BatchNorm2d(64), "training", "batch"),
        (None, DAResidual(64).eval(), nn.BatchNorm2d(64).eval(), "evaluation", "own"),
    ],
)
def test_of_modules(fused_cpu, norm, attention, its, mode, statistics):
    u = torch.empty(SHAPE)
    answer = da_ops.explain(u, norm=norm, layer=attention, shortcut_norm=its)
    told = answer.to_dict()
    assert (told["tail"]["mode"], told["tail"]["shortcut_norm"]) == (mode, statistics)
    assert told["tail"]["unfused"] is told["tail"]["shortcut_norm_unfused"] is None
    in_general = da_ops.explain(u, order=told["order"], tail=mode, shortcut_norm=statistics)
    assert answer.plan == in_general.plan
    whose = {"batch": "the batch's", "own": "its own"}[statistics]
    assert f"the shortcut's norm by {whose} statistics" in str(answer)
    assert "shortcut's norm, addition and ReLU fused in one operator" in str(answer)


@pytest.mark.parametrize(
    "its",
    [
        *NORMS.values(),
        lambda: FrozenBatchNorm2d(6).double(),
        lambda: nn.GroupNorm(2, 6).double(),
    ],
)
def test_as_residual_attention_decides(fused_cpu, its):
    norm, its, u = norm_of(), its(), torch.randn(3, 6, 7, 8, dtype=torch.float64)
    shortcut = torch.randn_like(u, requires_grad=True)
    told = da_ops.explain(u, norm=norm, shortcut_norm=its).to_dict()["tail"]
    taken = takes_the_norm(da_ops.residual_attention(u, shortcut, norm, None, its))
    assert told["unfused"] is None and (told["shortcut_norm_unfused"] is None) == taken


@pytest.mark.parametrize(
    ("its", "reason"),
    [
        (nn.GroupNorm(4, 64), "the norm is a GroupNorm"),
        (hooked(nn.BatchNorm2d(64)), "the norm has hooks"),
        (nn.BatchNorm2d(32), "tensors of 64 channels"),
        (FrozenBatchNorm2d(64), "backward through a FrozenBatchNorm2d does without the shortcut"),
    ],
)
def test_a_norm_that_is_called_before(fused_cpu, its, reason):
    u, norm = torch.empty(SHAPE), nn.BatchNorm2d(64)
    answer, plain = (da_ops.explain(u, norm=norm, shortcut_norm=one) for one in (its, None))
    assert answer.tail.unfused is None and reason in answer.tail.norm_unfused
    said = "norm, addition and ReLU fused in one operator; the shortcut's norm is called before"
    assert said in str(answer) and reason in str(answer)
    statistics = answer.tail.kind.shortcut_norm
    assert more(answer, plain) == PLAIN_NORM[statistics]
    names = [[p.name for p in getattr(answer.plan, way).passes] for way in WAYS]
    assert names[0][0] == names[1][-1] == "batch norm of the shortcut"


def test_a_backend_without_a_kernel_of_it(fused_cpu, monkeypatch):
    u = torch.empty(SHAPE)
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], batch_statistics=None))
    answer = da_ops.explain(u, tail="training", shortcut_norm="batch")
    assert answer.tail.norm_unfused == "backend 'cpu' has no kernel of a shortcut's norm"
    assert more(answer, da_ops.explain(u, tail="training")) == PLAIN_NORM["batch"]
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], residual_forward=None))
    answer = da_ops.explain(u, tail="training", shortcut_norm="batch")
    assert "residual tail" in answer.tail.unfused and answer.tail.norm_unfused is None
    assert "shortcut's norm, addition and ReLU one by one, not fused" in str(answer)
    assert more(answer, da_ops.explain(u, tail="training")) == PLAIN_NORM["batch"]


def test_one_norm_for_both(fused_cpu):
    norm = nn.BatchNorm2d(64)
    answer = da_ops.explain(torch.empty(SHAPE), norm=norm, shortcut_norm=norm)
    assert answer.tail.unfused == "the norm is the shortcut's, too"
    assert moved(answer) == (8 + 3, 8 + 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shortcut_norm": "batch"}, ValueError, "shortcut_norm goes with a tail; name it"),
        (
            {"tail": "training", "shortcut": False, "shortcut_norm": "own"},
            ValueError,
            "with a shortcut_norm, a shortcut is expected .* got shortcut=False; leave one",
        ),
        (
            {"tail": "training", "shortcut_norm": "training"},
            ValueError,
            "shortcut_norm must be one of 'batch', 'own', or None; got 'training'",
        ),
        (
            {"tail": "training", "shortcut_norm": nn.BatchNorm2d(64)},
            ValueError,
            r"without a norm, shortcut_norm must be one of .* got BatchNorm2d\(64",
        ),
        (
            {"layer": DAResidual(64), "shortcut_norm": "batch"},
            TypeError,
            "beside a norm, shortcut_norm must be an nn.Module or None, got 'batch'",
        ),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=rf"^da_attention: .*{message}"):
        da_ops.explain(torch.empty(SHAPE), **options)


@pytest.mark.parametrize(("mode", "statistics"), KINDS)
def test_command_line(capsys, mode, statistics):
    arguments = ["explain", "4x64x28x28", "--tail", mode, "--shortcut-norm", statistics]
    answer = da_ops.explain(torch.empty(SHAPE), tail=mode, shortcut_norm=statistics)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(answer)
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer.to_dict()
    assert cli.main([*arguments, "--no-shortcut"]) != 0
    assert "with a shortcut_norm, a shortcut is expected" in capsys.readouterr().err
