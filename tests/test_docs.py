"""README and docs/: links lead somewhere, snippets run, pictures and figures are today's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import da_ops
from benchmarks import pages
from da_ops import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


SNIPPETS = [
    pytest.param(text, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, text in enumerate(blocks(page, "python"))
]
COMMANDS = sorted(
    {
        found
        for page in PAGES
        for found in re.findall(
            r"(?:^|`)(python -m [^`#\n]+)", page.read_text("utf-8"), re.MULTILINE
        )
    }
)


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings as hosts of repositories name them."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet):
    for library in ("timm", "torchvision"):
        if library in snippet or "da_ops.models" in snippet:
            pytest.importorskip(library)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(snippet, "snippet", "exec"), names)
    x = torch.randn(2, 8, 6, 6)
    if block := names.get("Block"):
        block(8)(x).sum().backward()
    if plain := names.get("DA"):
        layer, plain = da_ops.DAModule(8), plain(8)
        layer.load_state_dict(plain.state_dict())
        torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    """Their modules, and of da_ops the subcommand; what they do is tested where they are."""
    module, *after = command.split()[2:]
    path = ROOT.joinpath(*module.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()
    if module == "da_ops" and after:
        with pytest.raises(SystemExit) as done:
            cli.main([after[0], "--help"])
        assert done.value.code == 0


def test_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for page in PAGES:
        text = page.read_text("utf-8")
        for target in re.findall(r"^(?:\| )?`?make ([a-z-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}\b.*:", makefile, re.MULTILINE), target
        for extras in re.findall(r"pip install '(?:\.|da-ops)\[([\w,-]+)\]'", text):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_pictures_and_the_worked_plan_are_todays(monkeypatch):
    pytest.importorskip("da_ops._plan")
    monkeypatch.syspath_prepend(str(ROOT))
    from docs.__main__ import main

    assert main(["--check"]) == 0


def test_costs_of_a_network_are_those_of_the_results():
    """A percentage a layout, of what has the layer."""
    results = {
        "network": {"name": "resnet18"},
        "layouts": [
            {
                "layout": layout,
                "results": [
                    {"variant": "plain"},
                    {"variant": "tail:plain", "cost_percent": -5.0},
                    {"variant": "eager", "cost_percent": 12.25 + index},
                    {"variant": "tail:da_ops:cpu", "cost_percent": -0.5},
                ],
            }
            for index, layout in enumerate(("contiguous", "channels_last"))
        ],
    }
    assert pages.network_line(results) == (
        "A training step of resnet18 with the layer, contiguous and channels_last: "
        "eager +12.2% and +13.2%, fused tail (cpu) -0.5% and -0.5%."
    )


def test_means_of_a_page_are_those_of_the_results():
    """A line a rival, with the mean over the stages that the results have."""
    kind = {"regime": "warm", "launch": "stream", "fused": "da_ops:cpu"}
    stage, tail = (
        {**kind, "role": role, "threads": n} for role, n in (("stage", None), ("tail", 2))
    )
    means = [
        {**stage, "rival": "eager", "part": "inference", "same": 2.0},
        {**stage, "rival": "eager", "part": "training", "same": 4.0},
        {**tail, "rival": "plain:eager", "part": "training", "same": 1.5},
        {**tail, "rival": "plain:eager", "part": "training", "same": 9.0, "threads": 1},
        {**stage, "rival": "eager", "part": "inference", "same": 9.0, "regime": "cold"},
        {**stage, "rival": "eager", "part": "inference", "same": 9.0, "fused": "plain:da_ops:cpu"},
    ]
    rows = {name: cells for name, *cells in pages.mean_rows({"summary": {"means": means}})}
    assert rows["layer against eager"] == ["2.00x", "4.00x"]
    assert rows["layer against torch.compile"] == ["-", "-"]
    assert rows["tail against eager without the layer"] == ["-", "1.50x"]
