"""`lasnn bench inference`: a student's forward pass at batch 1 and at the recipe's batch size, all T steps at once and
step by step as in a stream, beside the same network of SpikingJelly's layers and its convolutions and linear layers.

Images are random, of the recipe's size, and the weights are fresh: no data set is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lasnn.bench import page
from lasnn.bench.kernels import first_line, more_conditions, spikingjelly_version
from lasnn.bench.step import FLOOR, LASNN, PEER, PeerUnit, figures, layer_calls, peer_network, plans_at, ratio
from lasnn.bench.timing import turns
from lasnn.errors import UserError
from lasnn.factory import make_encoder, make_student
from lasnn.markdown import markdown_table
from lasnn.network.scales import NORMS
from lasnn.network.student import Student
from lasnn.plan import Plan
from lasnn.random import keyed
from lasnn.run import environment

# "step by step": T calls, the voltages carried from one to the next.
STREAM, PEER_STREAM = "lasnn, step by step", "SpikingJelly, step by step"
COLUMNS = (
    "timesteps",
    "batch_size",
    "implementation",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "images_per_second",
    "over_floor",
    "over_floor_low",
    "over_floor_high",
    "rounds",
)
LEGEND = (
    "A forward pass, ms: median (10 % to 90 % quantile). Over the floor: the median of the rounds' ratios, with its "
    "95 % interval. The floor: the convolutions and linear layers alone. Step by step: T calls that each take an image "
    "and the voltages, as a stream does; under direct encoding the stem is then computed at every step."
)
# Of the logits' largest value, above which a peer is not the same network: it is spikes that flip at the threshold.
SAME_LOGITS = 0.05


@dataclass(frozen=True)
class Options:
    """What to measure and where to leave it; made by `read`, which checks it."""

    plans: tuple[Plan, ...]
    overrides: tuple[str, ...]
    rounds: int
    out: Path
    write: Path | None

    @classmethod
    def read(
        cls,
        recipe: str,
        overrides: Sequence[str] = (),
        timesteps: Sequence[int] = (),
        rounds: int = 15,
        out: Path = Path("runs/bench"),
        write: Path | None = None,
    ) -> "Options":
        """Options from what a user typed; no `timesteps`: the recipe's. Makes `out`.

        Raises:
            UserError: with a line for every mistake.
        """
        plans = plans_at(recipe, overrides, timesteps)
        page.prepare(out, write, section(plans[0]))
        return cls(plans, tuple(overrides), rounds, out, write)


def section(plan: Plan) -> str:
    """The name of a recipe's section of a page, and of its files."""
    return f"inference-{plan.recipe.name}-{plan.recipe.student.architecture}-{plan.device.type}"


def step_by_step(student: Student, images: Tensor) -> Tensor:
    """T calls of `Student.step`; returns the mean of their logits [B, K]."""
    voltages, total, draws = None, 0, torch.Generator(images.device).manual_seed(0)
    for _ in range(student.timesteps):
        logits, voltages = student.step(images, voltages, draws)
        total = total + logits
    return total / student.timesteps


def peer_step_by_step(student: Student, images: Tensor) -> Tensor:
    """The same with SpikingJelly's nodes, which keep their voltages until they are reset."""
    units = [unit for unit in student.network.modules() if isinstance(unit, PeerUnit)]
    for unit in units:
        unit.node.reset()
        unit.carries = True
    total, draws = 0, torch.Generator(images.device).manual_seed(0)
    try:
        for _ in range(student.timesteps):
            total = total + student.network(student.encoder(images, 1, draws), 1)[0][0]
    finally:
        for unit in units:
            unit.carries = False
    return total / student.timesteps


def measure(options: Options, progress: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """Time the passes at each T and batch size, round by round.

    Args:
        options: what to measure.
        progress: told of each part as it begins.

    Returns:
        `environment`: device, versions, threads, date; `recipe` and what else there is to know of it; `notes`; `rows`,
        one dict for each T, batch size and implementation with the keys `COLUMNS`.
    """
    peer, notes = spikingjelly_version(options.plans[0].device)
    rows = []
    for plan in options.plans:
        for batch in sorted({1, plan.recipe.data.batch_size}):
            progress(f"T = {plan.recipe.student.timesteps}, batch {batch}: {options.rounds} rounds")
            passes, said = passes_of(plan, batch, peer is not None)
            notes += [line for line in said if line not in notes]
            samples = turns(passes, plan.device, rounds=options.rounds)
            place = {"timesteps": plan.recipe.student.timesteps, "batch_size": batch}
            rows += [{**place, "implementation": name, **figures(samples, name, batch)} for name in passes]
    plan = options.plans[0]
    known = {**environment(plan.device), "spikingjelly": peer, **more_conditions(plan.device)}
    return {
        "environment": known,
        "recipe": plan.recipe.name,
        "overrides": list(options.overrides),
        "student": plan.recipe.student.architecture,
        "image": [plan.data.channels, plan.data.height, plan.data.width],
        "precision": "fp32",
        "encoder": plan.recipe.student.encoder_table.name,
        "notes": notes,
        "rows": rows,
    }


def spiking_student(plan: Plan, images: Tensor) -> Student:
    """The recipe's student with random weights, its batch norms with the statistics of these images: with those that
    they begin with hardly a neuron spikes.
    """
    with keyed(plan.recipe.seed, "bench"):
        student = make_student(plan.recipe, plan.data).to(plan.device).train()
    for norm in student.modules():
        if isinstance(norm, NORMS):
            norm.momentum = 1.0
    with torch.no_grad():
        student.steps(images, (), torch.Generator(plan.device).manual_seed(0))
    return student.eval()


def passes_of(plan: Plan, batch: int, peer: bool) -> tuple[dict[str, Callable[[int], Any]], list[str]]:
    """The forward passes that take turns, each a function of the round's number, and notes."""
    recipe, device, notes = plan.recipe, plan.device, []
    size = (batch, plan.data.channels, plan.data.height, plan.data.width)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    images = pixels.float() / 255
    student = spiking_student(plan, images)
    draws = torch.Generator(device)

    def whole(one: Student) -> Tensor:
        return one.steps(images, (), draws.manual_seed(0))[0].mean(0)

    passes: dict[str, Callable[[], Any]] = {LASNN: lambda: whole(student)}
    if student.encoder.causal and student.neurons_carry_voltages():
        passes[STREAM] = lambda: step_by_step(student, images)
    if peer:
        try:
            other = Student(peer_network(plan), make_encoder(recipe, plan.data), student.timesteps).to(device).eval()
            other.network.load_state_dict(student.network.state_dict())
            with torch.no_grad():
                own, there = whole(student), whole(other)
            if (own - there).abs().max() > SAME_LOGITS * own.abs().max():
                raise UserError("its logits are not lasnn's: it is another network")
            passes[PEER] = lambda: whole(other)
            if student.encoder.causal:
                passes[PEER_STREAM] = lambda: peer_step_by_step(other, images)
        except Exception as error:
            notes.append(f"SpikingJelly is left out at T = {student.timesteps}: {first_line(error)}")
    calls = layer_calls(student, pixels)
    passes[FLOOR] = lambda: [layer(x) for layer, x in calls]

    def without_gradients(run: Callable[[], Any]) -> Callable[[int], Any]:
        def timed(number: int) -> Any:
            with torch.no_grad():
                return run()

        return timed

    return {name: without_gradients(run) for name, run in passes.items()}, notes


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells, a line for each T, batch size and implementation."""
    titles = ["T", "batch", "implementation", "ms", "images/s", "over the floor"]
    lines = []
    for row in result["rows"]:
        ms = f"{row['median_ms']:.2f} ({row['p10_ms']:.2f}-{row['p90_ms']:.2f})"
        place = [str(row["timesteps"]), str(row["batch_size"]), row["implementation"]]
        lines.append([*place, ms, f"{row['images_per_second']:.0f}", ratio(row, "")])
    return titles, lines


def head(result: Mapping[str, Any]) -> str:
    """What was measured, and where."""
    image = " x ".join(map(str, result["image"]))
    sets = "".join(f" --set {one}" for one in result["overrides"])
    return (
        f"{result['recipe']}{sets}: {result['student']}, images of {image}, {result['precision']}, "
        f"{result['encoder']} encoding; {page.conditions(result)}"
    )


def markdown(result: Mapping[str, Any]) -> str:
    """Conditions, table and notes."""
    lines = markdown_table(*table(result))
    return "\n".join([head(result) + ".", "", *lines, "", LEGEND, "", *result["notes"], ""])


def save(result: Mapping[str, Any], options: Options) -> list[Path]:
    """Write the files of a result; see `lasnn.bench.page.save`."""
    name = section(options.plans[0])
    return page.save(name, result, result["rows"], COLUMNS, markdown(result), options.out, options.write)
