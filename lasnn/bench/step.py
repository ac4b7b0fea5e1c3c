"""`lasnn bench step`: a whole training step of a recipe's student, beside the same network of SpikingJelly's layers and
beside the floor, its convolutions and linear layers alone.

A step is the teacher's forward pass, the student's forward and backward, the losses and the optimiser, on images that
lie on the device already. They are random, of the recipe's size: no data set is read.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lasnn.bench import page
from lasnn.bench.kernels import first_line, more_conditions, spikingjelly_version
from lasnn.bench.timing import quantiles, turns
from lasnn.callback import Callback
from lasnn.data import Images
from lasnn.errors import UserError
from lasnn.evaluation.speed import forget_peak, peak_memory
from lasnn.factory import make_encoder, make_network, make_student, make_teacher
from lasnn.markdown import markdown_table
from lasnn.memory import tune_allocator
from lasnn.network.staged import Staged
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.time import TimeContext
from lasnn.plan import Plan, read_plan
from lasnn.random import keyed
from lasnn.recipe.load import find
from lasnn.run import STATE_FILE, RunFolder, environment
from lasnn.training.checkpoints import Checkpoints
from lasnn.training.distill import student_phase
from lasnn.training.parallel import Batch
from lasnn.training.precision import Precision
from lasnn.training.stop import StopRequest
from lasnn.training.trainer import Trainer, TrainingContext

LASNN, PEER, FLOOR = "lasnn", "SpikingJelly", "floor"
# Relative difference of the first step's loss from lasnn's, above which a peer is not the same network.
SAME_LOSS = 0.02
# Kinds of time, by what the names of PyTorch's ops hold; the first that fits counts.
KINDS = {
    "normalisation and neurons": ("norm_lif", "normlif", "norm_statistics", "norm_grad", "lasnn::lif", "batch_norm"),
    "attention": ("lasnn::attention",),
    "convolutions and linear layers": ("conv", "mkldnn", "mm", "linear"),
    "pooling": ("pool",),
    "optimiser": ("sgd", "adam", "optimizer", "foreach"),
    "losses": ("softmax", "nll_loss", "cross_entropy", "mse_loss", "binary_cross"),
}
OTHER = "all else"


@dataclass(frozen=True)
class Options:
    """What to measure and where to leave it; made by `read`, which checks it."""

    plans: tuple[Plan, ...]
    source: str
    overrides: tuple[str, ...]
    rounds: int
    neighbour: bool
    out: Path
    write: Path | None

    @classmethod
    def read(
        cls,
        recipe: str,
        overrides: Sequence[str] = (),
        timesteps: Sequence[int] = (),
        rounds: int = 15,
        neighbour: bool = False,
        out: Path = Path("runs/bench"),
        write: Path | None = None,
    ) -> "Options":
        """Options from what a user typed; no `timesteps`: the recipe's. Makes `out`.

        Raises:
            UserError: with a line for every mistake.
        """
        plans = plans_at(recipe, overrides, timesteps)
        page.prepare(out, write, section(plans[0]))
        # Processes that measure memory read the recipe again.
        source = str(find(recipe).absolute())
        return cls(plans, source, tuple(overrides), rounds, neighbour, out, write)


def plans_at(recipe: str, overrides: Sequence[str], timesteps: Sequence[int]) -> tuple[Plan, ...]:
    """A recipe's plan at each T; without any, at its own.

    Raises:
        UserError: the recipe cannot work.
    """
    own = read_plan(recipe, list(overrides))
    return tuple(read_plan(recipe, [*overrides, f"student.timesteps={steps}"]) for steps in timesteps) or (own,)


def section(plan: Plan) -> str:
    """The name of a recipe's section of a page, and of its files."""
    return f"step-{plan.recipe.name}-{plan.recipe.student.architecture}-{plan.device.type}"


# Of a row, in the order of the CSV file; those with `beside_` are measured beside a busy process.
FIGURES = (
    "median_ms",
    "p10_ms",
    "p90_ms",
    "images_per_second",
    "over_floor",  # the median of the rounds' ratios
    "over_floor_low",  # its 95 % interval
    "over_floor_high",
    "rounds",
)
COLUMNS = ("timesteps", "implementation", *FIGURES, *(f"beside_{name}" for name in FIGURES), "peak_bytes")
LEGEND = (
    "A whole training step, ms: median (10 % to 90 % quantile). Over the floor: the median of the rounds' ratios, with "
    "its 95 % interval. MiB: what a step takes beyond what lies there before. The floor: the convolutions and linear "
    "layers alone, the student's forward and backward and the teacher's forward."
)


class PeerUnit(nn.Module):
    """What `lasnn.network.units.NormSpike` is, of torch's batch norm and SpikingJelly's multi-step node, as its users
    write it.

    Input [T*B, C, H, W], or [B, C, H, W] where it is constant in time; output: spikes [T*B, C, H, W].
    """

    def __init__(self, channels: int | None, node: nn.Module):
        super().__init__()
        self.norm = nn.Identity() if channels is None else nn.BatchNorm2d(channels)
        self.node = node
        # Whether the node goes on from its last voltages, as in a stream.
        self.carries = False
        # Its network's, which sets it.
        self.time = TimeContext()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.carries:
            self.node.reset()
        current = self.time.unfold(self.norm(x))
        if residual is not None:
            current = current + self.time.unfold(residual)
        # Where it is constant in time it is expanded, which copies nothing.
        return self.node(current.expand(self.time.steps, *current.shape[1:])).flatten(0, 1)


def peer_network(plan: Plan) -> Staged:
    """The recipe's student of SpikingJelly's layers.

    Raises:
        UserError: SpikingJelly has no such neuron.
    """
    from spikingjelly.activation_based import neuron, surrogate

    table = plan.recipe.student
    shapes = {"atan": surrogate.ATan, "sigmoid": surrogate.Sigmoid}
    options = {"surrogate": "atan", "alpha": 2.0, **table.neuron.options}
    shape = options.pop("surrogate")
    if table.neuron.name not in ("lif", "if") or shape not in shapes:
        raise UserError(f"neuron {table.neuron.name!r} with the surrogate {shape!r} is not written for SpikingJelly")

    def node() -> nn.Module:
        given = {
            "v_threshold": options.get("threshold", 1.0),
            "v_reset": None if options.get("reset") == "soft" else options.get("v_reset", 0.0),
            "surrogate_function": shapes[shape](alpha=options["alpha"]),
            "detach_reset": options.get("detach_reset", False),
            "step_mode": "m",
        }
        if table.neuron.name == "if":
            return neuron.IFNode(**given)
        return neuron.LIFNode(tau=options.get("tau", 2.0), decay_input=options.get("decay_input", False), **given)

    network = make_network(table, lambda channels=None: PeerUnit(channels, node()), plan.data)
    for unit in network.modules():
        if isinstance(unit, PeerUnit):
            unit.time = network.time
    return network


class Steps:
    """The steps of one plan that are timed, each a function of the round's number.

    Args:
        plan: what is trained.
        folder: for the run that a training needs.
    """

    def __init__(self, plan: Plan, folder: Path):
        recipe, device = plan.recipe, plan.device
        self.plan = plan
        if device.type == "cpu":
            tune_allocator(chunks=recipe.time_chunk > 0)
        self.context = TrainingContext(
            plan.precision,
            device,
            Checkpoints(folder / STATE_FILE, recipe.save_minutes),
            StopRequest(),
            RunFolder(folder),
            Callback(),
        )
        size = (recipe.data.batch_size, plan.data.channels, plan.data.height, plan.data.width)
        draws = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=draws).to(device)
        self.labels = (torch.arange(size[0]) % len(plan.data.classes)).to(device)
        with keyed(recipe.seed, "bench"):
            self.teacher = (
                make_teacher(recipe, plan.data).eval().requires_grad_(False).to(device) if recipe.teacher else None
            )
            self.student = make_student(recipe, plan.data).to(device)
        self.begin = {name: value.clone() for name, value in self.student.network.state_dict().items()}

    def training(self, student: Student) -> Callable[[int], dict[str, Tensor]]:
        """The step of `lasnn distill`, of a student."""
        images = Images(self.pixels, self.labels)
        trainer = Trainer(student_phase(self.plan, student, self.teacher, images, images), self.context)
        student.train()
        images = self.pixels.float() / 255

        def step(number: int) -> dict[str, Tensor]:
            return trainer.train_step(Batch(0, number, images, self.labels, len(self.labels)))

        return step

    def peer(self) -> Callable[[int], dict[str, Tensor]]:
        """The same with SpikingJelly's layers, from the same weights."""
        student = Student(
            peer_network(self.plan), make_encoder(self.plan.recipe, self.plan.data), self.student.timesteps
        )
        student.network.load_state_dict(self.begin)
        return self.training(student.to(self.plan.device))

    def floor(self) -> Callable[[int], None]:
        """The convolutions and linear layers alone: the student's forward and backward, the teacher's forward."""
        calls = [Call(*seen, learns=True) for seen in layer_calls(self.student, self.pixels)]
        # A stem's gradient ends at its weights.
        calls[0].to_input = False
        if self.teacher is not None:
            calls += [Call(*seen, learns=False) for seen in layer_calls(self.teacher, self.pixels)]
        precision = Precision(self.context.precision, self.plan.device)

        def step(number: int) -> None:
            with precision.autocast():
                for call in calls:
                    call.run()

        return step


@dataclass
class Call:
    """One call of a convolution or linear layer, on its input's shape."""

    layer: nn.Module
    x: Tensor
    learns: bool
    to_input: bool = True
    gradient: Tensor | None = field(default=None, init=False)

    def run(self) -> None:
        """Forward and, where it learns, backward."""
        if not self.learns:
            with torch.no_grad():
                self.layer(self.x)
            return
        x = self.x.requires_grad_(self.to_input)
        y = self.layer(x)
        if self.gradient is None:
            self.gradient = torch.randn_like(y)
        torch.autograd.grad(y, [*self.layer.parameters(), *([x] if self.to_input else [])], self.gradient)


def layer_calls(network: Student | Teacher, pixels: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Each call of a convolution or linear layer in a forward pass: the layer, and a random input of its shape."""
    found: list[tuple[nn.Module, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = inputs[0]
        # Its memory order matters to the time.
        found.append((layer, torch.randn_like(x.float())))

    layers = [one for one in network.modules() if isinstance(one, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            if isinstance(network, Teacher):
                network(pixels.float() / 255)
            else:
                network.steps(pixels.float() / 255, (), torch.Generator(pixels.device).manual_seed(0))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def measure(options: Options, progress: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """Time the steps at each T, round by round, so that a slow spell of the machine meets all of them.

    Args:
        options: what to measure.
        progress: told of each part as it begins.

    Returns:
        `environment`: device, versions, threads, date; `recipe` and what else there is to know of it; `notes`; `rows`,
        one dict for each T and implementation with the keys `COLUMNS`; `kinds`, {T: {kind: share of lasnn's step}}.

    Raises:
        MachineError: lasnn's own step fails.
    """
    plan = options.plans[0]
    peer, notes = spikingjelly_version(plan.device)
    rows, kinds = [], {}
    for plan in options.plans:
        with TemporaryDirectory() as folder:
            found, of_kind, said = measure_plan(plan, options, Path(folder), peer is not None, progress)
        rows += found
        kinds[str(plan.recipe.student.timesteps)] = of_kind
        notes += [line for line in said if line not in notes]
    recipe = plan.recipe
    known = {**environment(plan.device), "spikingjelly": peer, **more_conditions(plan.device)}
    return {
        "environment": known,
        "recipe": recipe.name,
        "overrides": list(options.overrides),
        "student": recipe.student.architecture,
        "teacher": recipe.teacher.architecture if recipe.teacher else None,
        "image": [plan.data.channels, plan.data.height, plan.data.width],
        "batch_size": recipe.data.batch_size,
        "precision": plan.precision,
        "encoder": recipe.student.encoder_table.name,
        "losses": {loss.name: loss.weight for loss in recipe.losses},
        "notes": notes,
        "rows": rows,
        "kinds": kinds,
    }


def measure_plan(
    plan: Plan, options: Options, folder: Path, peer: bool, progress: Callable[[str], object]
) -> tuple[list[dict[str, Any]], dict[str, float], list[str]]:
    """The rows of one T, the kinds of time, and notes."""
    timesteps, batch, notes = plan.recipe.student.timesteps, plan.recipe.data.batch_size, []
    progress(f"T = {timesteps}: the first step")
    made = Steps(plan, folder)
    steps: dict[str, Callable[[int], Any]] = {LASNN: made.training(made.student)}
    loss = float(steps[LASNN](0)["loss"]) / batch
    if peer:
        try:
            step = made.peer()
            other = float(step(0)["loss"]) / batch
            if abs(other - loss) > SAME_LOSS * abs(loss):
                raise UserError(f"its first loss is {other:.4f} where lasnn's is {loss:.4f}: it is another network")
            steps[PEER] = step
        except Exception as error:
            notes.append(f"SpikingJelly is left out at T = {timesteps}: {first_line(error)}")
    steps[FLOOR] = made.floor()
    progress(f"T = {timesteps}: {options.rounds} rounds")
    quiet = turns(steps, plan.device, rounds=options.rounds)
    beside = None
    if options.neighbour:
        progress(f"T = {timesteps}: {options.rounds} rounds beside a busy process")
        with busy_neighbour():
            beside = turns(steps, plan.device, rounds=options.rounds)
    kinds = kinds_of_time(steps[LASNN], plan.device)
    rows = []
    for name in steps:
        row = {"timesteps": timesteps, "implementation": name, **figures(quiet, name, batch)}
        if beside:
            row |= {f"beside_{key}": value for key, value in figures(beside, name, batch).items()}
        if name != FLOOR:
            progress(f"T = {timesteps}: memory of {name}")
            row["peak_bytes"] = memory(plan, options, name)
        rows.append(row)
    return rows, kinds, notes


def figures(samples: Mapping[str, Sequence[float]], name: str, batch: int) -> dict[str, Any]:
    """Of one implementation's rounds: times in ms, images/s, and the ratio to the floor, paired round by round."""
    own, floor = samples[name], samples[FLOOR]
    middle, low, high = quantiles(own)
    ratios = [a / b for a, b in zip(own, floor, strict=True)]
    below, above = interval(ratios)
    return {
        "median_ms": middle,
        "p10_ms": low,
        "p90_ms": high,
        "images_per_second": 1e3 * batch / middle,
        "over_floor": median(ratios),
        "over_floor_low": below,
        "over_floor_high": above,
        "rounds": len(own),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the median from the values' order alone (Conover, Practical Nonparametric Statistics), six
    values or more.
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0.0, 0
    while rank < count // 2:
        outside += comb(count, rank) / 2**count
        if outside > 0.025:
            break
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[-rank]


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Within the block another process keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def kinds_of_time(step: Callable[[int], Any], device: torch.device, steps: int = 3) -> dict[str, float]:
    """Shares of a step's time by kind, from PyTorch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for number in range(steps):
            step(number)
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)
        found[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    whole = sum(found.values())
    return {kind: value / whole for kind, value in found.items()}


def memory(plan: Plan, options: Options, name: str) -> int | None:
    """Peak bytes of two steps above what lay there before, in a process of their own; None where it fails."""
    case = {
        "recipe": options.source,
        "overrides": [*options.overrides, f"student.timesteps={plan.recipe.student.timesteps}"],
        "implementation": name,
    }
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", "lasnn.bench.step", json.dumps(case)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str]) -> None:
    """Measure one case's memory, given as JSON; prints bytes."""
    case = json.loads(arguments[0])

    def steps(overrides: Sequence[str], folder: str) -> Callable[[int], Any]:
        made = Steps(read_plan(case["recipe"], [*case["overrides"], *overrides]), Path(folder))
        return made.training(made.student) if case["implementation"] == LASNN else made.peer()

    with TemporaryDirectory() as folder:
        # Loads all the code there is, which is no part of what a step takes.
        steps(["data.batch_size=2"], folder)(0)
        step = steps([], folder)
        device = read_plan(case["recipe"], case["overrides"]).device
        forget_peak(device)
        base = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()
        for number in range(2):
            step(number)
        print(peak_memory(device) - base)


def resident() -> int:
    """Bytes of this process in memory now."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory(torch.device("cpu"))
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells, a line for each T and implementation."""
    beside = any("beside_median_ms" in row for row in result["rows"])
    titles = ["T", "implementation", "ms", "images/s", "over the floor"]
    titles += ["beside a busy process: images/s", "over the floor there"] * beside + ["MiB"]
    lines = []
    for row in result["rows"]:
        line = [str(row["timesteps"]), row["implementation"]]
        line += [f"{row['median_ms']:.1f} ({row['p10_ms']:.1f}-{row['p90_ms']:.1f})", f"{row['images_per_second']:.0f}"]
        line.append(ratio(row, ""))
        if beside:
            line += [f"{row['beside_images_per_second']:.0f}", ratio(row, "beside_")]
        peak = row.get("peak_bytes")
        lines.append([*line, "" if peak is None else f"{peak / 2**20:.0f}"])
    return titles, lines


def ratio(row: Mapping[str, Any], where: str) -> str:
    """A row's ratio to the floor with its interval."""
    if row["implementation"] == FLOOR:
        return ""
    value, low, high = (row[f"{where}over_floor{end}"] for end in ("", "_low", "_high"))
    return f"{value:.2f} ({low:.2f}-{high:.2f})"


def head(result: Mapping[str, Any]) -> str:
    """What was measured, and where."""
    teacher = f" under {result['teacher']}" if result["teacher"] else ""
    image = " x ".join(map(str, result["image"]))
    sets = "".join(f" --set {one}" for one in result["overrides"])
    return (
        f"{result['recipe']}{sets}: {result['student']}{teacher}, batch {result['batch_size']} of {image}, "
        f"{result['precision']}, {result['encoder']} encoding; {page.conditions(result)}"
    )


def kinds_said(result: Mapping[str, Any]) -> list[str]:
    """A line for each T: where lasnn's step takes its time."""
    return [
        f"lasnn's step at T = {steps}: "
        + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items() if share >= 0.005)
        for steps, kinds in result["kinds"].items()
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """Conditions, table and notes."""
    lines = markdown_table(*table(result))
    return "\n".join([head(result) + ".", "", *lines, "", LEGEND, "", *kinds_said(result), *result["notes"], ""])


def save(result: Mapping[str, Any], options: Options) -> list[Path]:
    """Write the files of a result; see `lasnn.bench.page.save`."""
    name = section(options.plans[0])
    return page.save(name, result, result["rows"], COLUMNS, markdown(result), options.out, options.write)


if __name__ == "__main__":
    main(sys.argv[1:])
