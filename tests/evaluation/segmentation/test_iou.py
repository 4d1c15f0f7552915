"""IoU and accuracy by the definition, whatever the batches."""

import pytest
import torch

from evaluation.segmentation.iou import Confusion
from utils.errors import UserError


def test_by_the_definition():
    """Labels 1, 2, 4 in targets, 7 in predictions alone; the pixel of target 0 counts nowhere."""
    target = torch.tensor([1, 1, 1, 2, 0, 4], dtype=torch.uint8)
    prediction = torch.tensor([1, 1, 2, 7, 9, 4], dtype=torch.uint8)
    confusion = Confusion()
    confusion.add(target[:2], prediction[:2])
    confusion.add(target[2:], prediction[2:])
    scores = confusion.scores([0, 255])
    assert scores.class_iou == pytest.approx({1: 2 / 3, 2: 0, 4: 1})
    assert scores.miou_classes == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert scores.miou == pytest.approx((2 / 3 + 0 + 1 + 0) / 4)
    assert scores.acc == 3 / 5
    assert confusion.scores([255]).acc == 3 / 6  # the counts stay


def test_nothing_to_count():
    confusion = Confusion()
    confusion.add(torch.zeros(3, dtype=torch.uint8), torch.ones(3, dtype=torch.uint8))
    with pytest.raises(UserError, match="every one is labelled 0 or 255, which are ignored"):
        confusion.scores([0, 255])
    with pytest.raises(ValueError, match="differ in shape"):
        confusion.add(torch.zeros(3, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8))
