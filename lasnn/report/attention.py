"""The attention maps of a run's report: how alike those of student and teacher are, and some to look at."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasnn.kernels import attention_map
from lasnn.loaded_run import Run
from lasnn.loss import same_size
from lasnn.plan import pair_stages
from lasnn.random import generator
from lasnn.registry import losses

# Sample images of as many classes, beside the most and the least alike of all.
CLASSES_SHOWN = 10


@torch.no_grad()
def measure_attention(run: Run, test: Any, count: int) -> dict[str, Any]:
    """Attention maps of the paired stages, with the power and the reading over time of the recipe's loss.

    Q of the student and Q of the teacher have unit norm and no negative values, so that the distance ||Q - Q'|| is from
    0, the same map, to 1.41, no pixel in common. Beside it is the distance to the teacher's map of another image.

    Args:
        count: of test images that are measured, drawn by the run's seed.
    """
    loss = next((loss for loss in run.recipe.losses if loss.name == "attention"), None)
    options = loss.options if loss else {}
    temporal = options.get("temporal", "rate")
    # A map of its own at each step cannot be shown as one; their mean can.
    maps = PairMaps(run, pairs_of(run), options.get("power", 2.0), "map" if temporal == "step" else temporal)
    picked = torch.randperm(len(test), generator=generator(run.recipe.seed, "report"))[:count]
    own, other = distances(maps, test, picked)
    samples, sizes = drawn(maps, test, choose(picked, test.labels.cpu()[picked], own))
    stages = []
    for place, (student, teacher) in enumerate(maps.pairs):
        stage = {"student": student, "teacher": teacher, "size": sizes[place]}
        if own is not None:
            low, high = own[place].quantile(torch.tensor([0.05, 0.95])).tolist()
            elsewhere = float(other[place].mean()) if other[place].numel() else None
            stage |= {"mean": float(own[place].mean()), "low": low, "high": high, "other": elsewhere}
        stages.append(stage)
    return {
        "images": count,
        "power": maps.power,
        "temporal": maps.temporal,
        "weight": loss.weight if loss else None,
        # What the loss compares, where that is not what is drawn.
        "otherwise": {
            key: options[key]
            for key in ("tap", "normalize", "pool")
            if key in options and options[key] != losses["attention"].options[key].default
        },
        "stages": stages,
        "samples": samples,
    }


def pairs_of(run: Run) -> list[tuple[str, str | None]]:
    """Names of the student's and the teacher's stage of each pair; without a teacher, or where nothing is paired, the
    student's stages alone.
    """
    ours = dict.fromkeys(run.student.network.stage_names, ())
    alone: list[tuple[str, str | None]] = [(stage, None) for stage in ours]
    if run.teacher is None:
        return alone
    staged, _ = pair_stages(run.recipe, ours, dict.fromkeys(run.teacher.network.stage_names, ()))
    return [(pair.student, pair.teacher) for pair in staged] or alone


@dataclass(frozen=True)
class PairMaps:
    """Makes the maps of each pair of stages.

    Args:
        run: whose student and teacher.
        pairs: names of stages, as `pairs_of` gives them.
        power, temporal: as of the attention loss.
    """

    run: Run
    pairs: list[tuple[str, str | None]]
    power: float
    temporal: str

    def __call__(self, images: Tensor, draw: int) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        """The student's logits [B, K] and, of each pair, the maps [B, h, w] of student and teacher, if there is one.

        Args:
            images: [B, C, H, W] in [0, 1].
            draw: keys what the encoder draws.
        """
        run = self.run
        draws = generator(run.recipe.seed, "report", draw, device=images.device)
        logits, features = run.student.steps(images, [stage for stage, _ in self.pairs], draws)
        taught = {}
        if run.teacher is not None:
            _, taught = run.teacher.taps(images, [stage for _, stage in self.pairs if stage])
        found = []
        for stage, other in self.pairs:
            student, teacher = features[stage], taught.get(other)
            if teacher is not None:
                student, teacher = same_size(student, teacher)
                teacher = attention_map(teacher[None], self.power).unflatten(-1, teacher.shape[-2:])
            ours = attention_map(student, self.power, self.temporal).unflatten(-1, student.shape[-2:])
            found.append((ours, teacher))
        return logits.float().mean(0), found


def distances(maps: PairMaps, test: Any, picked: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of each pair [pairs, N] the distances on the picked images, and those to the teacher's map of another image;
    None without a teacher.
    """
    own: list[list[Tensor]] = [[] for _ in maps.pairs]
    other: list[list[Tensor]] = [[] for _ in maps.pairs]
    for number, (pixels, _) in enumerate(test.batches(picked.split(maps.run.recipe.data.batch_size))):
        for place, (student, teacher) in enumerate(maps(pixels.float() / 255, number)[1]):
            if teacher is not None:
                own[place].append(distance(student, teacher))
                # A batch of one image has no other.
                other[place].append(distance(student, teacher.roll(1, 0))[: len(pixels) if len(pixels) > 1 else 0])
    if not own[0]:
        return None, None
    return tuple(torch.stack([torch.cat(each) for each in measured]) for measured in (own, other))


def drawn(maps: PairMaps, test: Any, chosen: list[tuple[int, str]]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The images to show with their maps, and the size of each pair's maps."""
    [(pixels, labels)] = test.batches([torch.tensor([image for image, _ in chosen])])
    logits, shown = maps(pixels.float() / 255, -1)
    confidence, answer = logits.softmax(-1).max(-1)
    apart = [None if teacher is None else distance(student, teacher) for student, teacher in shown]
    samples = [
        {
            "image": image,
            "why": why,
            "pixels": pixels[place].cpu(),
            "label": int(labels[place]),
            "answer": int(answer[place]),
            "confidence": float(confidence[place]),
            "maps": [
                {
                    "student": student[place].cpu(),
                    "teacher": None if teacher is None else teacher[place].cpu(),
                    "distance": None if away is None else float(away[place]),
                }
                for (student, teacher), away in zip(shown, apart, strict=True)
            ],
        }
        for place, (image, why) in enumerate(chosen)
    ]
    return samples, [list(student.shape[-2:]) for student, _ in shown]


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """||Q - Q'|| of maps [B, h, w] -> [B], on the CPU."""
    return (student - teacher).flatten(1).norm(dim=1).cpu()


def choose(picked: Tensor, labels: Tensor, distances: Tensor | None) -> list[tuple[int, str]]:
    """The images to show, (number, why): the most and the least alike, and one of each class, or of some.

    Args:
        picked: numbers of the images that were measured [N].
        labels: of them [N].
        distances: [stages, N], None without a teacher; the image that stands for a class has its median distance.
    """
    mean = torch.zeros(len(picked)) if distances is None else distances.mean(0)
    chosen = {}
    if distances is not None and len(picked) > 1:
        chosen[int(mean.argmin())] = "Most alike"
        chosen[int(mean.argmax())] = "Least alike"
    present = labels.unique().tolist()
    shown = min(CLASSES_SHOWN, len(present))
    for label in (present[number * len(present) // shown] for number in range(shown)):
        [of_class] = (labels == label).nonzero(as_tuple=True)
        median = of_class[mean[of_class].argsort(stable=True)[(len(of_class) - 1) // 2]]
        chosen.setdefault(int(median), "")
    return [(int(picked[place]), why) for place, why in chosen.items()]
