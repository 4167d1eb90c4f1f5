"""The demo draws what it trained, and takes up what is there."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_grad_cam")
pytest.importorskip("skimage")
pytest.importorskip("psutil")

import torch
from PIL import Image

from benchmarks.paper import demo
from da_ops.detection.checkpoint import load_detector

TINY = dataclasses.replace(demo.SETTINGS, size=32, batch_size=2, steps=2, warmup=1)
FEW = {"train": 4, "test": 2}


def test_data_runs_precisions_and_picture(tmp_path, monkeypatch):
    looked_at = []

    def recorded(model, images, labels):
        looked_at.append(labels)
        return torch.rand(len(images), *images.shape[-2:])

    monkeypatch.setattr(demo, "grad_cam", recorded)
    monkeypatch.setattr(demo, "SHOWN", 2)
    path = demo.demo(tmp_path, TINY, FEW)
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.width > 400
    settings = []
    for name, attention in demo.NETWORKS.items():
        assert 0 <= json.loads((tmp_path / f"{name}.json").read_text())["map_11"] <= 1
        settings.append(load_detector(tmp_path / name).settings)
        assert settings[-1].attention == attention
    assert settings[0].differences(settings[1]) == ["attention 'none', not 'da'"]
    # The same classes for both, over the test images and then in the picture.
    each, drawn = looked_at[:4], looked_at[4:]
    assert each[:2] == each[2:] and drawn == [[label for (label,) in each[:2]]] * 2

    # Stopped in the second run: it is the only one that goes on.
    plain, da = (tmp_path / name / "last.pt" for name in demo.NETWORKS)
    before = plain.read_bytes()
    path.unlink()
    da.unlink()
    monkeypatch.setattr(demo, "draw", lambda tested, dataset, path: path.touch())
    assert demo.demo(tmp_path, TINY, FEW) == path
    assert path.exists() and da.exists() and plain.read_bytes() == before


def test_the_warmest_point_counts_where_it_is_in_a_box_of_the_class(monkeypatch):
    boxes = torch.tensor([[0.0, 0, 4, 4], [4, 4, 6, 7]])
    image, target = torch.rand(3, 8, 8), {"boxes": boxes, "labels": torch.tensor([2, 1])}
    for y, x, share in ((3, 3, 1.0), (4, 3, 0.0), (5, 5, 0.0)):
        heat = torch.zeros(1, 8, 8)
        heat[0, y, x] = 1
        monkeypatch.setattr(demo, "grad_cam", lambda *args, heat=heat: heat)
        assert demo.on_class(torch.nn.Identity(), [(image, target)]) == share
    monkeypatch.setattr(demo, "grad_cam", lambda *args: torch.zeros(1, 8, 8))
    assert demo.on_class(torch.nn.Identity(), [(image, target)]) == 0


def test_the_class_is_that_of_the_largest_object():
    boxes = torch.tensor([[0.0, 0, 9, 3], [2, 2, 8, 8], [1, 1, 2, 30]])
    assert demo.largest({"boxes": boxes, "labels": torch.tensor([4, 7, 5])}) == 7
