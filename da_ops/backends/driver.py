"""The NVIDIA driver, of which PyTorch does not tell."""

from __future__ import annotations

import ctypes
from pathlib import Path


def newest_cuda() -> int | None:
    """The newest CUDA that the driver knows, as CUDA counts: 13000 for 13.0. None without one."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def version() -> str | None:
    """The version of its kernel module, such as "580.95.05"; None where there is none."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip() or None
    except OSError:
        return None
