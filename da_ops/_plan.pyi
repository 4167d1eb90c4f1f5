from typing import Any

def cpu(
    shape: tuple[int, ...],
    channels_last: bool,
    dtype: str,
    order: str,
    threads: int,
    limits: str = "",
    tensors: int = 2,
) -> dict[str, Any]: ...
def cuda(
    shape: tuple[int, ...],
    channels_last: bool,
    dtype: str,
    order: str,
    gate: str,
    sm: int,
    multiprocessors: int,
    wish: str = "",
    l2_bytes: int = 0,
    kernel_size: int = 3,
) -> dict[str, Any]: ...
def cuda_tail(
    shape: tuple[int, ...],
    channels_last: bool,
    dtype: str,
    order: str,
    gate: str,
    batch: bool,
    shortcut: bool,
    sm: int,
    multiprocessors: int = 0,
    wish: str = "",
    l2_bytes: int = 0,
    shortcut_norm: bool = False,
    shortcut_batch: bool = False,
    kernel_size: int = 3,
) -> dict[str, Any]: ...
def schedules() -> dict[str, dict[str, Any]]: ...
def proofs() -> dict[int, str]: ...
