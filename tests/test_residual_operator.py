"""The residual tail's registered operators: what PyTorch asks of them, and their errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from da_ops.accuracy import PARAMETERS
from da_ops.residual.function import fused

from .cases import LAYOUTS
from .tails import make_tail


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(("order", "gate"), [("spatial_channel", "affine"), ("none", "sigmoid")])
def test_opcheck(fused_cpu, order, gate, shortcut, batch, layout):
    tail = make_tail((2, 3, 4, 5), order, gate, layout=layout, batch=batch, shortcut=shortcut)
    parameters = [tail.parameters.get(name) for name in PARAMETERS]
    forward = (tail.u, tail.shortcut, *tail.norm, *parameters, order, gate)
    ops = torch.ops.da_ops
    torch.library.opcheck(ops.residual_forward.default, forward)
    torch.library.opcheck(ops.residual_forward_.default, (tail.u.clone(), *forward[1:]))
    out, mean, var, *maps = ops.residual_forward(*forward)
    if batch:
        running = torch.randn(3), torch.rand(3), torch.tensor(41), 0.1
        training = (*forward[:4], *running, *forward[6:])
        torch.library.opcheck(ops.residual_training.default, training)
        assert torch.equal(ops.residual_training(*training)[0], out)
        assert running[2] == 42
    else:
        mean, var = tail.norm.mean, tail.norm.var
    weight, bias, *_, eps = tail.norm
    norm = (weight, bias, mean, var, batch, eps)
    rectified = out if shortcut else None
    backward = (tail.dout, rectified, tail.u, *norm, *parameters, *maps, order, gate)
    torch.library.opcheck(ops.residual_backward.default, backward)


def test_the_operator_names_what_does_not_fit(fused_cpu):
    tail = make_tail()
    parameters = [tail.parameters.get(name) for name in PARAMETERS]
    with pytest.raises(RuntimeError, match="shortcut must be like u"):
        torch.ops.da_ops.residual_forward(
            tail.u, tail.shortcut[:1], *tail.norm, *parameters, "spatial_channel", "affine"
        )
    other = tail.shortcut.reshape(*tail.u.shape[:2], tail.u.shape[3], tail.u.shape[2])
    with pytest.raises(RuntimeError, match="shortcut must be like u"):  # as many elements
        torch.ops.da_ops.residual_forward(
            tail.u, other, *tail.norm, *parameters, "spatial_channel", "affine"
        )
    for u, norm, message in (
        (tail.u[:1, :, :1, :1].contiguous(), tail.norm, "more than one value a channel"),
        (tail.u[:0], make_tail(batch=False).norm, "u must hold at least one image"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.da_ops.residual_forward(
                u, None, *norm, *parameters, "spatial_channel", "affine"
            )
    with pytest.raises(RuntimeError, match="norm_mean and norm_var go together"):
        torch.ops.da_ops.residual_forward(
            tail.u,
            tail.shortcut,
            *tail.norm._replace(mean=torch.zeros(5)),
            *parameters,
            "spatial_channel",
            "affine",
        )
    for mean, batches, message in (
        (torch.zeros(10)[::2], None, "running statistics must be contiguous"),
        (torch.zeros(4), None, "the norm's tensors must be one number a channel"),
        (torch.zeros(5).double(), None, "the norm's tensors must have u's dtype"),
        (torch.zeros(5), torch.tensor(0.0), "batches must be one number of int64"),
        (torch.zeros(5), torch.tensor([0, 0]), "batches must be one number of int64"),
        (torch.zeros(5), torch.tensor(0, device="meta"), "batches must be on u's device"),
    ):
        running = mean, torch.ones(5), batches, 0.1
        with pytest.raises(RuntimeError, match=message):
            torch.ops.da_ops.residual_training.default.redispatch(
                torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),  # whatever else is given
                tail.u,
                tail.shortcut,
                *tail.norm[:2],
                *running,
                1e-5,
                *parameters,
                "spatial_channel",
                "affine",
            )
    with pytest.raises(RuntimeError, match="must be one number a channel"):
        fused(
            tail.u,
            tail.shortcut,
            *tail.norm._replace(weight=nn.Parameter(torch.ones(3))),
            *parameters,
            "spatial_channel",
            "affine",
            "cpu",
        )


@pytest.mark.parametrize("of_tail", [True, False], ids=["tail", "layer"])
def test_backward_refuses_what_is_not_forwards(fused_cpu, of_tail):
    tail = make_tail()
    parameters = [tail.parameters.get(name) for name in PARAMETERS]
    how = *parameters, "spatial_channel", "affine"
    ops = torch.ops.da_ops
    if of_tail:
        out, mean, var, channel_mean, pooled = ops.residual_forward(
            tail.u, tail.shortcut, *tail.norm, *how
        )
        norm = tail.norm.weight, tail.norm.bias, mean, var, True, tail.norm.eps
        names = "dout", "u"
    else:
        _, channel_mean, pooled = ops.forward(tail.u, *how)
        names = "dy", "x"

    def backward(dout=tail.dout, channel_mean=channel_mean, pooled=pooled):
        maps = channel_mean, pooled, *how[-2:]
        if of_tail:
            return ops.residual_backward(dout, out, tail.u, *norm, *parameters, *maps)
        return ops.backward(dout, tail.u, *parameters, *maps)

    backward()
    n, c, h, w = tail.u.shape
    gradient, of = names
    for given, message in (
        ({"dout": tail.dout.reshape(n, c, w, h)}, f"{gradient} must be like {of}"),
        ({"dout": tail.dout.double()}, f"{gradient} must be like {of}"),
        (
            {"dout": tail.dout.to(memory_format=torch.channels_last)},
            f"{gradient} must have the layout of {of}",
        ),
        ({"channel_mean": channel_mean.double()}, "must be forward's"),
        ({"channel_mean": channel_mean[:1]}, "must be forward's"),
        ({"pooled": pooled.half()}, "must be forward's"),
        ({"pooled": pooled.t().contiguous().t()}, "must be forward's"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(**given)
