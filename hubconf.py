"""The networks for ``torch.hub.load(repository, "da_resnet50", weights="IMAGENET1K_V1")``.

They run on what the checkout has, where nothing is built: on a GPU the Triton kernels, on a CPU
plain PyTorch. For all kernels install da-ops, and take the same networks from ``da_ops.models``.
"""

from da_ops.models import da_resnet18, da_resnet34, da_resnet50, da_resnet101  # noqa: F401

dependencies = ["torch", "torchvision", "numpy"]
