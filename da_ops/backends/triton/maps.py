"""The Triton kernels over small maps, between the passes: the masks, the way back through them, and
the gradients of the parameters.

Each axis has a mean of x and a mask, the sigmoid of a logit: over the pixels the channel mean and
the spatial mask, whose logit is a stencil of 18 taps; over the channels the pooled image and the
channel mask, whose logit the gate makes. One launch serves both axes: its programs are the blocks
of pixels of each image and its blocks of channels.

A program computes itself what its stencil reaches of a map, so that none waits for another:
neighbours store the same numbers twice. Names in capitals are known when a kernel is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .sums import folded, sum_of, sum_over_images

TAP_SUMS = 32  # 19 numbers, up to a power of two: 9 near taps, 9 far taps, the bias


class Size(NamedTuple):
    """The size of an image."""

    channels: int
    pixels: int
    height: int
    width: int


class Blocks(NamedTuple):
    """How programs share out a map of one image."""

    number: int = 0  # of blocks, one a program
    steps: int = 0  # of SIZE elements that cover what a block reaches
    SIZE: tl.constexpr = tl.constexpr(1)  # elements of a block
    CHUNK: tl.constexpr = tl.constexpr(1)  # elements whose stencil is computed at once


class Shares(NamedTuple):
    """A map's sums in parts, ``[N, number, length]``: what different programs summed."""

    sums: Tensor | None = None
    number: int = 0
    of_d: Tensor | None = None  # of what a sum of d * (u - centre) goes with, of d alone


class Normed(NamedTuple):
    """What the residual tail's norm adds to the maps over the channels.

    Shares are of u - centre, and x is ``(u - centre) scale + bias``: a sum of x with weights is
    scale times that of u - centre, and bias times that of the weights.
    """

    pooled: Tensor | None = None  # the mean of u - centre; without it there is no norm
    scale: Tensor | None = None  # [C]
    bias: Tensor | None = None  # [C]
    weights: Tensor | None = None  # by pixel, of the latest sum; ones where absent


class AxisMaps(NamedTuple):
    """The maps of one axis; those that a kernel does not need may be absent."""

    blocks: Blocks = Blocks()
    mean: Tensor | None = None
    mask: Tensor | None = None  # without it there is nothing to do
    d_logit: Tensor | None = None
    d_mean: Tensor | None = None  # a term of dx, so divided by what the mean is divided by
    parameter_sums: Tensor | None = None  # each block's share of the parameters' gradients
    shares: Shares = Shares()  # forward of a mean that is yet to be stored; backward of d_mask
    more_shares: Shares = Shares()  # of d_mask, from another pass
    PARTS: tl.constexpr = tl.constexpr(1)  # shares that are added at once
    normed: Normed = Normed()


@triton.jit
def _store_means(maps, image, length, divisor, first, reach, pixels, ACC):
    """Stores what the block that begins at first reaches of the mean, from its shares.

    With a norm, the mean of u - centre is what shares give, which then is stored too, or is known.
    """
    end = tl.minimum(first + maps.blocks.SIZE + reach, length)
    normed = maps.normed
    if normed.pooled is not None:
        weight = 1.0
        if normed.weights is not None:
            weight = sum_of(normed.weights, image, pixels, ACC) / pixels
    for step in range(maps.blocks.steps):
        i = tl.maximum(first - reach, 0) + step * maps.blocks.SIZE + tl.arange(0, maps.blocks.SIZE)
        wanted = i < end
        shares = maps.shares
        if shares.sums is not None:
            sums = folded(shares.sums, shares.number, image, length, i, wanted, maps.PARTS, ACC)
            mean = sums / divisor
        else:
            mean = tl.load(normed.pooled + image * length + i, mask=wanted, other=0.0)
        if normed.pooled is not None:
            if shares.sums is not None:
                tl.store(normed.pooled + image * length + i, mean, mask=wanted)
            mean *= tl.load(normed.scale + i, mask=wanted, other=0.0)
            mean += tl.load(normed.bias + i, mask=wanted, other=0.0) * weight
        tl.store(maps.mean + image * length + i, mean, mask=wanted)
    tl.debug_barrier()


@triton.jit
def _store_d_logits(maps, image, length, first, reach, pixels, ACC):
    """Stores what the block that begins at first reaches of d_logit, from the mask's gradient."""
    end = tl.minimum(first + maps.blocks.SIZE + reach, length)
    normed = maps.normed
    if normed.pooled is not None and maps.more_shares.sums is not None:
        weight = sum_of(normed.weights, image, pixels, ACC)
    for step in range(maps.blocks.steps):
        i = tl.maximum(first - reach, 0) + step * maps.blocks.SIZE + tl.arange(0, maps.blocks.SIZE)
        wanted = i < end
        shares = maps.shares
        d = folded(shares.sums, shares.number, image, length, i, wanted, maps.PARTS, ACC)
        if normed.pooled is not None:
            scale = tl.load(normed.scale + i, mask=wanted, other=0.0)
            bias = tl.load(normed.bias + i, mask=wanted, other=0.0)
            of_d = folded(shares.of_d, shares.number, image, length, i, wanted, maps.PARTS, ACC)
            d = scale * d + bias * of_d
        shares = maps.more_shares
        if shares.sums is not None:
            more = folded(shares.sums, shares.number, image, length, i, wanted, maps.PARTS, ACC)
            if normed.pooled is not None:
                more = scale * more + bias * weight
            d += more
        mask = tl.load(maps.mask + image * length + i, mask=wanted, other=0.0)
        tl.store(maps.d_logit + image * length + i, d * mask * (1.0 - mask), mask=wanted)
    tl.debug_barrier()


@triton.jit
def _sigmoid(logit):
    return 1.0 / (1.0 + tl.exp(-logit))


# ---- pixels


@triton.jit
def _taps(values, pixel, size, SIGN):
    """values[pixel + tap] for the 9 near and the 9 far taps, 0 beyond the border, as [32, pixels].

    SIGN -1: values[pixel - tap].
    """
    tap = tl.arange(0, 32)
    step = tl.where(tap < 9, SIGN, 3 * SIGN)
    row = (pixel // size.width)[None, :] + ((tap % 9 // 3 - 1) * step)[:, None]
    col = (pixel % size.width)[None, :] + ((tap % 3 - 1) * step)[:, None]
    inside = (tap < 18)[:, None] & (pixel < size.pixels)[None, :]
    inside = inside & (row >= 0) & (row < size.height) & (col >= 0) & (col < size.width)
    return tl.load(values + row * size.width + col, mask=inside, other=0.0)


@triton.jit
def _tap_weights(parameters, ACC):
    """The weights of both convolutions, with the merge folded in, in the order of `_taps`."""
    tap = tl.arange(0, 32)
    near = tl.load(parameters.conv_weight + tap, mask=tap < 9, other=0.0).to(ACC)
    far = (tap >= 9) & (tap < 18)
    far = tl.load(parameters.dilated_weight + tap - 9, mask=far, other=0.0).to(ACC)
    merge = parameters.merge_weight
    return near * tl.load(merge).to(ACC) + far * tl.load(merge + 1).to(ACC)


@triton.jit
def _spatial_mask(maps, parameters, size, image, block, ACC):
    """The spatial mask of a block of pixels, CHUNK at a time."""
    at = image * size.pixels
    first = block * maps.blocks.SIZE
    if maps.shares.sums is not None:
        reach = 3 * size.width + 3
        _store_means(maps, image, size.pixels, size.channels, first, reach, size.pixels, ACC)
    weights = _tap_weights(parameters, ACC)[:, None]
    for chunk in range(0, maps.blocks.SIZE, maps.blocks.CHUNK):
        pixel = first + chunk + tl.arange(0, maps.blocks.CHUNK)
        logit = tl.sum(weights * _taps(maps.mean + at, pixel, size, 1), 0)
        if parameters.spatial_bias is not None:
            logit += tl.load(parameters.spatial_bias).to(ACC)
        tl.store(maps.mask + at + pixel, _sigmoid(logit), mask=pixel < size.pixels)


@triton.jit
def _spatial_gradients(maps, parameters, size, image, block, ACC):
    """Back through the spatial mask of a block of pixels, CHUNK at a time.

    parameter_sums[image, block]: sum_pixel d_logit[pixel] mean[pixel + tap] for each tap, then
    sum_pixel d_logit[pixel].
    """
    at = image * size.pixels
    first = block * maps.blocks.SIZE
    reach = 3 * size.width + 3
    _store_d_logits(maps, image, size.pixels, first, reach, size.pixels, ACC)
    weights = _tap_weights(parameters, ACC)[:, None]
    tap = tl.arange(0, 32)
    sums = tl.full((32, maps.blocks.CHUNK), 0.0, ACC)
    for chunk in range(0, maps.blocks.SIZE, maps.blocks.CHUNK):
        pixel = first + chunk + tl.arange(0, maps.blocks.CHUNK)
        wanted = pixel < size.pixels
        d_mean = tl.sum(weights * _taps(maps.d_logit + at, pixel, size, -1), 0)
        tl.store(maps.d_mean + at + pixel, d_mean / size.channels, mask=wanted)
        taps = _taps(maps.mean + at, pixel, size, 1)
        taps = tl.where((tap == 18)[:, None], 1.0, taps)
        sums += taps * tl.load(maps.d_logit + at + pixel, mask=wanted, other=0.0)[None, :]
    to = maps.parameter_sums + (image * maps.blocks.number + block) * 32 + tap
    tl.store(to, tl.sum(sums, 1))


# ---- channels


@triton.jit
def _shifted(values, channel, channels, shift):
    """values[channel + shift], 0 beyond the first and the last channel."""
    i = channel + shift
    return tl.load(values + i, mask=(channel < channels) & (i >= 0) & (i < channels), other=0.0)


@triton.jit
def _channel_mask(maps, parameters, size, image, block, taps, GATE, ACC):
    """The channel mask of a block of channels."""
    channels = size.channels
    first = block * maps.blocks.SIZE
    if maps.shares.sums is not None or maps.normed.pooled is not None:
        reach = taps // 2 if GATE == "eca" else 0
        _store_means(maps, image, channels, size.pixels, first, reach, size.pixels, ACC)
    channel = first + tl.arange(0, maps.blocks.SIZE)
    wanted = channel < channels
    pooled = maps.mean + image * channels
    weight, bias = parameters.gate_weight, parameters.gate_bias
    if GATE == "eca":
        logit = tl.full(channel.shape, 0.0, ACC)
        for tap in range(taps):
            w = tl.load(weight + tap).to(ACC)
            logit += w * _shifted(pooled, channel, channels, tap - taps // 2)
    else:
        logit = tl.load(pooled + channel, mask=wanted, other=0.0)
        if GATE == "affine":
            logit *= tl.load(weight + channel, mask=wanted, other=0.0).to(ACC)
            logit += tl.load(bias + channel, mask=wanted, other=0.0).to(ACC)
        if GATE == "scalar":
            logit = logit * tl.load(weight).to(ACC) + tl.load(bias).to(ACC)
    tl.store(maps.mask + image * channels + channel, _sigmoid(logit), mask=wanted)


@triton.jit
def _channel_gradients(maps, parameters, size, image, block, taps, GATE, ACC):
    """Back through the channel mask of a block of channels.

    parameter_sums[image, block], where the gate is

        "scalar"    sum d_logit pooled, then sum d_logit
        "eca"       sum_channel d_logit[channel] pooled[channel + tap - taps // 2] for each tap

    "affine" has a parameter for each channel: its gradients are summed over images alone.
    """
    channels = size.channels
    first = block * maps.blocks.SIZE
    reach = taps // 2 if GATE == "eca" else 0
    _store_d_logits(maps, image, channels, first, reach, size.pixels, ACC)
    channel = first + tl.arange(0, maps.blocks.SIZE)
    wanted = channel < channels
    d_logits, pooled = maps.d_logit + image * channels, maps.mean + image * channels
    weight = parameters.gate_weight
    d_logit = tl.load(d_logits + channel, mask=wanted, other=0.0)
    to = maps.parameter_sums + (image * maps.blocks.number + block) * taps
    if GATE == "eca":
        d_mean = tl.full(channel.shape, 0.0, ACC)
        for tap in range(taps):
            shift = tap - taps // 2
            w = tl.load(weight + tap).to(ACC)
            d_mean += w * _shifted(d_logits, channel, channels, -shift)
            tl.store(to + tap, tl.sum(d_logit * _shifted(pooled, channel, channels, shift), 0))
    else:
        d_mean = d_logit
        if GATE == "affine":
            d_mean *= tl.load(weight + channel, mask=wanted, other=0.0).to(ACC)
        if GATE == "scalar":
            d_mean *= tl.load(weight).to(ACC)
            tl.store(to, tl.sum(d_logit * tl.load(pooled + channel, mask=wanted, other=0.0), 0))
            tl.store(to + 1, tl.sum(d_logit, 0))
    tl.store(maps.d_mean + image * channels + channel, d_mean / size.pixels, mask=wanted)


# ---- both, in one launch


@triton.jit
def masks(
    spatial, channel, parameters, size, taps,
    GATE: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The masks from the means, which are first computed where there are shares of them."""
    programs = spatial.blocks.number + channel.blocks.number
    image = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs
    if spatial.mask is not None:
        if block < spatial.blocks.number:
            _spatial_mask(spatial, parameters, size, image, block.to(INDEX), ACC)
    if channel.mask is not None:
        if block >= spatial.blocks.number:
            block -= spatial.blocks.number
            _channel_mask(channel, parameters, size, image, block, taps, GATE, ACC)


@triton.jit
def mask_gradients(
    spatial, channel, parameters, size, taps,
    GATE: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Back through the masks, from the shares of their gradients."""
    programs = spatial.blocks.number + channel.blocks.number
    image = (tl.program_id(0) // programs).to(tl.int64)
    block = tl.program_id(0) % programs
    if spatial.mask is not None:
        if block < spatial.blocks.number:
            _spatial_gradients(spatial, parameters, size, image, block.to(INDEX), ACC)
    if channel.mask is not None:
        if block >= spatial.blocks.number:
            block -= spatial.blocks.number
            _channel_gradients(channel, parameters, size, image, block, taps, GATE, ACC)


# ---- the parameters


@triton.jit
def _stencil_gradients(shares, parameters, gradients, PARTS, ACC):
    """The gradients of the convolutions, the merge and the spatial bias."""
    tap = tl.arange(0, 32)
    near, far = tap < 9, (tap >= 9) & (tap < 18)
    sums = sum_over_images(shares.sums, None, shares.number, 32, tap, PARTS)
    merge = parameters.merge_weight
    near_merge, far_merge = tl.load(merge).to(tl.float64), tl.load(merge + 1).to(tl.float64)
    conv = tl.load(parameters.conv_weight + tap, mask=near, other=0.0).to(tl.float64)
    dilated = tl.load(parameters.dilated_weight + tap - 9, mask=far, other=0.0).to(tl.float64)
    tl.store(gradients.conv_weight + tap, (near_merge * sums).to(ACC), mask=near)
    tl.store(gradients.dilated_weight + tap - 9, (far_merge * sums).to(ACC), mask=far)
    d_merge = gradients.merge_weight
    tl.store(d_merge, tl.sum(tl.where(near, conv * sums, 0.0), 0).to(ACC))
    tl.store(d_merge + 1, tl.sum(tl.where(far, dilated * sums, 0.0), 0).to(ACC))
    if gradients.spatial_bias is not None:
        tl.store(gradients.spatial_bias, tl.sum(tl.where(tap == 18, sums, 0.0), 0).to(ACC))


@triton.jit
def _gate_gradients(shares, d_logit, pooled, images, length, i, gradients, GATE, PARTS, ACC):
    """The gradients of the gate's parameters, for a block of i."""
    if GATE == "affine":
        d_weight = sum_over_images(d_logit, pooled, images, length, i, PARTS)
        d_bias = sum_over_images(d_logit, None, images, length, i, PARTS)
        tl.store(gradients.gate_weight + i, d_weight.to(ACC), mask=i < length)
        tl.store(gradients.gate_bias + i, d_bias.to(ACC), mask=i < length)
    else:
        sums = sum_over_images(shares.sums, None, shares.number, length, i, PARTS).to(ACC)
        if GATE == "eca":
            tl.store(gradients.gate_weight + i, sums, mask=i < length)
        else:
            tl.store(gradients.gate_weight + i, sums, mask=i == 0)
            tl.store(gradients.gate_bias + i - 1, sums, mask=i == 1)


@triton.jit
def parameter_gradients(
    stencil_shares, gate_shares, d_logit, pooled, images, length, parameters, gradients,
    GATE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of the parameters from their shares, [number, length] over all images.

    A program: all spatial parameters, if there are any, the first; else BLOCK numbers of the gate.
    """
    program = tl.program_id(0)
    if gradients.conv_weight is not None:
        if program == 0:
            _stencil_gradients(stencil_shares, parameters, gradients, PARTS, ACC)
        program -= 1
    if gradients.gate_weight is not None:
        if program >= 0:
            i = program * BLOCK + tl.arange(0, BLOCK)
            _gate_gradients(
                gate_shares, d_logit, pooled, images, length, i, gradients, GATE, PARTS, ACC
            )
