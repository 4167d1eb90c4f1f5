"""The CUDA architectures that `make` builds for: those of this machine's GPUs alone, which takes a
fraction of the time; where there is none, one, so that the sources are known to compile.

python -m build_tools.here    prints them as TORCH_CUDA_ARCH_LIST has them; nothing for all
"""

from __future__ import annotations

from collections.abc import Iterable

from .cuda import ARCHITECTURES

WITHOUT_GPU = "9.0"


def architectures(capabilities: Iterable[tuple[int, int]]) -> str:
    """For GPUs of these compute capabilities. Binaries run on their own major version from their
    minor one on; a GPU that none of ours is for needs all of them, for the PTX among them."""
    found = set()
    for major, minor in capabilities:
        ours = [a for a in ARCHITECTURES if a.split(".")[0] == str(major)]
        fitting = [a for a in ours if int(a.split(".")[1]) <= minor]
        if not fitting:
            return ""
        found.add(fitting[-1])
    return " ".join(sorted(found, key=ARCHITECTURES.index)) or WITHOUT_GPU


if __name__ == "__main__":
    try:
        import torch

        gpus = range(torch.cuda.device_count() if torch.version.cuda else 0)
        print(architectures([torch.cuda.get_device_capability(i) for i in gpus]))
    except ImportError:  # the build says so
        print(WITHOUT_GPU)
