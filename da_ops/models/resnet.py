"""torchvision's ResNets with attention in every residual block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torchvision.models import ResNet, get_model

from .fuse import check_fusible, fuse
from .insert import insert_attention
from .transformer import insert_transformer
from .weights import Weights, load_weights

_DOCUMENTATION = """torchvision's ``{name}`` with attention at the end of every residual branch.

    Args:
        attention: ``"da"``, ``"se"``, ``"sge"``, ``"eca"``, ``"fca"``, or None for torchvision's
            network.
        transformer: the stage, ``"layer1"`` to ``"layer4"``, that a spatial transformer comes in
            front of; see :func:`da_ops.models.insert_transformer`.
        order, gate, backend: of the DA layer; see :class:`da_ops.DAModule`.
        fused: compute the last norm, DA, the addition and the ReLU of each block as one operator,
            and each other norm with a ReLU, to the same result but for rounding; see
            :func:`da_ops.models.fuse`. With DA or None.
            Off by default: what a network gave before, it gives bit for bit.
        weights: torchvision's weights (an enum, or its name such as ``"IMAGENET1K_V1"``), the path
            of a checkpoint of torchvision, timm or this library (``.safetensors`` too), or a state
            dict. What torch.compile and DistributedDataParallel put before its keys is taken off,
            and logged. Of a script's checkpoint ``state_dict`` or ``model`` is taken; averaged
            weights beside it are to be passed as a state dict. Weights without attention leave the
            layers as they start, and a warning is logged; any other difference is an error that
            names the keys. So it is with a transformer.
        num_classes: outputs of ``fc``.
        kwargs: of :class:`torchvision.models.ResNet`, for instance ``norm_layer``.

    State-dict keys are torchvision's, and ``layer1.0.attention.*``, ``layer2.transformer.*`` and so
    on. From one seed, what networks have in common starts the same whichever attention they have.

    Returns:
        a network ``[N, 3, H, W] -> [N, num_classes]``.

    Raises:
        ValueError: an unknown or ill-matched option, or weights that do not fit.
        FileNotFoundError: ``weights`` is neither a name of torchvision's nor a file.
    """


_DEFAULTS = {"order": "spatial_channel", "gate": "affine", "backend": "auto"}


def _constructor(name: str) -> Callable[..., ResNet]:
    def resnet(
        attention: str | None = "da",
        *,
        transformer: str | None = None,
        order: str = _DEFAULTS["order"],
        gate: str = _DEFAULTS["gate"],
        backend: str = _DEFAULTS["backend"],
        fused: bool = False,
        weights: Weights = None,
        num_classes: int = 1000,
        **kwargs: Any,
    ) -> ResNet:
        options: dict[str, Any] = {"order": order, "gate": gate, "backend": backend}
        if attention != "da":
            _check_unused(options, attention, name)
            options = {}
        check_fusible(fused, attention, name)
        model: ResNet = get_model(name, weights=None, num_classes=num_classes, **kwargs)
        if attention is not None:
            insert_attention(model, attention, **options)
        if transformer is not None:
            insert_transformer(model, before=transformer)
        if fused:
            fuse(model)
        if weights is not None:
            load_weights(model, weights, name)
        return model

    resnet.__name__ = resnet.__qualname__ = name
    resnet.__doc__ = _DOCUMENTATION.format(name=name)
    return resnet


def _with(resnet: Callable[..., ResNet], attention: str) -> Callable[..., ResNet]:
    constructor = partial(resnet, attention)
    constructor.__name__ = f"{attention}_{resnet.__name__}"  # type: ignore[attr-defined]
    constructor.__doc__ = (
        f":func:`{resnet.__name__}` with attention={attention!r}: {resnet.__doc__}"
    )
    return constructor


def _check_unused(options: dict[str, str], attention: str | None, name: str) -> None:
    for option, value in options.items():
        if value != _DEFAULTS[option]:
            raise ValueError(
                f"{name}: {option} goes with attention='da', got {option}={value!r} with "
                f"attention={attention!r}; leave it out"
            )


resnet18 = _constructor("resnet18")
resnet34 = _constructor("resnet34")
resnet50 = _constructor("resnet50")
resnet101 = _constructor("resnet101")

da_resnet18 = _with(resnet18, "da")
da_resnet34 = _with(resnet34, "da")
da_resnet50 = _with(resnet50, "da")
da_resnet101 = _with(resnet101, "da")

se_resnet18 = _with(resnet18, "se")
se_resnet34 = _with(resnet34, "se")
se_resnet50 = _with(resnet50, "se")
se_resnet101 = _with(resnet101, "se")

sge_resnet18 = _with(resnet18, "sge")
sge_resnet34 = _with(resnet34, "sge")
sge_resnet50 = _with(resnet50, "sge")
sge_resnet101 = _with(resnet101, "sge")

eca_resnet18 = _with(resnet18, "eca")
eca_resnet34 = _with(resnet34, "eca")
eca_resnet50 = _with(resnet50, "eca")
eca_resnet101 = _with(resnet101, "eca")

fca_resnet18 = _with(resnet18, "fca")
fca_resnet34 = _with(resnet34, "fca")
fca_resnet50 = _with(resnet50, "fca")
fca_resnet101 = _with(resnet101, "fca")
