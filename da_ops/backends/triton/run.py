"""How a kernel is started, and what is said where that fails."""

from __future__ import annotations

import os
from typing import Any

import torch

# Triton reads this variable alike when it is imported: kernels then run in Python, on any tensor.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "t", "true", "on")


class TritonFailed(RuntimeError):
    """Triton cannot compile, load or start a kernel here."""


def run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Start a kernel in so many programs.

    Raises:
        TritonFailed: with the reason in one line.
    """
    try:
        kernel[(programs,)](*arguments, enable_fp_fusion=True, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, an assembler or a driver may raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = f"{type(error).__name__}: {' '.join(lines)[:300]}"
        raise TritonFailed(f"Triton's kernel {kernel.__name__!r} does not run: {what}") from error
