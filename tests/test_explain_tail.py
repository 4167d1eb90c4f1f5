"""explain of the residual tail, and the model of the bytes that it moves."""

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
from da_ops.backends.base import MODES, Call, TailKind
from da_ops.backends.tail import fused_plan, tail_walks
from da_ops.residual import fusible

from .cases import CASES, DTYPES, LAYOUTS

SHAPE = (4, 64, 28, 28)
# Passes over u's bytes of portable launches, forward in training and backward: statistics 1, each
# sum 1, out 3; gradients 4, what flows back through the masks 1 each, du 3.
PORTABLE = {
    "spatial_channel": (1 + 2 + 3, 4 + 2 + 3),
    "channel_spatial": (1 + 2 + 3, 4 + 1 + 3),
    "parallel": (1 + 1 + 3, 4 + 1 + 3),
    "spatial": (1 + 1 + 3, 4 + 1 + 3),
    "channel": (1 + 1 + 3, 4 + 3),
    "none": (1 + 3, 4 + 3),
}
# On the CPU with each image in cache, which is the floor but for a frozen norm's backward.
IN_CACHE = {"training": (4, 7), "frozen": (3, 6), "evaluation": (3, None)}
FLOOR = {"training": (4, 7), "frozen": (3, 5), "evaluation": (3, None)}
# The same without a shortcut: forward does not read it, backward does not read out or write its
# gradient.
IN_CACHE_WITHOUT = {"training": (3, 5), "frozen": (2, 5), "evaluation": (2, None)}
FLOOR_WITHOUT = {"training": (3, 5), "frozen": (2, 3), "evaluation": (2, None)}
WAYS = ("forward", "backward")


def moved(answer):
    """In units of u, forward and backward."""
    told = answer.to_dict()
    ways = (told[way] for way in WAYS)
    return tuple(None if way is None else way["bytes_moved"] / answer.call.bytes for way in ways)


@pytest.mark.parametrize("order", PORTABLE)
def test_portable_passes(order):
    """Of any backend that says nothing else."""
    call = Call(SHAPE, torch.float16, True, order, "sigmoid")
    for mode in MODES:
        plan = fused_plan(replace(BACKENDS["cuda"], residual_plan=None), call, TailKind(mode))
        forward, backward = PORTABLE[order]
        # A norm with statistics of its own needs none of u's, and du not u.
        assert plan.forward.moved == forward - (mode != "training")
        assert plan.backward.moved == backward - (mode != "training")
        for direction in (plan.forward, plan.backward):
            assert direction.moved == sum(p.reads + p.writes for p in direction.passes)


@pytest.mark.parametrize("order", PORTABLE)
def test_portable_passes_without_a_shortcut(order):
    call = Call(SHAPE, torch.float16, True, order, "sigmoid")
    portable = replace(BACKENDS["cuda"], residual_plan=None)
    for mode in MODES:
        kind = TailKind(mode, shortcut=False)
        plan = fused_plan(portable, call, kind)
        forward, backward = PORTABLE[order]
        assert plan.forward.moved == forward - 1 - (mode != "training")
        assert plan.backward.moved == backward - 2
        planned = BACKENDS["cuda"].residual_plan(replace(call, sm=90), kind)
        for one, other in ((plan.forward, planned.forward), (plan.backward, planned.backward)):
            passes = [(p.name, p.reads, p.writes) for p in other.passes if p.reads]
            assert passes == [(p.name, p.reads, p.writes) for p in one.passes]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", PORTABLE)
def test_an_image_in_cache_without_a_shortcut(fused_cpu, monkeypatch, order, mode):
    u = torch.empty(SHAPE)
    monkeypatch.setenv("DA_OPS_CPU_PLAN", f"cache={2**30}")
    answer = da_ops.explain(u, order=order, tail=mode, shortcut=False)
    assert moved(answer) == IN_CACHE_WITHOUT[mode]
    told = answer.to_dict()
    assert told["tail"]["shortcut"] is False
    assert "addition" not in str(answer) and "ReLU fused in one operator" in str(answer)
    for way, floor in zip(WAYS, FLOOR_WITHOUT[mode]):
        assert (told[way] is None) == (floor is None)
        assert floor is None or told[way]["floor_bytes"] == floor * u.nbytes
    with_one = da_ops.explain(u, order=order, tail=mode).to_dict()["tail"]
    for key in ("plain_bytes", "plain_without_attention_bytes"):
        addition = with_one[key]["forward"] - told["tail"][key]["forward"]
        assert addition == 3 * u.nbytes
        assert with_one[key].get("backward") == told["tail"][key].get("backward")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", PORTABLE)
def test_an_image_in_cache_is_read_once(fused_cpu, monkeypatch, order, mode):
    u = torch.empty(SHAPE)
    monkeypatch.setenv("DA_OPS_CPU_PLAN", f"cache={2**30}")
    answer = da_ops.explain(u, order=order, tail=mode)
    assert moved(answer) == IN_CACHE[mode]
    for way, floor, now in zip(WAYS, FLOOR[mode], IN_CACHE[mode]):
        told = answer.to_dict()[way]
        if floor is None:
            assert told is None
        else:
            assert told["floor_bytes"] == floor * u.nbytes
            assert told["percent_of_floor"] == pytest.approx(100 * floor / now)
    monkeypatch.setenv("DA_OPS_CPU_PLAN", "cache=1")
    forward, backward = PORTABLE[order]
    if mode != "training":
        forward, backward = forward - 1, backward - 1
    want = forward, None if mode == "evaluation" else backward
    assert moved(da_ops.explain(u, order=order, tail=mode)) == want


@pytest.mark.parametrize("order", PORTABLE)
def test_what_is_read_again_must_have_stayed_in_cache(fused_cpu, monkeypatch, order):
    """Forward beside nothing else; backward beside all four tensors of the pass that reads most."""
    u = torch.empty(SHAPE)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    portable_forward, portable_backward = PORTABLE[order]
    for images, forward, backward in (
        (0.9, portable_forward, portable_backward),
        (1.1, 4, portable_backward),
        (3.9, 4, portable_backward),
        (4.1, 4, 7),
    ):
        monkeypatch.setenv("DA_OPS_CPU_PLAN", f"cache={int(images * u[0].nbytes)}")
        assert moved(da_ops.explain(u, order=order, tail="training")) == (forward, backward)
    layer = DAModule(64, order="spatial_channel")
    for images, want in (0.9, (4, 5)), (1.1, (2, 5)), (1.9, (2, 5)), (2.1, (2, 3)):
        monkeypatch.setenv("DA_OPS_CPU_PLAN", f"cache={int(images * u[0].nbytes)}")
        assert moved(da_ops.explain(u, layer=layer)) == want


def test_in_plain_pytorch():
    """16 passes without attention, 42 with it; in evaluation 7, and 6 more."""
    for mode, bare, more in (("training", 16, 26), ("evaluation", 7, 6)):
        told = da_ops.explain(torch.empty(SHAPE), tail=mode).to_dict()["tail"]
        sums = (sum(told[f"plain{key}_bytes"].values()) for key in ("", "_without_attention"))
        with_attention, without = (n / torch.empty(SHAPE).nbytes for n in sums)
        assert (with_attention, without) == (bare + more, bare)


def test_every_pass_reads_what_is_there():
    """The arguments, and what was written before; and the results are written once."""
    for order, shortcut in product(PORTABLE, (True, False)):
        forward, backward = tail_walks(order, TailKind("training", shortcut))
        for walks, there, results in (
            (forward, {"u", "shortcut"} if shortcut else {"u"}, ["out"]),
            (
                backward,
                {"dout", "out", "u"} if shortcut else {"dout", "u"},
                ["d_shortcut", "du"] if shortcut else ["du"],
            ),
        ):
            written = []
            for step in (step for walk in walks for step in walk):
                assert there.issuperset(step.reads)
                there.update(step.writes)
                written += step.writes
            assert written == results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "gate"), CASES)
def test_of_a_layer(backend, device, order, gate, dtype, layout):
    """As residual_attention decides; only a backend with a kernel of the tail is said to fuse."""
    u = torch.empty(SHAPE, dtype=dtype, device=device)
    u = u.contiguous(memory_format=LAYOUTS[layout])
    layer = DAResidual(64, order=order, gate=gate, backend=backend, device=device, dtype=dtype)
    answer = da_ops.explain(u, layer=layer)
    told = answer.to_dict()
    assert (told["backend"], told["order"], told["gate"]) == (backend, order, gate)
    assert (told["dtype"], told["layout"]) == (str(dtype).removeprefix("torch."), layout)
    assert told["tail"]["mode"] == "training"
    able = BACKENDS[backend].residual_forward is not None
    why = fusible.unfused(layer.norm, layer.attention, device)
    assert told["tail"]["unfused"] == why and able == (why is None)
    text = str(answer)
    assert ("fused in one operator" in text) == able and (why or "") in text
    assert all(p["name"] in text for way in WAYS for p in told[way]["passes"])
    if not able:
        of_attention = da_ops.explain(u, layer=layer.attention).plan
        assert answer.plan.forward.moved == of_attention.forward.moved + 8
        assert answer.plan.backward.moved == of_attention.backward.moved + 8
    json.dumps(told)


@pytest.mark.parametrize(
    ("norm", "attention", "mode"),
    [
        (nn.BatchNorm2d(64), DAModule(64), "training"),
        (nn.BatchNorm2d(64).eval(), DAModule(64), "frozen"),
        (nn.BatchNorm2d(64).eval(), DAModule(64).eval(), "evaluation"),
        (nn.BatchNorm2d(64).eval(), None, "evaluation"),
        (nn.BatchNorm2d(64, track_running_stats=False).eval(), None, "training"),
        (FrozenBatchNorm2d(64), DAModule(64), "frozen"),
        (FrozenBatchNorm2d(64).eval(), DAModule(64).eval(), "evaluation"),
    ],
)
def test_of_a_norm_and_a_layer(fused_cpu, norm, attention, mode):
    told = da_ops.explain(torch.empty(SHAPE), norm=norm, layer=attention).to_dict()
    assert told["tail"]["mode"] == mode and told["tail"]["unfused"] is None
    assert (told["order"] == "none") == (told["gate"] is None) == (attention is None)


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("norm", "attention", "dtype", "reason"),
    [
        (nn.GroupNorm(4, 64), DAModule(64), torch.float32, "the norm is a GroupNorm"),
        (hooked(nn.BatchNorm2d(64)), None, torch.float32, "the norm has hooks"),
        (nn.BatchNorm2d(64), hooked(DAModule(64)), torch.float32, "the attention has hooks"),
        (nn.BatchNorm2d(32), None, torch.float32, "tensors of 64 channels"),
        (nn.BatchNorm2d(64), None, torch.float64, "in the dtype of u"),
    ],
)
def test_says_why_it_is_not_fused(fused_cpu, norm, attention, dtype, reason):
    answer = da_ops.explain(torch.empty(SHAPE, dtype=dtype), norm=norm, layer=attention)
    assert reason in answer.tail.unfused and reason in str(answer)
    names = [p.name for p in answer.plan.forward.passes]
    assert (names[0], names[-2:]) == ("batch norm", ["addition", "ReLU"])


def test_a_changed_convolution():
    layer = DAResidual(64)
    hooked(layer.attention.conv)
    answer = da_ops.explain(torch.empty(SHAPE), layer=layer)
    assert answer.backend == "eager" and answer.tail.unfused == "conv has hooks"
    assert set(answer.passed_over.values()) == {"conv has hooks"}


def test_a_backend_without_a_kernel_of_the_tail(fused_cpu, choice, monkeypatch):
    assert da_ops.explain(torch.empty(SHAPE), tail="training").tail.unfused is None
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], residual_forward=None))
    answer = da_ops.explain(torch.empty(SHAPE), tail="training")
    assert answer.backend == "cpu"
    assert answer.tail.unfused == "backend 'cpu' has no kernel of the residual tail"
    assert moved(answer) == (8 + 2, 8 + 3)  # the layer's in cache
    monkeypatch.setenv("DA_OPS_BACKEND", "eager")
    choice.forget()
    passed = da_ops.explain(torch.empty(SHAPE), tail="training").passed_over
    assert passed["cpu"] == "backend 'cpu' has no kernel of the residual tail"


def test_the_mode_of_gradients_does_not_matter(fused_cpu):
    """Where gradients are off, what plain PyTorch moves is the same."""
    want = da_ops.explain(torch.empty(SHAPE), tail="training", order="parallel").to_dict()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            u = torch.empty(SHAPE)
            assert da_ops.explain(u, tail="training", order="parallel").to_dict() == want


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tail": "test"}, ValueError, "tail must be one of 'training', 'frozen', 'evaluation'"),
        ({"order": "none"}, ValueError, "order='none' goes with a tail"),
        ({"shortcut": False}, ValueError, "shortcut=False goes with a tail"),
        ({"tail": "training", "order": "all"}, ValueError, "order must be one of"),
        ({"norm": nn.BatchNorm2d(64), "tail": "frozen"}, ValueError, "got tail='frozen'; leave"),
        ({"norm": nn.BatchNorm2d(64), "layer": DAResidual(64)}, ValueError, "got a DAResidual"),
        ({"layer": nn.ReLU()}, TypeError, "layer must be a DAModule, .* got ReLU"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=rf"^da_attention: .*{message}"):
        da_ops.explain(torch.empty(SHAPE), **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", PORTABLE)
def test_command_line(capsys, order, mode):
    arguments = ["explain", "4x64x28x28", "--tail", mode, "--order", order]
    answer = da_ops.explain(torch.empty(SHAPE), order=order, tail=mode)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(answer)
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == answer.to_dict()
    answer = da_ops.explain(torch.empty(SHAPE), order=order, tail=mode, shortcut=False)
    assert cli.main([*arguments, "--no-shortcut"]) == 0
    assert capsys.readouterr().out.strip() == str(answer)


@pytest.mark.parametrize("mode", MODES)
def test_any_architecture(capsys, mode):
    """On any machine, whether or not its kernels have the tail."""
    assert cli.main(["explain", "4x64x28x28", "--tail", mode, "--device", "sm_90", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["backend"], told["device"]) == ("cuda", "sm_90")
    fuses = BACKENDS["cuda"].residual_forward is not None
    assert (told["tail"]["unfused"] is None) == fuses
    assert (told["backward"] is None) == (mode == "evaluation")


def test_no_attention_on_the_command_line_needs_a_tail(capsys):
    assert cli.main(["explain", "4x64x28x28", "--order", "none"]) != 0
    assert "order='none' goes with a tail" in capsys.readouterr().err
