"""The Triton kernels over small maps, between the passes: the masks, the way back through them, and
the gradients of the parameters."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _folded(shares, n, count, length, i, wanted, PARTS: tl.constexpr, ACC: tl.constexpr):
    """sum_k shares[n, k, i] in the order of k, for a block of i."""
    sums = tl.full((PARTS, i.shape[0]), 0.0, ACC)
    for first in range(0, count, PARTS):
        k = first + tl.arange(0, PARTS)
        at = shares + (n * count + k)[:, None] * length + i[None, :]
        sums += tl.load(at, mask=(k < count)[:, None] & wanted[None, :], other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _taps(m, at, p, wanted, height, width, SIGN: tl.constexpr):
    """m[p + t] for the 9 near taps and the 9 dilated ones, 0 beyond the border, as [32, pixels].

    SIGN -1: m[p - t].
    """
    t = tl.arange(0, 32)
    far = tl.where(t < 9, SIGN, 3 * SIGN)
    i = (p // width)[None, :] + ((t % 9 // 3 - 1) * far)[:, None]
    j = (p % width)[None, :] + ((t % 3 - 1) * far)[:, None]
    inside = (t < 18)[:, None] & wanted[None, :] & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    return tl.load(m + at + i * width + j, mask=inside, other=0.0)


@triton.jit
def _tap_weights(conv, dilated, merge, ACC: tl.constexpr):
    """Of both convolutions with the merge folded in, in the order of `_taps`."""
    t = tl.arange(0, 32)
    near = tl.load(conv + t, mask=t < 9, other=0.0).to(ACC) * tl.load(merge).to(ACC)
    far = tl.load(dilated + t - 9, mask=(t >= 9) & (t < 18), other=0.0).to(ACC)
    return near + far * tl.load(merge + 1).to(ACC)


@triton.jit
def _logit(g, at, c, channels, weight, bias, taps, GATE: tl.constexpr, ACC: tl.constexpr):
    """What the channel mask is the sigmoid of, at channels c."""
    wanted = c < channels
    if GATE == "eca":
        logit = tl.full(c.shape, 0.0, ACC)
        for k in range(taps):
            i = c + k - taps // 2
            inside = wanted & (i >= 0) & (i < channels)
            logit += tl.load(weight + k).to(ACC) * tl.load(g + at + i, mask=inside, other=0.0)
        return logit
    logit = tl.load(g + at + c, mask=wanted, other=0.0)
    if GATE == "affine":
        logit *= tl.load(weight + c, mask=wanted, other=0.0).to(ACC)
        logit += tl.load(bias + c, mask=wanted, other=0.0).to(ACC)
    if GATE == "scalar":
        logit = logit * tl.load(weight).to(ACC) + tl.load(bias).to(ACC)
    return logit


@triton.jit
def masks(
    m_shares, m_count, m, s, conv, dilated, merge, spatial_bias,
    pixels, height, width, bands, steps,
    g_shares, g_count, g, c, gate_weight, gate_bias, taps, channels, blocks, gate_steps,
    GATE: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    BP: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr, MP: tl.constexpr, GP: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The masks s [N, P] and c [N, C] from the channel mean m and the pooled g; these first from
    their shares, where shares are given.

    A program: BP pixels, or BC channels, of one image. It computes what its stencil reaches of m
    itself, so that programs need not wait for one another: neighbours store the same numbers twice.
    """
    program = tl.program_id(0)
    k = program % (bands + blocks)
    n = (program // (bands + blocks)).to(tl.int64)
    if SPATIAL:
        if k < bands:
            at = n * pixels
            first = k.to(INDEX) * BP
            if m_shares is not None:
                reach = 3 * width + 3
                upto = tl.minimum(first + BP + reach, pixels)
                for step in range(steps):
                    p = tl.maximum(first - reach, 0) + step * BP + tl.arange(0, BP)
                    sums = _folded(m_shares, n, m_count, pixels, p, p < upto, MP, ACC)
                    tl.store(m + at + p, sums / channels, mask=p < upto)
                tl.debug_barrier()
            weights = _tap_weights(conv, dilated, merge, ACC)[:, None]
            for chunk in range(0, BP, CHUNK):
                p = first + chunk + tl.arange(0, CHUNK)
                z = tl.sum(weights * _taps(m, at, p, p < pixels, height, width, 1), 0)
                if spatial_bias is not None:
                    z += tl.load(spatial_bias).to(ACC)
                tl.store(s + at + p, _sigmoid(z), mask=p < pixels)
    if CHANNEL:
        if k >= bands:
            at = n * channels
            first = (k - bands) * BC
            if g_shares is not None:
                reach = taps // 2 if GATE == "eca" else 0
                upto = tl.minimum(first + BC + reach, channels)
                for step in range(gate_steps):
                    ch = tl.maximum(first - reach, 0) + step * BC + tl.arange(0, BC)
                    sums = _folded(g_shares, n, g_count, channels, ch, ch < upto, GP, ACC)
                    tl.store(g + at + ch, sums / pixels, mask=ch < upto)
                tl.debug_barrier()
            ch = first + tl.arange(0, BC)
            z = _logit(g, at, ch, channels, gate_weight, gate_bias, taps, GATE, ACC)
            tl.store(c + at + ch, _sigmoid(z), mask=ch < channels)


@triton.jit
def _through_sigmoid(shares, count, more, more_count, mask, n, length, i, wanted,
                     PARTS: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The gradient of what a mask is the sigmoid of, from the shares of the mask's gradient."""
    d = _folded(shares, n, count, length, i, wanted, PARTS, ACC)
    if more is not None:
        d += _folded(more, n, more_count, length, i, wanted, PARTS, ACC)
    value = tl.load(mask + n * length + i, mask=wanted, other=0.0)
    return d * value * (1.0 - value)


@triton.jit
def mask_gradients(
    ds_shares, ds_count, ds_more, ds_more_count, s, dz, m, dm, tap_sums,
    conv, dilated, merge, pixels, height, width, bands, steps,
    dc_shares, dc_count, dc_more, dc_more_count, c, dt, g, dg, gate_sums,
    gate_weight, taps, channels, blocks, gate_steps,
    GATE: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    BP: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr, SP: tl.constexpr, CP: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Back through the masks, from the shares of ds and dc: dm divided by the channels, dg divided
    by the pixels, and each program's share of what the parameters' gradients are sums of:

        tap_sums[n, band]  = sum_p dz[p] m[p + t], 9 near and 9 far taps, then sum_p dz[p]
        gate_sums[n, block]: "scalar" sum dt g, sum dt;  "eca" sum_c dt[c] g[c + k - K/2]

    Programs as in `masks`.
    """
    program = tl.program_id(0)
    k = program % (bands + blocks)
    n = (program // (bands + blocks)).to(tl.int64)
    if SPATIAL:
        if k < bands:
            at = n * pixels
            first = k.to(INDEX) * BP
            reach = 3 * width + 3
            upto = tl.minimum(first + BP + reach, pixels)
            for step in range(steps):
                p = tl.maximum(first - reach, 0) + step * BP + tl.arange(0, BP)
                d = _through_sigmoid(ds_shares, ds_count, ds_more, ds_more_count, s, n, pixels, p,
                                     p < upto, SP, ACC)  # fmt: skip
                tl.store(dz + at + p, d, mask=p < upto)
            tl.debug_barrier()
            weights = _tap_weights(conv, dilated, merge, ACC)[:, None]
            t = tl.arange(0, 32)
            sums = tl.full((32, CHUNK), 0.0, ACC)
            for chunk in range(0, BP, CHUNK):
                p = first + chunk + tl.arange(0, CHUNK)
                wanted = p < pixels
                d = tl.sum(weights * _taps(dz, at, p, wanted, height, width, -1), 0)
                tl.store(dm + at + p, d / channels, mask=wanted)
                taps_of_m = _taps(m, at, p, wanted, height, width, 1)
                taps_of_m = tl.where((t == 18)[:, None], 1.0, taps_of_m)
                sums += taps_of_m * tl.load(dz + at + p, mask=wanted, other=0.0)[None, :]
            tl.store(tap_sums + (n * bands + k) * 32 + t, tl.sum(sums, 1))
    if CHANNEL:
        if k >= bands:
            at = n * channels
            first = (k - bands) * BC
            reach = taps // 2 if GATE == "eca" else 0
            upto = tl.minimum(first + BC + reach, channels)
            for step in range(gate_steps):
                ch = tl.maximum(first - reach, 0) + step * BC + tl.arange(0, BC)
                d = _through_sigmoid(dc_shares, dc_count, dc_more, dc_more_count, c, n, channels,
                                     ch, ch < upto, CP, ACC)  # fmt: skip
                tl.store(dt + at + ch, d, mask=ch < upto)
            tl.debug_barrier()
            ch = first + tl.arange(0, BC)
            wanted = ch < channels
            d = tl.load(dt + at + ch, mask=wanted, other=0.0)
            to = gate_sums + (n * blocks + k - bands) * taps
            if GATE == "eca":
                back = tl.full((BC,), 0.0, ACC)
                for t in range(taps):
                    i = ch - t + taps // 2
                    inside = wanted & (i >= 0) & (i < channels)
                    w = tl.load(gate_weight + t).to(ACC)
                    back += w * tl.load(dt + at + i, mask=inside, other=0.0)
                    i = ch + t - taps // 2
                    inside = wanted & (i >= 0) & (i < channels)
                    tl.store(to + t, tl.sum(d * tl.load(g + at + i, mask=inside, other=0.0), 0))
            else:
                back = d
                if GATE == "affine":
                    back *= tl.load(gate_weight + ch, mask=wanted, other=0.0).to(ACC)
                if GATE == "scalar":
                    back *= tl.load(gate_weight).to(ACC)
                    pooled = tl.load(g + at + ch, mask=wanted, other=0.0)
                    tl.store(to, tl.sum(d * pooled, 0))
                    tl.store(to + 1, tl.sum(d, 0))
            tl.store(dg + at + ch, back / pixels, mask=wanted)


@triton.jit
def _sum_over_images(a, b, count, length, i, PARTS: tl.constexpr):
    """sum_k a[k, i] b[k, i], b absent: ones; in float64, since what is summed may cancel."""
    sums = tl.full((PARTS, i.shape[0]), 0.0, tl.float64)
    for first in range(0, count, PARTS):
        k = first + tl.arange(0, PARTS)
        at = k.to(tl.int64)[:, None] * length + i[None, :]
        wanted = (k < count)[:, None] & (i < length)[None, :]
        t = tl.load(a + at, mask=wanted, other=0.0).to(tl.float64)
        if b is not None:
            t *= tl.load(b + at, mask=wanted, other=0.0).to(tl.float64)
        sums += t
    return tl.sum(sums, 0)


@triton.jit
def parameter_gradients(
    tap_sums, tap_count, conv, dilated, merge, d_conv, d_dilated, d_merge, d_spatial_bias,
    dt, g, gate_sums, gate_count, images, length, d_gate_weight, d_gate_bias,
    GATE: tl.constexpr, SPATIAL: tl.constexpr, PARTS: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The parameters' gradients from their shares. A program: all spatial ones, the first if there
    are any; or BC of the gate's."""
    program = tl.program_id(0)
    if SPATIAL:
        if program == 0:
            t = tl.arange(0, 32)
            near, far = t < 9, (t >= 9) & (t < 18)
            sums = _sum_over_images(tap_sums, None, tap_count, 32, t, PARTS)
            v0, v1 = tl.load(merge).to(tl.float64), tl.load(merge + 1).to(tl.float64)
            k0 = tl.load(conv + t, mask=near, other=0.0).to(tl.float64)
            k1 = tl.load(dilated + t - 9, mask=far, other=0.0).to(tl.float64)
            tl.store(d_conv + t, (v0 * sums).to(ACC), mask=near)
            tl.store(d_dilated + t - 9, (v1 * sums).to(ACC), mask=far)
            tl.store(d_merge, tl.sum(tl.where(near, k0 * sums, 0.0), 0).to(ACC))
            tl.store(d_merge + 1, tl.sum(tl.where(far, k1 * sums, 0.0), 0).to(ACC))
            if d_spatial_bias is not None:
                tl.store(d_spatial_bias, tl.sum(tl.where(t == 18, sums, 0.0), 0).to(ACC))
        program -= 1
    if d_gate_weight is not None:
        if program >= 0:
            i = program * BC + tl.arange(0, BC)
            if GATE == "affine":
                weight = _sum_over_images(dt, g, images, length, i, PARTS)
                bias = _sum_over_images(dt, None, images, length, i, PARTS)
                tl.store(d_gate_weight + i, weight.to(ACC), mask=i < length)
                tl.store(d_gate_bias + i, bias.to(ACC), mask=i < length)
            else:
                sums = _sum_over_images(gate_sums, None, gate_count, length, i, PARTS)
                if GATE == "eca":
                    tl.store(d_gate_weight + i, sums.to(ACC), mask=i < length)
                else:
                    tl.store(d_gate_weight + i, sums.to(ACC), mask=i == 0)
                    tl.store(d_gate_bias + i - 1, sums.to(ACC), mask=i == 1)
