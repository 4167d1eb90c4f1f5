"""DA attention for convolutional networks: a spatial and a channel mask in fused kernels."""

from . import reference
from ._version import __version__
from .backends import backends
from .explain import explain
from .function import DAFunction
from .functional import da_attention
from .module import DAModule
from .residual.functional import residual_attention
from .residual.module import DAResidual
from .tuning import tune

__all__ = [
    "DAFunction",
    "DAModule",
    "DAResidual",
    "__version__",
    "backends",
    "da_attention",
    "explain",
    "reference",
    "residual_attention",
    "tune",
]
