"""What Triton's interpreter lacks in the oldest version that is promised."""

from __future__ import annotations

from typing import Any

import triton


def mend() -> None:
    """Triton 3.6 makes a loop's bounds from arrays of one element, which NumPy 2.4 refuses."""
    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended
