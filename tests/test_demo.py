"""The demo draws what it trained, and takes up what is there."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_grad_cam")
pytest.importorskip("skimage")
pytest.importorskip("psutil")

from PIL import Image

from benchmarks.paper import demo

TINY = dataclasses.replace(demo.SETTINGS, size=64, batch_size=2, steps=2, warmup=1)


def test_data_run_precision_and_picture(tmp_path):
    path = demo.demo(tmp_path, TINY, {"train": 4, "test": demo.SHOWN})
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert 0 <= json.loads((tmp_path / "precision.json").read_text())["map_11"] <= 1
    before = (tmp_path / "run" / "last.pt").read_bytes()
    path.unlink()
    assert demo.demo(tmp_path, TINY, {"train": 4, "test": demo.SHOWN}) == path
    assert path.exists() and (tmp_path / "run" / "last.pt").read_bytes() == before
