"""The NVIDIA driver, of which PyTorch does not tell."""

from __future__ import annotations

import ctypes


def newest_cuda() -> int | None:
    """The newest CUDA that the driver knows, as CUDA counts: 13000 for 13.0. None without one."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None
