"""The terms of the objective: tensors in, one scalar out.

A loss says what it needs by the names of its positional parameters, and a recipe is checked against them:

    logits            [T, B, K]  the student's, at each time step
    targets           [B]        class indices, int64; or [B, K], class probabilities, floats, where an augmentation
                                 mixes images (mixup, cutmix): a loss takes both, as F.cross_entropy does
    teacher_logits    [B, K]
    student_features  one [T, B, C, H, W] for each pair of stages
    teacher_features  one [B, C, H, W] for each pair of stages

Its keyword-only parameters are the recipe's options. A loss sees tensors, never modules.

Where time is computed in chunks (`distill.time_chunk`) the student's features are not kept: the decorator `over_time`
says what a loss reads of them. `check_pairs` gives a loss a check of the stages that it is to compare.
"""

from lasnn.loss.cross_entropy import cross_entropy, entropy, tet
from lasnn.loss.distillation import ensemble_kd, logit_kd
from lasnn.loss.features import attention, feature_mse, same_size
from lasnn.loss.interface import Pair, check_pairs, over_time, pair_problems, reading_fix, reading_of

__all__ = [
    "Pair",
    "attention",
    "check_pairs",
    "cross_entropy",
    "ensemble_kd",
    "entropy",
    "feature_mse",
    "logit_kd",
    "over_time",
    "pair_problems",
    "reading_fix",
    "reading_of",
    "same_size",
    "tet",
]
