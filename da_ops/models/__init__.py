"""ResNets with the DA layer, or with those that its paper compares it with.

``resnet50(attention="da")`` builds one; ``insert_attention`` puts layers into an existing network;
``insert_transformer`` a spatial transformer in front of a stage; ``fuse`` makes one operator of the
tail of each residual block.
"""

try:
    import torchvision as _torchvision  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f'da_ops.models needs torchvision ({error}): pip install "da-ops[models]"'
    ) from error

from .attention import ATTENTIONS, ECAModule, FCAModule, SEModule, SGEModule
from .fuse import fuse, unfused_blocks
from .insert import insert_attention
from .resnet import (
    da_resnet18,
    da_resnet34,
    da_resnet50,
    da_resnet101,
    eca_resnet18,
    eca_resnet34,
    eca_resnet50,
    eca_resnet101,
    fca_resnet18,
    fca_resnet34,
    fca_resnet50,
    fca_resnet101,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    se_resnet18,
    se_resnet34,
    se_resnet50,
    se_resnet101,
    sge_resnet18,
    sge_resnet34,
    sge_resnet50,
    sge_resnet101,
)
from .transformer import STNModule, insert_transformer

__all__ = [
    "ATTENTIONS",
    "ECAModule",
    "FCAModule",
    "SEModule",
    "SGEModule",
    "STNModule",
    "da_resnet18",
    "da_resnet34",
    "da_resnet50",
    "da_resnet101",
    "eca_resnet18",
    "eca_resnet34",
    "eca_resnet50",
    "eca_resnet101",
    "fca_resnet18",
    "fca_resnet34",
    "fca_resnet50",
    "fca_resnet101",
    "fuse",
    "insert_attention",
    "insert_transformer",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "se_resnet18",
    "se_resnet34",
    "se_resnet50",
    "se_resnet101",
    "sge_resnet18",
    "sge_resnet34",
    "sge_resnet50",
    "sge_resnet101",
    "unfused_blocks",
]
