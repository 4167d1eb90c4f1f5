"""The tail of a residual block, ``relu(attention(norm(u)) + shortcut)``, as what is measured: in
plain PyTorch and fused, with attention and without, and what it should give.

The module holds the shortcut, a tensor as any, so that whoever measures a layer measures a tail: u
goes in, and there are gradients of u and of all its :func:`leaves`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import fused
from benchmarks.summary import PLAIN

if TYPE_CHECKING:
    from da_ops.accuracy import Exact


class LeftOut(Exception):
    """A contender that does not take part, and why."""


class Tail(nn.Module):
    """The tail in plain PyTorch, which adds and rectifies in place, as torchvision's blocks do: a
    third less time in inference than with new tensors."""

    def __init__(
        self, norm: nn.BatchNorm2d, attention: nn.Module | None, shortcut: torch.Tensor
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.shortcut = shortcut.requires_grad_()

    def branch(self, u: torch.Tensor) -> torch.Tensor:
        """What the shortcut is added to."""
        x = self.norm(u)
        return x if self.attention is None else self.attention(x)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        out = self.branch(u)
        out += self.shortcut
        return F.relu(out, inplace=True)

    def doubled(self) -> Tail:
        """A copy in float64."""
        norm, attention = copy.deepcopy((self.norm, self.attention))
        return Tail(norm, attention, self.shortcut.detach().double()).double()


class FusedTail(Tail):
    attention: Any

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        import da_ops

        return da_ops.residual_attention(u, self.shortcut, self.norm, self.attention)


def leaves(module: nn.Module) -> dict[str, torch.Tensor]:
    """What gets a gradient beside the input, by name."""
    shortcut = {"shortcut": module.shortcut} if isinstance(module, Tail) else {}
    return {**dict(module.named_parameters()), **shortcut}


def contenders(names: list[str]) -> list[str]:
    """Those with attention, and those without it, which plans do not matter to."""
    return [*names, *(PLAIN + name for name in names if not fused.parts(name)[1])]


def build(name: str, plain: Tail, u: torch.Tensor) -> Tail:
    """The contender of this name, less PLAIN, but for compilation: with weights of its own, the
    shortcut in the layout of u. Raises LeftOut where it would call its modules one by one."""
    shortcut = torch.empty_like(u).copy_(plain.shortcut.detach())
    attention: nn.Module | None
    norm, attention = copy.deepcopy((plain.norm, plain.attention))
    backend, _ = fused.parts(name)
    if not backend:
        return Tail(norm, attention, shortcut)
    if attention is not None:
        weights = attention.state_dict()
        attention = fused.build(name, norm.num_features, u.device, u.dtype)
        attention.load_state_dict(weights)
    if reason := unfused(norm, attention, backend, u.device.type):
        raise LeftOut(reason)
    made = FusedTail(norm, attention, shortcut)
    with fused.under(name):
        node = type(made.eval()(u).grad_fn).__name__
    if node != "ResidualFunctionBackward":
        raise RuntimeError(f"expected one operator, got several, the last of them {node}")
    return made


def unfused(norm: nn.Module, attention: nn.Module | None, backend: str, device: str) -> str | None:
    """Why this tail is not what a contender of this backend promises, if it is not."""
    from da_ops.backends.choice import CHOICE
    from da_ops.residual.fusible import unfused

    chosen = CHOICE.for_tails("auto", device).name
    if attention is None and backend != chosen:
        return f"without attention there is no choice of a backend, {chosen!r} is taken"
    return unfused(norm, attention, device)


def plains(attention: nn.Module, u: torch.Tensor, margin: float) -> dict[str, Tail]:
    """The tail with this attention, under "", and without, under PLAIN; the norm's weights and
    statistics are random. What is rectified is nowhere within `margin` of 0, where rounding would
    decide on which side it is."""
    norm: Any = nn.BatchNorm2d(u.shape[1], device=u.device, dtype=u.dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.5)
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        shortcut = torch.randn_like(u)
        found = {
            "": Tail(norm, attention, shortcut.clone()),
            PLAIN: Tail(copy.deepcopy(norm), None, shortcut.clone()),
        }
        wide = [tail.doubled() for tail in found.values()]
        branches = [tail.train(mode).branch(u.double()) for tail in wide for mode in (False, True)]
        for _ in range(100):
            sums = torch.stack([(branch + shortcut).abs().amin() for branch in branches])
            if sums.amin() >= margin:
                break
            for branch in branches:
                near = (branch + shortcut).abs() < margin
                shortcut[near] = torch.randn_like(shortcut[near])
        for tail in found.values():
            tail.shortcut.copy_(shortcut)
    return found


def reference(plain: Tail, u: torch.Tensor, dout: torch.Tensor) -> dict[str, Exact]:
    """The output in evaluation and in training, then all gradients and the running statistics
    after that step, in float64, on the values that the contenders get. The attention's gradients
    are sums in which terms may cancel, and come with the magnitudes of theirs."""
    from da_ops.accuracy import Exact, exact

    wide = plain.doubled()
    u = u.detach().double().requires_grad_()
    with torch.no_grad():
        found = {"inference": wide.eval()(u)}
    out = wide.train()(u)
    into = {"x": u, **leaves(wide)}
    gradients = torch.autograd.grad(out, list(into.values()), dout.double())
    found |= {"y": out.detach(), **dict(zip(into, gradients, strict=True))}
    found |= statistics(wide)
    results = {name: Exact(value, value.abs(), False) for name, value in found.items()}
    if plain.attention is not None:
        norm = wide.norm
        x = F.batch_norm(u, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        weights = dict(plain.attention.named_parameters())
        conv, dilated, merge, *gate = (weights[name] for name in ATTENTION)
        of_terms = exact(found["shortcut"], x, conv, dilated, merge, None, *gate)
        results |= {f"attention.{name}": of_terms[key] for name, key in ATTENTION.items()}
    return results


# The plain layer's weights, and their gradients as da_ops.accuracy calls them.
ATTENTION = {
    "conv.weight": "d_conv_weight",
    "dilated_conv.weight": "d_dilated_weight",
    "merge.weight": "d_merge_weight",
    "gate_weight": "d_gate_weight",
    "gate_bias": "d_gate_bias",
}


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a module's running statistics, by name."""
    return {n: b.clone() for n, b in module.named_buffers() if b.is_floating_point()}
