"""The study's control of what the features say: the screened terms with the teacher's features of another image.

A student that gains as much from them learns how active a stage should be, and nothing about its image.
"""

import inspect
from functools import wraps

from torch import Tensor

from lasnn import losses
from lasnn.loss import FeatureRegressor, attention, similarity


def shifted(features: list[Tensor] | None) -> list[Tensor] | None:
    """The teacher's features, each of the image before it in the batch."""
    return None if features is None else [feature.roll(1, 0) for feature in features]


def of_another_image(loss):
    """The same loss, its inputs of the teacher shifted by one image."""
    signature = inspect.signature(loss)

    @wraps(loss)
    def shift(*inputs, **options):
        given = signature.bind(*inputs, **options)
        for name in ("teacher_features", "teacher_currents"):
            if name in given.arguments:
                given.arguments[name] = shifted(given.arguments[name])
        return loss(*given.args, **given.kwargs)

    return shift


losses.register("attention-of-another-image")(of_another_image(attention))
losses.register("similarity-of-another-image")(of_another_image(similarity))


@losses.register("feature-regressor-of-another-image")
class OfAnotherImage(FeatureRegressor):
    """SAKD's regressors, to the features of another image."""

    def forward(self, student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
        return super().forward(student_features, shifted(teacher_features))
