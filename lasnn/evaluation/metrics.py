"""Accuracy, calibration and early exit, batch by batch."""

from typing import Any

import torch
from torch import Tensor

# Of the calibration error, as in Guo et al. (ICML 2017).
CONFIDENCE_BINS = 15


class AccuracyMetrics:
    """Right and wrong answers after a number of steps, as they come in batch by batch."""

    def __init__(self, classes: int):
        # Rows are the true classes, columns the answers.
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        # Answers, sum of their confidence, right ones.
        self.bins = torch.zeros(3, CONFIDENCE_BINS, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits [B, K] and labels [B]."""
        confidence, answer = logits.softmax(-1).max(-1)
        labels, answer, confidence = labels.cpu(), answer.cpu(), confidence.cpu()
        self.confusion += (
            (labels * len(self.confusion) + answer).bincount(minlength=self.confusion.numel()).view_as(self.confusion)
        )
        # A bin holds its upper end, as in the paper.
        bins = (confidence * CONFIDENCE_BINS).ceil().long().clamp(1, CONFIDENCE_BINS) - 1
        for row, weights in zip(self.bins, (torch.ones_like(confidence), confidence, answer == labels), strict=True):
            row.index_add_(0, bins, weights.double())

    def __add__(self, other: "AccuracyMetrics") -> "AccuracyMetrics":
        both = AccuracyMetrics(len(self.confusion))
        both.confusion, both.bins = self.confusion + other.confusion, self.bins + other.bins
        return both

    def result(self) -> dict[str, Any]:
        """Accuracy, by class too (None for a class without images), calibration error and confusion."""
        images, right = self.confusion.sum(1), self.confusion.diagonal()
        _, confidence, correct = self.bins
        return {
            "accuracy": int(right.sum()) / int(images.sum()),
            "accuracy_by_class": [
                int(r) / int(n) if n else None for r, n in zip(right.tolist(), images.tolist(), strict=True)
            ],
            "calibration_error": float((confidence - correct).abs().sum() / images.sum()),
            "confusion": self.confusion.tolist(),
        }


class EarlyExit:
    """Early exit: an image is done at the first step after which the student's confidence is at least `threshold`.

    The steps after it are not counted, though they were made: accuracy and energy are those of a run that stops.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.images = self.correct = self.steps = 0
        self.energy_uj = 0.0

    def add(self, mean_logits: Tensor, labels: Tensor, energy_uj: Tensor) -> None:
        """Count a batch: logits [T, B, K], the mean of the first 1 to T steps; labels [B]; energy [T, B]."""
        confidence, answer = mean_logits.softmax(-1).max(-1)
        sure = confidence >= self.threshold
        sure[-1] = True
        last = sure.int().argmax(0)[None]
        self.images += len(labels)
        self.correct += int((answer.gather(0, last)[0] == labels).sum())
        self.steps += int(last.sum()) + len(labels)
        self.energy_uj += float(energy_uj.gather(0, last.cpu()).sum())

    def __add__(self, other: "EarlyExit") -> "EarlyExit":
        both = EarlyExit(self.threshold)
        for name in ("images", "correct", "steps", "energy_uj"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def result(self) -> dict[str, float]:
        """Threshold, mean steps used, accuracy, energy an image."""
        return {
            "threshold": self.threshold,
            "mean_steps": self.steps / self.images,
            "accuracy": self.correct / self.images,
            "energy_uj": self.energy_uj / self.images,
        }
