"""Results files by device, and whether they count."""

from __future__ import annotations

from pathlib import Path

from benchmarks import environment, tables
from benchmarks.environment import BenchmarkError
from benchmarks.tables import Results

KINDS = ("op", "network")
ABLATION = "ablation"  # which benchmarks.paper reads


def load(path: Path) -> Results:
    """One results file."""
    return environment.read_results(path, *KINDS, "gpu")


def load_folder(folder: Path) -> dict[str, dict[str, Results]]:
    """All results of a folder by device: {"amd-epyc": {"op": ..., "network": ...}}. Those of `make
    gpu` are {"nvidia-h200": {"gpu": ..., "op": ..., "network": ...}}. What a file holds is what it
    says, however it is named."""
    found: dict[str, dict[str, Results]] = {}
    gpus: dict[str, dict[str, Results]] = {}
    for path in sorted(folder.glob("*.json")):
        results = environment.read_results(path, *KINDS, "gpu", ABLATION)
        kind = results["kind"]
        if kind == ABLATION:
            continue
        if kind == "gpu":
            parts = {part: results[part] for part in KINDS if part in results}
            gpus[path.stem] = {"gpu": results, **parts}
        else:
            found.setdefault(path.stem.removesuffix(f"-{kind}"), {})[kind] = results
    for device, together in found.items():
        found[device] = {kind: together[kind] for kind in KINDS if kind in together}
    return dict(sorted({**found, **gpus}.items()))


def counted(folder: Path) -> dict[str, dict[str, Results]]:
    """Those of a folder that count: times of a GPU if its results were also tested, and all went
    well."""
    return {
        device: together
        for device, together in load_folder(folder).items()
        if not any(r["device"]["kind"] == "cuda" for r in together.values())
        or ("gpu" in together and not faults(together["gpu"]))
    }


def faults(gpu: Results) -> list[str]:
    """Why the results of a GPU do not count, if they do not. A part that was cut counts as what it
    did until then."""
    parts = {part["name"]: part for part in gpu.get("parts", [])}
    found = []
    for name in environment.GPU_PARTS:
        part = parts.get(name)
        if part is None:
            found.append(f"part {name!r} was not run")
        elif part["status"] == "skipped":
            found.append(f"part {name!r} was skipped" + (f" ({n})" if (n := part["note"]) else ""))
        elif part["status"] == "failed" or part["failed"]:
            found.append(f"part {name!r} failed")
        elif not part["passed"]:
            found.append(f"part {name!r} was cut before anything passed")
    found += [f"no results of {kind!r}" for kind in KINDS if kind not in gpu]
    return found + ([doubt] if (doubt := tables.stale(gpu)) else [])


def doubts(results: Results) -> list[str]:
    """Reasons to doubt these results."""
    return [doubt for doubt in (tables.stale(results), tables.disturbed(results)) if doubt]


def named(folder: Path, wanted: str) -> dict[str, Results]:
    """The results of GPUs of this name, or with it in theirs, or the file of this name."""
    path = Path(wanted)
    if path.suffix == ".json":
        results = load(path)
        if results["kind"] != "gpu":
            raise BenchmarkError(
                f"{path}: expected results of make gpu, got those of {results['kind']!r}"
            )
        return {shown(path): results}
    devices = load_folder(folder)
    gpus = {name: together["gpu"] for name, together in devices.items() if "gpu" in together}
    exact = {name: gpu for name, gpu in gpus.items() if name == environment.slug(wanted)}
    found = exact or {n: gpu for n, gpu in gpus.items() if environment.slug(wanted) in n}
    if not found:
        there = f"there are those of {', '.join(gpus)}" if gpus else "there are those of no GPU"
        raise BenchmarkError(
            f"{shown(folder)} has no results of a GPU named {wanted!r}, {there}: run make gpu on"
            " that machine, or name a results file of it"
        )
    return found


def newest(folders: list[Path]) -> Path:
    """The folder with the latest results."""
    dates = {
        folder: max(
            (r["date"] for t in load_folder(folder).values() for r in t.values()), default=""
        )
        for folder in folders
    }
    return max(folders, key=lambda folder: dates[folder])


def shown(path: Path) -> str:
    """A path as short as it can be named from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
