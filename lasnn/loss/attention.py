"""Losses of where a stage is active: its spatial maps against the teacher's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lasnn.errors import UserError
from lasnn.kernels import energy_map
from lasnn.loss.interface import Pair, asks_for, check_pairs, over_time
from lasnn.loss.pairs import Weights, one_weight_a_pair, same_size, weighted
from lasnn.registry import losses

Power = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Normalize = Literal["l2", "softmax", "z-score", "max", "none"]
Measure = Literal["mse", "cosine", "kl"]
# What a norm, a range, a deviation is never divided below: the gradient of a silent map stays bounded.
EPS = 1e-3


def attention_problems(pairs: Sequence[Pair], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Complain of options of `attention` that contradict each other."""
    yield from one_weight_a_pair(pairs, options)
    normalize = options.get("normalize", "l2")
    if normalize != "softmax":
        if options.get("measure") == "kl":
            yield "measure", '"kl" compares distributions over the pixels; set normalize = "softmax"'
        if options.get("temperature", 1.0) != 1.0:
            yield "temperature", f'has no effect with normalize = "{normalize}"; set normalize = "softmax"'
    if options.get("tap") == "current" and options.get("temporal", "rate") != "rate":
        yield "temporal", 'tap = "current" has the mean over time alone; set temporal = "rate"'
    if pairs and len(one_pixel(pairs, options)) == len(pairs):
        key = "pool" if options.get("pool") == 1 else "name"
        fix = "set pool = 2 or more" if key == "pool" else "pair stages with larger maps in distill.pairs"
        yield key, f"maps of one pixel are all the same once they are normalised; {fix}, or compare by 'feature-mse'"


def one_pixel(pairs: Sequence[Pair], options: Mapping[str, Any]) -> list[Pair]:
    """Pairs whose maps have one pixel, which is the same once it is normalised; none where it is not normalised."""
    if options.get("normalize") == "none" and options.get("measure", "mse") == "mse":
        return []
    return [pair for pair in pairs if pair.pixels == 1 or options.get("pool") == 1]


def attention_notes(pairs: Sequence[Pair], options: Mapping[str, Any]) -> Iterator[str]:
    """Name the stages from which nothing is learnt."""
    if empty := one_pixel(pairs, options):
        names = ", ".join(pair.student for pair in empty)
        yield f"nothing is learnt from {names}: a map of one pixel is the same for every image once it is normalised"


def samd_problems(pairs: Sequence[Pair], _: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Complain of a last pair whose map has one pixel."""
    if pairs and pairs[-1].pixels == 1:
        yield "name", f"the last pair's map ({pairs[-1].student}) has one pixel, and says nothing of where"


def tapped(options: Mapping[str, Any]) -> tuple[str, str]:
    """The inputs that `attention` compares."""
    what = "currents" if options.get("tap") == "current" else "features"
    return f"student_{what}", f"teacher_{what}"


@losses.register("attention")
@over_time(
    lambda options: {"rate": "mean", "step": "steps"}.get(options.get("temporal", "rate")),
    fix='temporal = "rate" or "step"',
)
@check_pairs(attention_problems, attention_notes)
@asks_for(tapped)
def attention(
    student_features: list[Tensor] | None,
    teacher_features: list[Tensor] | None,
    student_currents: list[Tensor] | None = None,
    teacher_currents: list[Tensor] | None = None,
    *,
    power: Power = 2.0,
    temporal: Literal["rate", "step", "map"] = "rate",
    normalize: Normalize = "l2",
    measure: Measure = "mse",
    temperature: Temperature = 1.0,
    pool: Annotated[int, Field(ge=1)] | None = None,
    tap: Literal["spikes", "current"] = "spikes",
    pair_weights: Weights = None,
) -> Tensor:
    """Layer-wise attention transfer: distance between normalised spatial attention maps, summed over pairs.

    Left at its defaults, sum over pairs of w * mean over images and pixels of (Q(student) - Q(teacher))^2 with
    Q(A) = vec(f) / ||f||_2, f = sum_c |A_c|^power (Zagoruyko & Komodakis, ICLR 2017). Channels vanish in the map, so
    widths may differ; where the sizes differ, the larger feature is average-pooled to the smaller. `power = 1` reaches
    neurons that are silent at every step; `power = 2` gives them no gradient.

    Args:
        temporal: how spikes become one map: of the firing rate, of each step (the distance is averaged over steps), or
            the mean of the steps' maps.
        normalize: of each map f, over its pixels: "l2" f / ||f||; "max" f / max f (Real-to-Binary as larq_zoo's code
            has it); "z-score" (f - mean) / deviation; "softmax" softmax of (f - min) / (max - min) / temperature, as
            in CKDSNN (arXiv 2511.06902); "none".
        measure: "mse", the mean over pixels; "cosine", 1 - cos, in which every stage weighs the same whatever its size
            (with "l2" it is the mse times half the number of pixels; with "z-score" 1 - Pearson's correlation); "kl",
            KL(teacher || student) of softmax maps.
        pool: average-pool the maps f to at most so many pixels a side first: coarse maps.
        tap: compare what the stages' units emit, or what enters their activation, signed (`normalize` and `measure` are
            then of |current|^power), as Zagoruyko's code for CIFAR and Real-to-Binary do.
    """
    if tap == "current":
        student_features, teacher_features = student_currents, teacher_currents
    total = torch.zeros((), device=student_features[0].device)
    for weight, student, teacher in weighted(pair_weights, student_features, teacher_features):
        student, teacher = same_size(student, teacher)
        maps = energy_map(student, power, temporal), energy_map(teacher[None], power)
        ours, theirs = (_coarse(one, pool).flatten(-2) for one in maps)
        total = total + weight * _distance(ours, theirs, normalize, measure, temperature)
    return total


@losses.register("samd")
@over_time("mean")
@check_pairs(samd_problems)
def samd(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    teacher_logits: Tensor,
    teacher_classifier: tuple[Tensor, Tensor],
    *,
    temperature: Temperature = 2.0,
) -> Tensor:
    """Saliency-scaled activation map distillation: the last pair's map against the teacher's class activation map.

    KL(softmax(M_A / temperature) || softmax(M_S / temperature)) over pixels, averaged over images, of maps scaled to
    [0, 1]: M_S = sum over channels of the firing rate, M_A = ReLU(sum_c W[k, c] A_c) with the teacher's last linear
    layer W and the class k that it decides for (CKDSNN, arXiv 2511.06902). The last pair must be the teacher's last
    stage, whose channels W weighs. Where the sizes differ, the larger feature is average-pooled to the smaller. A stage
    that passes on currents, which the head activates (`residual = "membrane"`), counts by its positive part.

    Raises:
        UserError: the classifier weighs other channels.
    """
    student = student_features[-1].float().mean(0, keepdim=True)
    # Not a ReLU, which gives neurons that are silent no gradient.
    student = student.masked_fill(student < 0, 0.0)
    student, teacher = same_size(student, teacher_features[-1].float().relu())
    weight = teacher_classifier[0].float()
    if weight.shape[1] != teacher.shape[1]:
        raise UserError(
            f"'samd' weighs the channels of the teacher's last stage by its classifier: that has {weight.shape[1]} "
            f"inputs, the last pair's stage {teacher.shape[1]} channels; name the teacher's last stage last in "
            "distill.pairs, of a teacher whose head is one linear layer"
        )
    ours = student[0].sum(1)
    theirs = (weight[teacher_logits.argmax(-1)][..., None, None] * teacher).sum(1).relu()
    return _distance(ours.flatten(1), theirs.flatten(1), "softmax", "kl", temperature)


def _coarse(maps: Tensor, pool: int | None) -> Tensor:
    """Maps [..., H, W], average-pooled where a side is longer than `pool`."""
    if pool is None:
        return maps
    return F.adaptive_avg_pool2d(maps, [min(pool, side) for side in maps.shape[-2:]])


def _distance(student: Tensor, teacher: Tensor, normalize: str, measure: str, temperature: float) -> Tensor:
    """The distance of maps [..., B, N] over their pixels, averaged over all leading dimensions; see `attention`."""
    if measure == "kl":
        student, teacher = (F.log_softmax(_min_max(one) / temperature, dim=-1) for one in (student, teacher))
        return F.kl_div(student, teacher.expand_as(student), reduction="none", log_target=True).sum(-1).mean()
    if measure == "cosine":
        student, teacher = (_unit(_direction(one, normalize, temperature)) for one in (student, teacher))
        return 1 - (student * teacher).sum(-1).mean()
    student, teacher = (_normalised(one, normalize, temperature) for one in (student, teacher))
    return (student - teacher).square().mean()


def _normalised(maps: Tensor, normalize: str, temperature: float) -> Tensor:
    if normalize == "l2":
        return _unit(maps)
    if normalize == "max":
        return maps / maps.amax(-1, keepdim=True).clamp_min(EPS)
    if normalize == "z-score":
        return _centred(maps) / maps.std(-1, keepdim=True, correction=0).clamp_min(EPS)
    return _softmax(maps, temperature) if normalize == "softmax" else maps


def _direction(maps: Tensor, normalize: str, temperature: float) -> Tensor:
    """What has the normalised maps' direction, without dividing twice where a map is silent."""
    if normalize == "z-score":
        return _centred(maps)
    return _softmax(maps, temperature) if normalize == "softmax" else maps


def _unit(maps: Tensor) -> Tensor:
    return maps / torch.linalg.vector_norm(maps, dim=-1, keepdim=True).clamp_min(EPS)


def _centred(maps: Tensor) -> Tensor:
    return maps - maps.mean(-1, keepdim=True)


def _softmax(maps: Tensor, temperature: float) -> Tensor:
    return (_min_max(maps) / temperature).softmax(-1)


def _min_max(maps: Tensor) -> Tensor:
    """Each map scaled to [0, 1]."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low).clamp_min(EPS)
