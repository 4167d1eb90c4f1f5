"""VOC's average precision, against cases worked by hand and a plain reading of the devkit."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from da_ops.detection.metric import VOCEvaluator

FAR = (500.0, 500.0, 510.0, 510.0)


def predictions(*rows):
    """Of (label, score, box) each."""
    return {
        "labels": torch.tensor([row[0] for row in rows], dtype=torch.int64),
        "scores": torch.tensor([row[1] for row in rows], dtype=torch.float64),
        "boxes": torch.tensor([row[2] for row in rows], dtype=torch.float64).reshape(-1, 4),
    }


def targets(*rows):
    """Of (label, difficult, box) each."""
    return {
        "labels": torch.tensor([row[0] for row in rows], dtype=torch.int64),
        "difficult": torch.tensor([row[1] for row in rows], dtype=torch.bool),
        "boxes": torch.tensor([row[2] for row in rows], dtype=torch.float64).reshape(-1, 4),
    }


def evaluate(*images, classes=("a",), **options):
    evaluator = VOCEvaluator(classes, **options)
    for found, wanted in images:
        evaluator.update([found], [wanted])
    return evaluator.compute()


def square(x):
    return (x, 0.0, x + 10.0, 10.0)


def test_right_wrong_right_of_three():
    """Precisions 1, 1/2, 2/3 at recalls 1/3, 1/3, 2/3: worked by hand."""
    found = predictions((1, 0.9, square(0)), (1, 0.8, FAR), (1, 0.7, square(20)))
    wanted = targets((1, False, square(0)), (1, False, square(20)), (1, False, square(40)))
    result = evaluate((found, wanted))
    assert result["map"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)
    # Recalls 0 to .3 see precision 1, .4 to .6 see 2/3, .7 on see nothing.
    assert result["map_11"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)


def test_all_found_is_one_and_none_found_is_zero():
    wanted = targets((1, False, square(0)))
    assert evaluate((predictions((1, 0.5, square(0))), wanted))["map_11"] == 1
    assert evaluate((predictions((1, 0.5, FAR)), wanted))["map"] == 0
    assert evaluate((predictions(), wanted)) == {
        "map": 0.0, "map_11": 0.0, "ap": {"a": 0.0}, "ap_11": {"a": 0.0},
    }  # fmt: skip


def test_recalls_of_whole_tenths_are_reached():
    """3 of 10 objects are a recall of .3, though 3 x .1 is more than that in floating point."""
    wanted = targets(*[(1, False, square(20 * k)) for k in range(10)])
    for count in range(11):
        found = predictions(*[(1, 0.5, square(20 * k)) for k in range(count)])
        expected = (count + 1) / 11 if count else 0
        assert evaluate((found, wanted))["map_11"] == pytest.approx(expected)


def test_a_second_detection_of_an_object_is_wrong():
    found = predictions((1, 0.9, square(1)), (1, 0.8, square(0)))
    wanted = targets((1, False, square(0)), (1, False, square(20)))
    assert evaluate((found, wanted))["map"] == pytest.approx(1 / 2)
    # Though the second one overlaps more, and would have another one to take: as in the devkit.
    near = targets((1, False, square(0)), (1, False, square(3)))
    assert evaluate((predictions((1, 0.9, square(0)), (1, 0.8, square(1))), near))["map"] == 1 / 2


def test_difficult_objects_count_for_nothing():
    found = predictions((1, 0.9, square(0)), (1, 0.8, square(0.5)), (1, 0.7, square(20)))
    wanted = targets((1, True, square(0)), (1, False, square(20)))
    assert evaluate((found, wanted))["map"] == 1
    assert evaluate((predictions(), targets((1, True, square(0)), (1, False, FAR))))["map"] == 0


def test_a_class_without_objects_has_no_part_in_the_mean():
    found = predictions((1, 0.9, square(0)), (2, 0.9, square(0)))
    wanted = targets((1, False, square(0)), (2, True, square(0)))
    result = evaluate((found, wanted), classes=("a", "b", "c"))
    assert result["ap"] == {"a": 1.0, "b": None, "c": None}
    assert result["map"] == result["map_11"] == 1


def test_only_objects_of_its_own_class_and_image_are_found():
    other_class = (predictions((2, 0.9, square(0))), targets((1, False, square(0))))
    other_image = (predictions((1, 0.9, square(0))), targets())
    assert evaluate(other_class, other_image, classes=("a", "b"))["ap"]["a"] == 0


def test_half_an_overlap_is_enough():
    half = (0.0, 0.0, 10.0, 5.0)
    wanted = targets((1, False, square(0)))
    assert evaluate((predictions((1, 0.9, half)), wanted))["map"] == 1
    less = (0.0, 0.0, 10.0, 4.99)
    assert evaluate((predictions((1, 0.9, less)), wanted))["map"] == 0
    assert evaluate((predictions((1, 0.9, less)), wanted), iou_threshold=0.4)["map"] == 1


def test_plus_one_is_for_boxes_that_end_with_their_last_pixel():
    """Pixels 0 to 9 and 0 to 4: 10 and 5 of them, which is half; the differences, 9 and 4, not."""
    found = predictions((1, 0.9, (0, 0, 9, 4)))
    wanted = targets((1, False, (0, 0, 9, 9)))
    assert evaluate((found, wanted), plus_one=True)["map"] == 1
    assert evaluate((found, wanted))["map"] == 0


def test_of_equal_scores_the_wrong_ones_come_first():
    right = (predictions((1, 0.5, square(0))), targets((1, False, square(0))))
    wrong = (predictions((1, 0.5, FAR)), targets())
    assert evaluate(right, wrong)["map"] == evaluate(wrong, right)["map"] == 1 / 2


# An independent evaluator: one class at a time, all detections of all images in one list, as
# VOCevaldet.m goes about it, and each recall of the eleven on its own.


def overlap(a, b, extra):
    width = min(a[2], b[2]) - max(a[0], b[0]) + extra
    height = min(a[3], b[3]) - max(a[1], b[1]) + extra
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def devkit(images, label, extra):
    objects = [
        [(box, difficult) for k, difficult, box in wanted if k == label] for _, wanted in images
    ]
    used = [[False] * len(own) for own in objects]
    positives = sum(not difficult for own in objects for _, difficult in own)
    detections = sorted(
        (
            (score, image, box)
            for image, (found, _) in enumerate(images)
            for k, score, box in found
            if k == label
        ),
        reverse=True,
    )
    right, wrong, curve = 0, 0, []
    for _, image, box in detections:
        most, best = -math.inf, None
        for number, (true_box, _) in enumerate(objects[image]):
            if overlap(box, true_box, extra) > most:
                most, best = overlap(box, true_box, extra), number
        if best is not None and most >= 0.5:
            if objects[image][best][1]:
                continue
            if used[image][best]:
                wrong += 1
            else:
                used[image][best] = True
                right += 1
        else:
            wrong += 1
        curve.append((right, right / (right + wrong)))
    if positives == 0:
        return None, None
    eleven = sum(
        max((precision for found, precision in curve if 10 * found >= t * positives), default=0)
        for t in range(11)
    )
    area = sum(
        max((precision for found, precision in curve if found >= k), default=0)
        for k in range(1, positives + 1)
    )
    return area / positives, eleven / 11


# Coordinates on a coarse grid bring about overlaps of exactly a half, and equal ones.
sides = st.integers(1, 6)
boxes = st.builds(
    lambda x, y, w, h: (float(x), float(y), float(x + w), float(y + h)),
    st.integers(0, 6), st.integers(0, 6), sides, sides,
)  # fmt: skip
labels = st.integers(1, 3)


@st.composite
def scenes(draw):
    wanted = st.lists(st.tuples(labels, st.booleans(), boxes), max_size=4)
    found = st.lists(st.tuples(labels, st.none(), boxes), max_size=8)
    images = draw(st.lists(st.tuples(found, wanted), min_size=1, max_size=4))
    count = sum(len(found) for found, _ in images)
    scores = iter(draw(st.permutations(range(1, count + 1))))  # no two are equal
    return [
        ([(k, next(scores) / 100, box) for k, _, box in found], wanted) for found, wanted in images
    ]


@hypothesis.given(scenes(), st.booleans())
def test_agrees_with_the_devkit(images, plus_one):
    names = ("a", "b", "c")
    expected = {n: devkit(images, k, float(plus_one)) for k, n in enumerate(names, 1)}
    pairs = [(predictions(*found), targets(*wanted)) for found, wanted in images]
    if all(area is None for area, _ in expected.values()):
        with pytest.raises(ValueError, match="expected objects that are not difficult, got none"):
            evaluate(*pairs, classes=names, plus_one=plus_one)
        return
    result = evaluate(*pairs, classes=names, plus_one=plus_one)
    for name, (area, eleven) in expected.items():
        assert result["ap"][name] == (None if area is None else pytest.approx(area))
        assert result["ap_11"][name] == (None if eleven is None else pytest.approx(eleven))


@hypothesis.given(scenes(), st.integers(0, 4), st.randoms(use_true_random=False))
def test_neither_order_nor_partition_of_the_images_matters(images, cut, random):
    pairs = [(predictions(*found), targets(*wanted)) for found, wanted in images]
    hypothesis.assume(any(not t["difficult"].all() for _, t in pairs))
    expected = evaluate(*pairs, classes="abc")
    random.shuffle(pairs)
    states = []
    for part in (pairs[:cut], pairs[cut:]):
        process = VOCEvaluator("abc")
        process.update([found for found, _ in part], [wanted for _, wanted in part])
        states.append(process.state())
    together = VOCEvaluator("abc")
    together.merge(states)
    assert together.compute() == expected


@hypothesis.given(scenes())
def test_a_finer_ruler_changes_nothing(images):
    """Without the extra pixel, boxes may be in pixels of any size, of each axis its own."""
    pairs = [(predictions(*found), targets(*wanted)) for found, wanted in images]
    hypothesis.assume(any(not t["difficult"].all() for _, t in pairs))
    expected = evaluate(*pairs, classes="abc")
    for pair in pairs:
        for one in pair:
            one["boxes"] = one["boxes"] * torch.tensor([2, 4, 2, 4])
    assert evaluate(*pairs, classes="abc") == expected


def test_what_makes_no_sense_is_refused():
    evaluator = VOCEvaluator(("a",))
    good = targets((1, False, square(0)))
    with pytest.raises(ValueError, match="1 predictions and 0 targets"):
        evaluator.update([predictions()], [])
    with pytest.raises(ValueError, match="labels from 1 to 1, got 2 to 2: are these the classes"):
        evaluator.update([predictions((2, 0.5, square(0)))], [good])
    with pytest.raises(ValueError, match="got NaN; did training diverge"):
        evaluator.update([predictions((1, math.nan, square(0)))], [good])
    with pytest.raises(ValueError, match=r"expected boxes \[K, 4\]"):
        evaluator.update([{**predictions(), "scores": torch.ones(1)}], [good])
    with pytest.raises(ValueError, match="expected states of 1 classes, got one of 2"):
        evaluator.merge([VOCEvaluator(("a", "b")).state()])
    with pytest.raises(ValueError, match="iou_threshold must be above 0"):
        VOCEvaluator(("a",), iou_threshold=0)
    with pytest.raises(ValueError, match=r"classes: expected each name once, got \['a', 'a'\]"):
        VOCEvaluator(("a", "a"))
    for pair in (([predictions()], [good]), ([predictions((1, 0.5, square(0)))], [good])):
        for one in pair:
            wrong = [{**each, "labels": each["labels"] + 0.5} for each in one]
            with pytest.raises(ValueError, match="labels of an integer dtype, got"):
                evaluator.update(*(wrong if each is one else each for each in pair))


def test_targets_without_difficult_and_predictions_of_any_dtype():
    found = predictions((1, 0.5, square(0)), (1, 0.25, square(9)))
    target = targets((1, False, square(0)))
    expected = evaluate((found, target))
    plain = {name: target[name] for name in ("boxes", "labels")}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        given = {name: v.to(dtype) if name != "labels" else v for name, v in found.items()}
        assert evaluate((given, plain)) == expected
