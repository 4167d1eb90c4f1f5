"""The networks that are measured: a ResNet with a layer in every residual block, one training step
of it, and its inference."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from benchmarks import fused, measure, rivals
from benchmarks.cases import LAYOUTS
from benchmarks.summary import FUSED, TAIL, WHOLE

AMP = {"none": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A small start of each residual branch, as is common, and a modest rate: training amplifies how
# differently variants round, and these keep that slow.
BRANCH_GAIN, RATE = 0.2, 2e-3

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def blocks(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each residual block and the name of its branch's last batch norm."""
    found = []
    for module in network.modules():
        names = [name for name in ("bn3", "bn2") if hasattr(module, name)]
        if names and hasattr(module, "downsample"):
            found.append((module, names[0]))
    return found


def with_attention(
    plain: nn.Module, make: Callable[[int], nn.Module]
) -> tuple[nn.Module, list[nn.Module]]:
    """A copy of the network with `make(channels)` after each branch's last batch norm."""
    network = copy.deepcopy(plain)
    layers = []
    for block, name in blocks(network):
        norm = getattr(block, name)
        layer = make(norm.num_features)
        setattr(block, name, nn.Sequential(norm, layer))
        layers.append(layer)
    return network, layers


def build(variants: list[str], name: str, classes: int) -> dict[str, nn.Module]:
    """The networks by variant, all with the same weights."""
    import torchvision

    torch.manual_seed(0)
    plain = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    for block, norm in blocks(plain):
        nn.init.constant_(getattr(block, norm).weight, BRANCH_GAIN)
    networks = {}
    weights = with_attention(plain, rivals.PlainDA)[0].state_dict()
    for variant in variants:
        inner = variant.removeprefix(WHOLE)
        if variant.startswith(TAIL):
            networks[variant] = with_tails(plain, variant.removeprefix(TAIL), weights)
            continue
        if inner == "plain":
            networks[variant] = copy.deepcopy(plain)
            continue
        if inner.startswith(FUSED):
            networks[variant], _ = with_attention(plain, partial(fused.build, inner))
        else:
            networks[variant], layers = with_attention(plain, rivals.PlainDA)
            for layer in layers if variant.startswith("compile") else ():
                rivals.compiled(layer, variant)
        networks[variant].load_state_dict(weights)
    for variant, network in networks.items():
        if variant.startswith(WHOLE):
            network.compile(dynamic=False)
    return networks


def with_tails(plain: nn.Module, inner: str, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of the network with fused tails, as users get it: without attention ("plain"), or with
    the layer of a fused contender and the weights of a network :func:`with_attention`."""
    from da_ops import models

    network = copy.deepcopy(plain)
    if inner == "plain":
        return models.fuse(network)
    models.insert_attention(network, "da", fused=True, backend=fused.parts(inner)[0])

    def inserted(name: str) -> str:
        return re.sub(r"bn[23]\.1\.", "attention.", re.sub(r"(bn[23])\.0\.", r"\1.", name))

    network.load_state_dict({inserted(name): weight for name, weight in weights.items()})
    return network


def unfused(network: nn.Module) -> str | None:
    """Why the tails of this network on its device are not fused, if some are not."""
    from da_ops import models

    return next((f"{n}: {why}" for n, why in models.unfused_blocks(network).items()), None)


class Trainer:
    """One network; each call of `sample` is a number of timed training steps, each call of `infer`
    a number of timed inferences."""

    def __init__(
        self, network: nn.Module, batches: Batches, layout: str, device: str, amp: str = "none"
    ) -> None:
        self.network = network.to(device).to(memory_format=LAYOUTS[layout]).train()
        # A call for all parameters together, which on a GPU is PyTorch's default: a loop over them
        # in Python would take longer than what is compared.
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=RATE, momentum=0.9, fused=True if device == "cpu" else None
        )
        moved = [
            (x.to(device).contiguous(memory_format=LAYOUTS[layout]), k.to(device))
            for x, k in batches
        ]
        self.data = moved
        self.batches = itertools.cycle(moved)
        self.images = moved[0][0]  # of inference
        self.watch = measure.Stopwatch(device)
        self.device = device
        self.amp = AMP[amp]
        # Gradients of float16 would underflow.
        self.scaler = torch.amp.GradScaler(device, enabled=self.amp == torch.float16)
        self.losses: list[torch.Tensor] = []

    def autocast(self, cache: bool = True) -> torch.autocast:
        """`cache`: weights that were cast are kept until its end."""
        on = self.amp is not None
        return torch.autocast(self.device, self.amp, enabled=on, cache_enabled=cache)

    def loss(self, x: torch.Tensor, labels: torch.Tensor, cache: bool = True) -> torch.Tensor:
        with self.autocast(cache):
            return nn.functional.cross_entropy(self.network(x), labels)

    def forward(self) -> torch.Tensor:
        loss = self.loss(*next(self.batches))
        self.losses.append(loss.detach())
        return loss

    def update(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def sample(self, steps: int) -> Sequence[float]:
        self.network.train()
        marks = [self.watch.mark()]
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.update(self.forward())
            marks.append(self.watch.mark())
        return [sum(self.watch.seconds(marks))]

    def infer(self, calls: int) -> Sequence[float]:
        self.network.eval()
        marks = [self.watch.mark()]
        with torch.no_grad(), self.autocast():
            for _ in range(calls):
                self.network(self.images)
                marks.append(self.watch.mark())
        return [sum(self.watch.seconds(marks))]

    def memory(self) -> dict[str, int]:
        """Bytes of a step beyond weights and optimizer state; see measure.memory."""
        self.network.train()
        self.optimizer.zero_grad()
        return measure.memory(self.forward, self.update, self.device)


def activations(network: nn.Module, x: torch.Tensor) -> tuple[int, int, int]:
    """Over the places of the attention layers: how many, the bytes of their inputs, and those of
    the small maps, a value for each pixel and each channel."""
    sizes: list[int] = []
    maps: list[int] = []

    def note(module: nn.Module, given: object, result: torch.Tensor) -> None:
        _, channels, height, width = result.shape
        sizes.append(result.nbytes)
        maps.append(result.nbytes // channels + result.nbytes // (height * width))

    hooks = [getattr(block, name).register_forward_hook(note) for block, name in blocks(network)]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return len(sizes), sum(sizes), sum(maps)
