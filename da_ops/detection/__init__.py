"""Object detection on PASCAL VOC, and on generated data in its format."""

try:
    import torchvision as _torchvision  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f'da_ops.detection needs torchvision ({error}): pip install "da-ops[detection]"'
    ) from error
