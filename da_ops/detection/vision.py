"""The parts of torchvision that detection uses; where it is missing, the error says how to get it.

The rest of this package takes them from here, and before it imports ``da_ops.models``, whose own
error names a smaller extra. ``settings`` takes nothing, so that the command line starts without
torchvision.
"""

try:
    from torchvision import tv_tensors
    from torchvision.models import get_model_weights
    from torchvision.models.detection.ssd import SSD
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F
except ModuleNotFoundError as error:
    raise ImportError(
        f'da_ops.detection needs torchvision ({error}): pip install "da-ops[detection]"'
    ) from error

__all__ = ["SSD", "F", "get_model_weights", "tv_tensors", "v2"]
