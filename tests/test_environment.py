"""What results files say of the machine and of the sources that were measured."""

from __future__ import annotations

import pytest

pytest.importorskip("psutil")

from benchmarks import environment


def test_digest_follows_the_kernel_sources(tmp_path):
    names = ["csrc/ops.cpp", "csrc/cpu/forward.cpp", "csrc/cuda/portable/masks.cuh"]
    backends = ("__init__.py", "base.py", "cpu.py", "cuda.py", "triton/passes.py")
    names += ["da_ops/function.py", "da_ops/residual/function.py"]
    names += [f"da_ops/backends/{name}" for name in backends]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")

    def digests():
        return {device: environment.digest(device, tmp_path) for device in ("cpu", "cuda")}

    first = digests()
    (tmp_path / "da_ops/backends/__pycache__").mkdir()
    (tmp_path / "da_ops/backends/__pycache__/cpu.pyc").write_text("cache")
    (tmp_path / "da_ops/models.py").write_text("not a kernel")
    assert digests() == first
    moved = {}
    for name in names:
        (tmp_path / name).write_text("two")
        moved[name] = {device for device, value in digests().items() if value != first[device]}
        (tmp_path / name).write_text("one")
    for name, devices in moved.items():
        only = "cpu" if "cpu" in name else "cuda" if "cuda" in name or "triton" in name else None
        assert devices == ({only} if only else {"cpu", "cuda"}), name


def test_slugs():
    assert environment.slug("NVIDIA H200 (PCIe)") == "nvidia-h200-pcie"
