"""The reference is the definition: checked against arithmetic written out, and against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from da_ops import reference

from .cases import CASES, PARAMETERS, assert_close, make


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


def spatial_mask(x, parameters):
    """s[h, w] of one image [C, H, W], by the formula's letters."""
    channels, height, width = x.shape
    k0, k1 = (parameters[name][0, 0] for name in ("conv_weight", "dilated_weight"))
    v0, v1 = parameters["merge_weight"].ravel()
    mean = [[sum(x[:, h, w]) / channels for w in range(width)] for h in range(height)]

    def conv(kernel, dilation, h, w):
        total = 0.0
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                y, z = h + i * dilation, w + j * dilation
                if 0 <= y < height and 0 <= z < width:
                    total += kernel[i + 1, j + 1] * mean[y][z]
        return total

    s = np.empty((height, width))
    for h in range(height):
        for w in range(width):
            z = v0 * conv(k0, 1, h, w) + v1 * conv(k1, 3, h, w)
            s[h, w] = sigmoid(z + parameters["spatial_bias"][0])
    return s


def channel_mask(x, parameters, gate):
    """c[channel] of one image [C, H, W]."""
    channels = len(x)
    pooled = [x[c].sum() / x[c].size for c in range(channels)]
    c = np.empty((channels, 1, 1))
    for i in range(channels):
        if gate == "sigmoid":
            logit = pooled[i]
        elif gate == "eca":
            weight = parameters["gate_weight"]
            half = len(weight) // 2
            logit = sum(
                weight[t + half] * pooled[i + t]
                for t in range(-half, half + 1)
                if 0 <= i + t < channels
            )
        else:
            at = i if gate == "affine" else 0
            logit = parameters["gate_weight"][at] * pooled[i] + parameters["gate_bias"][at]
        c[i] = sigmoid(logit)
    return c


def by_hand(x, parameters, order, gate):
    """One image."""
    if order == "spatial_channel":
        y1 = x * spatial_mask(x, parameters)
        return y1 * channel_mask(y1, parameters, gate)
    if order == "channel_spatial":
        y1 = x * channel_mask(x, parameters, gate)
        return y1 * spatial_mask(y1, parameters)
    if order == "parallel":
        return x * spatial_mask(x, parameters) * channel_mask(x, parameters, gate)
    if order == "spatial":
        return x * spatial_mask(x, parameters)
    return x * channel_mask(x, parameters, gate)


@pytest.mark.parametrize(("order", "gate"), CASES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 7, 8, 9), (1, 1, 1, 1)])
def test_formula_is_the_arithmetic(shape, order, gate):
    call = make(shape, order, gate, dtype=torch.float64, kernel_size=5)
    parameters = {name: p.numpy() for name, p in call.parameters.items()}
    want = np.stack([by_hand(image, parameters, order, gate) for image in call.x.numpy()])
    np.testing.assert_allclose(call(reference.formula).numpy(), want, rtol=1e-13)


@pytest.mark.parametrize(("order", "gate"), CASES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_backward_is_the_derivative(order, gate, with_bias):
    call = make((3, 5, 8, 7), order, gate, dtype=torch.float64)
    if not with_bias:
        call.parameters.pop("spatial_bias", None)
    gradients = backward(call)
    got = {"y": call(reference.formula), "dx": gradients[0]}
    for name, gradient in zip(PARAMETERS, gradients[1:]):
        assert (gradient is None) == (name not in call.parameters)
        if gradient is not None:
            got[f"d_{name}"] = gradient
    assert_close(got, call.truth(), 1e-12)


def backward(call):
    parameters = dict.fromkeys(PARAMETERS) | call.parameters
    return reference.da_attention_backward(
        call.dy, call.x, **parameters, order=call.order, gate=call.gate
    )


@pytest.mark.parametrize(("order", "gate"), CASES)
def test_backward_is_differentiable(order, gate):
    """Each gradient, as a function of dy, x and the parameters, has the derivative it should."""
    call = make((2, 3, 4, 4), order, gate, dtype=torch.float64)
    names = list(call.parameters)

    def gradients(dy, x, *parameters):
        call.dy, call.x, call.parameters = dy, x, dict(zip(names, parameters))
        return tuple(g for g in backward(call) if g is not None)

    inputs = [t.clone().requires_grad_() for t in (call.dy, call.x, *call.parameters.values())]
    assert torch.autograd.gradcheck(gradients, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """Reductions in float32 make half precision exact but for the rounding of its results."""
    call = make((2, 64, 16, 16), dtype=dtype)
    in_float32 = call.to(torch.float32)
    assert torch.equal(call(reference.da_attention), in_float32(reference.formula).to(dtype))
    for half, single in zip(backward(call), backward(in_float32)):
        assert half.dtype == dtype
        assert torch.equal(half, single.to(dtype))
