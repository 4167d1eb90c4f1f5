"""What results files say of the machine and of the sources that were measured."""

from __future__ import annotations

import pytest

pytest.importorskip("psutil")

from benchmarks import environment

CPUINFO = """\
processor\t: 0
vendor_id\t: a vendor
cpu family\t: {family}
model\t\t: {model}
model name\t: {name}
stepping\t: 1

processor\t: 1
cpu family\t: 0
model\t\t: 0
model name\t: another
"""


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


@pytest.mark.parametrize(
    ("family", "model", "name", "cleaned", "numbers"),
    [
        (26, 2, "AMD EPYC", "AMD EPYC", {"cpu_family": 26, "cpu_model": 2}),
        (25, 1, "AMD EPYC 7763 64-Core Processor", "AMD EPYC 7763", {}),
        (6, 143, "Intel(R) Xeon(R) Processor @ 2.00GHz", "Intel Xeon Processor",
         {"cpu_family": 6, "cpu_model": 143}),
        (6, 106, "Intel(R) Xeon(R) 8370C CPU @ 2.80GHz", "Intel Xeon 8370C", {}),
    ],
)  # fmt: skip
def test_a_name_without_a_number_has_family_and_model_beside_it(
    tmp_path, monkeypatch, family, model, name, cleaned, numbers
):
    info = tmp_path / "cpuinfo"
    info.write_text(CPUINFO.format(family=family, model=model, name=name))
    monkeypatch.setattr(environment, "CPUINFO", info)
    record = environment.device_record("cpu")
    assert record["name"] == cleaned
    assert {key: record[key] for key in ("cpu_family", "cpu_model") if key in record} == numbers


@pytest.mark.parametrize("text", [None, "", "model\t\t: unknown\nHardware\t: a board\n"])
def test_a_processor_that_tells_nothing_has_a_name(tmp_path, monkeypatch, text):
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    monkeypatch.setattr(environment, "CPUINFO", info)
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    monkeypatch.setattr(environment.platform, "machine", lambda: "riscv")
    assert environment.cpu_model() == "riscv"
    assert environment.cpu_numbers() == {}
