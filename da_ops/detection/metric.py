"""Average precision as PASCAL VOC defines it (Everingham et al., 2010; devkit ``VOCevaldet.m``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, np.ndarray]


class VOCEvaluator:
    """Average precision (AP) of each class, and its mean (mAP), over images given bit by bit.

    In each image and class, detections in order of falling score each take the object that they
    overlap most, found at an intersection over union of ``iou_threshold`` or more. The first one
    to take an object is right, a second one wrong, and one on a difficult object does not count,
    no more than the object does. Of equal scores in different images the wrong ones come first, so
    that the order of the images makes no difference.

    Args:
        classes: names of the classes, each once, without the background; label 1 is the first.
        iou_threshold: least overlap.
        plus_one: add 1 to widths and heights, for boxes of which x2 and y2 are the last pixels
            inside, as in VOC's files. Boxes of this library end at the edges of pixels, and without
            it already have the overlaps that the devkit computes from VOC's.
    """

    def __init__(
        self, classes: Sequence[str], *, iou_threshold: float = 0.5, plus_one: bool = False
    ) -> None:
        if not 0 < iou_threshold <= 1:
            raise ValueError(f"iou_threshold must be above 0 and at most 1, got {iou_threshold}")
        self.classes = tuple(classes)
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: expected each name once, got {list(self.classes)}")
        self.iou_threshold = iou_threshold
        self.plus_one = plus_one
        self._positives = np.zeros(len(self.classes) + 1, np.int64)  # by label
        # Scores, labels and verdicts of the detections that count, image by image.
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._right: list[np.ndarray] = []

    def update(
        self,
        predictions: Sequence[Mapping[str, Tensor]],
        targets: Sequence[Mapping[str, Any]],
    ) -> None:
        """Add images.

        Args:
            predictions: for each image ``boxes`` [D, 4], ``scores`` [D] and ``labels`` [D].
            targets: for each image ``boxes`` [K, 4], ``labels`` [K] and ``difficult`` [K]; without
                the last, as torchvision's targets are, none is difficult. Boxes are x1 y1 x2 y2 in
                the units of the predictions.

        Raises:
            ValueError: lengths that do not match, an unknown label or one that is no integer, or a
                score that is no number.
        """
        if len(predictions) != len(targets):
            raise ValueError(
                f"expected a target for each prediction, got {len(predictions)} predictions and "
                f"{len(targets)} targets"
            )
        for prediction, target in zip(predictions, targets):
            if "difficult" not in target:
                none = torch.zeros(len(target["labels"]), dtype=torch.bool)
                target = {**target, "difficult": none}
            self._add(
                *self._arrays(prediction, "prediction", "scores", torch.float64),
                *self._arrays(target, "target", "difficult", torch.bool),
            )

    def compute(self) -> dict[str, Any]:
        """``map`` and ``map_11``, as fractions, and ``ap`` and ``ap_11`` by class name.

        ``_11`` is VOC2007's AP, the mean of the greatest precision at recalls from 0, .1 and so on
        to 1 on; the other is the area under the same curve. A class without an object that counts
        has None, and no part in the mean.

        Raises:
            ValueError: no class has an object that counts.
        """
        if not self._positives.any():
            raise ValueError(
                "expected objects that are not difficult, got none in all images: is this the "
                "right split, and does it have annotations?"
            )
        state = self.state()
        found: dict[str, dict[str, float | None]] = {"ap": {}, "ap_11": {}}
        for label, name in enumerate(self.classes, 1):
            own = state["labels"] == label
            area, eleven = _average_precision(
                state["scores"][own], state["right"][own], int(self._positives[label])
            )
            found["ap"][name], found["ap_11"][name] = area, eleven
        means = {
            key.replace("ap", "map"): float(np.mean([ap for ap in aps.values() if ap is not None]))
            for key, aps in found.items()
        }
        return {**means, **found}

    def state(self) -> State:
        """All that was added, as arrays, for :meth:`merge` in another process."""
        return {
            "positives": self._positives.copy(),
            "scores": np.concatenate([np.empty(0), *self._scores]),
            "labels": np.concatenate([np.empty(0, np.int64), *self._labels]),
            "right": np.concatenate([np.empty(0, bool), *self._right]),
        }

    def merge(self, states: Sequence[State]) -> None:
        """Add the images of other evaluators of the same classes.

        Raises:
            ValueError: a state of another number of classes.
        """
        for state in states:
            if state["positives"].shape != self._positives.shape:
                raise ValueError(
                    f"expected states of {len(self.classes)} classes, got one of "
                    f"{len(state['positives']) - 1}"
                )
            self._positives += state["positives"]
            self._scores.append(state["scores"])
            self._labels.append(state["labels"])
            self._right.append(state["right"])

    def _add(
        self,
        boxes: np.ndarray,
        labels: np.ndarray,
        scores: np.ndarray,
        true_boxes: np.ndarray,
        true_labels: np.ndarray,
        difficult: np.ndarray,
    ) -> None:
        self._positives += np.bincount(true_labels[~difficult], minlength=len(self._positives))
        order = np.argsort(-scores, kind="stable")
        boxes, labels, scores = boxes[order], labels[order], scores[order]
        right = np.zeros(len(boxes), bool)
        counts = np.ones(len(boxes), bool)
        if len(true_boxes):
            overlap = _iou(boxes, true_boxes, self.plus_one)
            overlap[labels[:, None] != true_labels] = -1
            best = overlap.argmax(1)
            taken = np.flatnonzero(overlap.max(1) >= self.iou_threshold)
            _, first = np.unique(best[taken], return_index=True)
            right[taken[first]] = True
            counts[taken] = ~difficult[best[taken]]
        self._scores.append(scores[counts])
        self._labels.append(labels[counts])
        self._right.append(right[counts])

    def _arrays(
        self, found: Mapping[str, Any], what: str, third: str, dtype: torch.dtype
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes, labels and a third thing, checked."""
        if found["labels"].is_floating_point():
            raise ValueError(
                f"a {what}: expected labels of an integer dtype, got {found['labels'].dtype};"
                " convert them with labels.long()"
            )
        # torch converts: NumPy has no bfloat16.
        boxes: np.ndarray = found["boxes"].detach().cpu().to(torch.float64).numpy()
        labels: np.ndarray = found["labels"].cpu().to(torch.int64).numpy()
        other: np.ndarray = found[third].detach().cpu().to(dtype).numpy()
        if boxes.shape != (len(labels), 4) or other.shape != labels.shape or labels.ndim != 1:
            raise ValueError(
                f"a {what}: expected boxes [K, 4], labels [K] and {third} [K], got "
                f"{list(boxes.shape)}, {list(labels.shape)} and {list(other.shape)}"
            )
        if len(labels) and not 1 <= labels.min() <= labels.max() <= len(self.classes):
            raise ValueError(
                f"a {what}: expected labels from 1 to {len(self.classes)}, got "
                f"{labels.min()} to {labels.max()}: are these the classes of this model and data?"
            )
        if np.isnan(boxes).any() or np.isnan(other).any():
            raise ValueError(f"a {what}: expected numbers, got NaN; did training diverge?")
        return boxes, labels, other


def _iou(a: np.ndarray, b: np.ndarray, plus_one: bool) -> np.ndarray:
    """Intersection over union, [N, M]; 0 where both are empty."""
    extra = 1.0 if plus_one else 0.0
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low + extra, 0, None).prod(2)
    area_a, area_b = ((box[:, 2:] - box[:, :2] + extra).prod(1) for box in (a, b))
    either = area_a[:, None] + area_b - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)


def _average_precision(
    scores: np.ndarray, right: np.ndarray, positives: int
) -> tuple[float | None, float | None]:
    """The area under precision over recall, and its mean at eleven recalls."""
    if positives == 0:
        return None, None
    right = right[np.lexsort((right, -scores))]
    found = np.cumsum(right)
    precision = found / np.arange(1, len(found) + 1)
    # The greatest precision at this recall or above.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    area = envelope[right].sum() / positives
    # In whole numbers: .3 is not quite 3 x .1.
    reached = [envelope[10 * found >= tenths * positives][:1] for tenths in range(11)]
    return float(area), float(np.concatenate(reached).sum() / 11)
