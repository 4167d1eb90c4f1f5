"""A release: its version, its workflows, what a package index shows of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from setuptools.errors import SetupError

import da_ops
from build_tools import project_page

ROOT = Path(__file__).resolve().parents[1]

# The page on a package index

REPOSITORY = "https://git.example/us/da"


@pytest.mark.parametrize(
    ("relative", "there"),
    [
        ("[page](docs/install.md)", "[page](R/blob/v1/docs/install.md)"),
        ("[part](./docs/a.md#part)", "[part](R/blob/v1/docs/a.md#part)"),
        ("[root](/LICENSE)", "[root](R/blob/v1/LICENSE)"),
        ('[a](a.md "a title"), [b](b)', '[a](R/blob/v1/a.md "a title"), [b](R/blob/v1/b)'),
        ("![chart](results/a.png)", "![chart](R/raw/v1/results/a.png)"),
        ("[![chart](a.SVG)](docs/)", "[![chart](R/raw/v1/a.SVG)](R/blob/v1/docs)"),
        ('<img width="9" src="a.svg?x=1">', '<img width="9" src="R/raw/v1/a.svg?x=1">'),
        ('<a href="x.md"><b src="b">', '<a href="R/blob/v1/x.md"><b src="R/blob/v1/b">'),
        ('<source srcset="b.svg">', '<source srcset="R/raw/v1/b.svg">'),
        ("[a][b]\n\n[b]: docs/b.md\n", "[a][b]\n\n[b]: R/blob/v1/docs/b.md\n"),
        ("[in](<a.md>)", "[in](<R/blob/v1/a.md>)"),
        ("`[code](a.md)` [link](b.md)", "`[code](a.md)` [link](R/blob/v1/b.md)"),
        ("```sh\nx[i](a)\n```\n[link](b)", "```sh\nx[i](a)\n```\n[link](R/blob/v1/b)"),
    ],
)
def test_relative_links_lead_into_the_repository(relative, there):
    there = there.replace("R/", f"{REPOSITORY}/")
    assert project_page.absolute(relative, REPOSITORY, "v1") == there
    assert project_page.absolute(there, REPOSITORY, "v1") == there


@pytest.mark.parametrize(
    "text", ["[a](#part)", "[a](https://x.example/y.md)", "<a href='x'>", "[a](mailto:x@y.example)"]
)
def test_other_links_stay(text):
    assert project_page.absolute(text, REPOSITORY, "v1") == text


@pytest.mark.parametrize("written", ["", "/", ".git", ".git/"])
def test_the_address_is_taken_as_it_is_written(written):
    shown = project_page.fields({"DA_OPS_REPOSITORY": REPOSITORY + written})
    assert shown["project_urls"]["Repository"] == REPOSITORY


@pytest.mark.parametrize("wrong", ["us/da", "git@git.example:us/da", "https://git.example"])
def test_what_is_no_address_is_refused(wrong):
    with pytest.raises(SetupError, match=f"DA_OPS_REPOSITORY: expected .* got '{wrong}'"):
        project_page.fields({"DA_OPS_REPOSITORY": wrong})


# Releases


def test_the_version_is_the_same_everywhere():
    """The release's date, too."""
    titles = re.findall(r"^## \[(.+)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert titles[0] == ("Unreleased", "")
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert titles[1] == (da_ops.__version__, str(cite["date-released"]))
    assert cite["version"] == da_ops.__version__


def test_workflows_run_on_the_pythons_that_are_promised():
    pyproject = (ROOT / "pyproject.toml").read_text()
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject)

    def jobs(name):
        return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"]

    tested = jobs("ci.yml")["test"]["strategy"]["matrix"]["python"]
    assert tested == [promised[0], promised[-1]]
    built = jobs("wheels.yml")["build"]["strategy"]["matrix"]["python"]
    assert built == promised


def test_who_reports_a_fault_is_asked_for_info():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (field,) = [field for field in form["body"] if field["id"] == "info"]
    assert "`python -m da_ops info`" in field["attributes"]["label"]
    assert field["validations"]["required"]
