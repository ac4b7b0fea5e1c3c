"""The terms of the objective: tensors in, one scalar out.

A loss says what it needs by the names of its positional parameters, and a recipe is checked against them:

    logits              [T, B, K]  the student's, at each time step
    targets             [B]        class indices, int64; or [B, K], class probabilities, floats, where an augmentation
                                   mixes images (mixup, cutmix): a loss takes both, as F.cross_entropy does
    teacher_logits      [B, K]
    teacher_classifier  weight [K, D] and bias [K] of the teacher's last nn.Linear
    student_features    one [T, B, C, H, W] for each pair of stages
    teacher_features    one [B, C, H, W] for each pair of stages
    student_currents    one [1, B, C, H, W] for each pair: the mean over time of what enters the activation of the unit
                        that ends the stage, its norm plus the residual
    teacher_currents    one [B, C, H, W] for each pair: the same, before the ReLU

Its keyword-only parameters are the recipe's options. Nothing is computed that no loss asks for. A loss sees tensors,
never the networks.

A loss with learnt parts is a registered class, an nn.Module: its `forward` asks for the inputs, its constructor may ask
by name for `student_shapes` and `teacher_shapes`, one (C, H, W) for each pair, and for `num_classes`, and has the
options. It is initialised by the run's seed, trained with the student by the same optimiser, saved with the run's state
and left out of the exported student. Batch norms in it should be `lasnn.kernels.BatchNorm2d`, whose statistics several
processes share.

What a loss may say of itself, by decorators:

    over_time       what it reads of the student's features, which are not kept where time is computed in chunks
                    (`distill.time_chunk`)
    check_pairs     a check of the stages that it is to compare
    asks_for        that it needs only some of its inputs with some options
    couples_images  that it compares the images of a batch with each other
    at_one_step     that it compares time steps: what is left of it at T = 1
"""

from lasnn.loss.attention import attention, samd
from lasnn.loss.cross_entropy import cross_entropy, entropy, tet
from lasnn.loss.distillation import ensemble_kd, logit_kd
from lasnn.loss.features import FeatureRegressor, feature_mse
from lasnn.loss.interface import (
    BoundLoss,
    Pair,
    asks_for,
    at_one_step,
    check_pairs,
    couples_images,
    does_couple_images,
    inputs_of,
    left_at_one_step,
    over_time,
    pair_notes,
    pair_problems,
    reading_fix,
    reading_of,
)
from lasnn.loss.pairs import same_size
from lasnn.loss.relations import cka, similarity

__all__ = [
    "BoundLoss",
    "FeatureRegressor",
    "Pair",
    "asks_for",
    "at_one_step",
    "attention",
    "check_pairs",
    "cka",
    "couples_images",
    "cross_entropy",
    "does_couple_images",
    "ensemble_kd",
    "entropy",
    "feature_mse",
    "inputs_of",
    "left_at_one_step",
    "logit_kd",
    "over_time",
    "pair_notes",
    "pair_problems",
    "reading_fix",
    "reading_of",
    "samd",
    "same_size",
    "similarity",
    "tet",
]
