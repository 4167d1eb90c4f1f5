"""Try the da_ops that is installed, as who installed a wheel would.

python -I build_tools/smoke.py VERSION [--without-cuda]

Fails unless it is that version, the CPU kernels agree with the formula, the planner answers, and
the CUDA library loads, if one was built; with --without-cuda, unless torch has no CUDA, and that is
what is said of the library.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

import torch

import da_ops
from da_ops import accuracy
from da_ops.cli import main

LOADED = (None, "torch finds no NVIDIA GPU")  # which is looked at once the library has loaded


def compare() -> None:
    """A forward and a backward pass of the layer on the CPU, beside the formula in float64."""
    layer = da_ops.DAModule(8, backend="cpu")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 8, 7, 9, requires_grad=True)
    dy = torch.randn_like(x)
    y = layer(x)
    y.backward(dy)
    parameters = {
        "conv_weight": layer.conv.weight,
        "dilated_weight": layer.dilated_conv.weight,
        "merge_weight": layer.merge.weight,
        "spatial_bias": None,
        "gate_weight": layer.gate_weight,
        "gate_bias": layer.gate_bias,
    }
    got = {"y": y, "dx": x.grad}
    got |= {f"d_{name}": p.grad for name, p in parameters.items() if p is not None}
    broken = accuracy.broken([accuracy.errors(got, accuracy.exact(dy, x, *parameters.values()))])
    check("the layer's results", not broken, broken)


def look(version: str, without_cuda: bool) -> None:
    """At what `info` tells."""
    print(told("info"))
    facts: dict[str, Any] = json.loads(told("info", "--json"))
    backends, built = facts["backends"], facts["build"]["cuda"]
    check("version", facts["versions"]["da_ops"] == version, facts["versions"]["da_ops"])
    check("CPU kernels", backends["cpu"] is None, backends["cpu"])
    check('"auto" on the CPU', facts["auto"]["cpu"]["backend"] == "cpu", facts["auto"]["cpu"])
    check("planner", facts["devices"]["cpu"]["instruction_set"] is not None, "missing")
    reason = backends["cuda"]
    if without_cuda:
        check("torch without CUDA", facts["versions"]["cuda"] is None, facts["versions"]["cuda"])
    if not built["built"]:
        check("CUDA kernels", built["reason"] in reason, reason)
    elif without_cuda:
        check("CUDA kernels", "torch was built without CUDA" in reason, reason)
    else:
        check("CUDA kernels", reason in LOADED, reason)


def told(*command: str) -> str:
    """The output of a da-ops command."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        status = main(list(command))
    check(" ".join(command), status == 0, f"status {status}")
    return text.getvalue()


def check(what: str, holds: bool, found: object) -> None:
    if not holds:
        raise SystemExit(f"smoke test: {what}: not as expected, found {found}")


if __name__ == "__main__":
    compare()
    look(sys.argv[1], "--without-cuda" in sys.argv)
