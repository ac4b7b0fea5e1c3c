"""`lasnn bench kernels`: each op forward and backward beside its peers, and no speed of one that is wrong.

Shapes: T time steps, B batch, C channels, H x W pixels; images are [T*B, C, H, W], or [B, C, H, W] if constant in time.
"""

import importlib.metadata
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasnn import kernels
from lasnn.bench.page import folder_problems, make_folder, page_problems
from lasnn.bench.report import COLUMNS, section
from lasnn.bench.timing import Times, copy_gb_per_s, kept_bytes, take_turns
from lasnn.errors import UserError, unknown
from lasnn.factory import pick_device
from lasnn.kernels import reference
from lasnn.kernels.layout import segments
from lasnn.run import environment

OPS = ("lif", "norm_lif", "norm_lif+residual", "norm_lif+constant", "attention_map")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE = 30_000_000

# B, C, H, W, and whether in channels_last. For a GPU the stages of a network for 32 x 32 images and one of ImageNet's
# size; for a CPU a first stage, two of the quickstart's and a last one.
IMAGES = {
    "cuda": [
        ((64, 128, 32, 32), False),
        ((64, 128, 32, 32), True),
        ((64, 256, 16, 16), False),
        ((64, 512, 8, 8), False),
        ((64, 64, 56, 56), False),
    ],
    "cpu": [
        ((16, 128, 32, 32), False),
        ((100, 16, 28, 28), False),
        ((100, 32, 14, 14), False),
        ((100, 32, 14, 14), True),
        ((16, 512, 4, 4), False),
    ],
}
QUICK = [((2, 8, 6, 6), False), ((2, 8, 6, 6), True)]

# Correctness. Arithmetic is fp32 and the reference's fp64, so a spike may differ where h is within a rounding of the
# threshold; more than this share is a fault.
MOST_FLIPS = 1e-4
# Largest error of a gradient, as a share of its largest value and as a ratio of norms. In half precision gradients are
# rounded when written, twice with a residual: one unit in the last place.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 1.1e-3, torch.bfloat16: 8.5e-3}
# Elements up to which the check runs on the shape that is timed, and beyond which on fewer images.
CHECKED = {"cuda": 2**25, "cpu": 2**20}


@dataclass(frozen=True)
class Options:
    """What to measure and where to leave it; made by `read`, which checks it."""

    device: torch.device
    timesteps: tuple[int, ...]
    dtypes: tuple[str, ...]
    ops: tuple[str, ...]
    quick: bool
    out: Path
    write: Path | None

    @classmethod
    def read(
        cls,
        device: str = "auto",
        timesteps: str | None = None,
        dtype: str | None = None,
        op: str | None = None,
        quick: bool = False,
        out: Path = Path("runs/bench"),
        write: Path | None = None,
    ) -> "Options":
        """Options from what a user typed; lists are separated by commas, None is the device's default. Makes `out`.

        Raises:
            UserError: with a line for every mistake.
        """
        problems = []
        try:
            where = pick_device(device)
        except UserError as error:
            where = None
            problems.append(f"--device: {error}")
        whole = where is not None and where.type == "cuda" and not quick
        steps = items(timesteps or ("4,8,16,32" if whole else "4"))
        if not all(step.isdecimal() and int(step) >= 1 for step in steps):
            problems.append(f"--timesteps {timesteps}: give whole numbers of at least 1, as 4 or 4,8,16")
        dtypes = items(dtype or ("fp32,bf16" if whole else "fp32"))
        problems += [f"--dtype: {unknown('dtype', name, DTYPES)}" for name in dtypes if name not in DTYPES]
        ops = items(op or ",".join(OPS))
        problems += [f"--op: {unknown('op', name, OPS)}" for name in ops if name not in OPS]
        problems += folder_problems(out)
        if write is not None and where is not None:
            problems += page_problems(write, section(where.type))
        if problems:
            raise UserError(*problems)
        make_folder(out)
        return cls(where, tuple(map(int, steps)), tuple(dtypes), tuple(ops), quick, out, write)

    def cases(self) -> list["Case"]:
        """Every combination of dtype, op and shape at the first T, at the others the first shape alone."""
        # Each T, shape and dtype is a compilation of its own; all of them would take a GPU half an hour.
        images = QUICK if self.quick else IMAGES[self.device.type]
        return [
            Case(op, image, steps, dtype, last)
            for dtype in self.dtypes
            for op in self.ops
            for steps in self.timesteps
            for image, last in (images if steps == self.timesteps[0] else images[:1])
        ]


def items(text: str) -> list[str]:
    """The parts of a list that is separated by commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


@dataclass(frozen=True)
class Case:
    """An op on an input."""

    op: str
    image: tuple[int, int, int, int]
    timesteps: int
    dtype: str
    channels_last: bool = False

    @property
    def elements(self) -> int:
        """T*B*C*H*W, also where the input is constant in time."""
        return self.timesteps * torch.Size(self.image).numel()

    @property
    def bytes_moved(self) -> float:
        """Bytes that a forward and a backward pass of lasnn's op must move."""
        return self.elements * bytes_per_element(self.op, self.timesteps, DTYPES[self.dtype].itemsize)

    @property
    def constant(self) -> bool:
        return self.op.endswith("+constant")

    @property
    def spiking(self) -> bool:
        return self.op != "attention_map"

    def __str__(self) -> str:
        last = " channels_last" if self.channels_last else ""
        return f"{self.op} {self.timesteps} x {'x'.join(map(str, self.image))}{last} {self.dtype}"

    def unfold(self, images: Tensor) -> Tensor:
        """[T*B, C, H, W] -> [T, B, C, H, W], a view."""
        return images.unflatten(0, (self.timesteps, -1))

    def inputs(self, device: torch.device, seed: int = 0) -> "Inputs":
        """Random inputs and a gradient that differs everywhere; for a map, spikes of which a fifth is 1."""
        batch, channels, height, width = self.image
        generator = torch.Generator(device).manual_seed(seed)

        def images(count: int) -> Tensor:
            values = torch.randn(count, channels, height, width, device=device, generator=generator)
            order = torch.channels_last if self.channels_last else torch.contiguous_format
            return values.to(DTYPES[self.dtype]).contiguous(memory_format=order)

        x = images(batch if self.constant else self.timesteps * batch)
        if not self.spiking:
            maps = torch.randn(batch, height * width, device=device, generator=generator)
            return Inputs((x > 0.84).to(x.dtype).requires_grad_(), None, maps)
        residual = images(self.timesteps * batch).requires_grad_() if self.op.endswith("+residual") else None
        return Inputs(x.requires_grad_(), residual, images(self.timesteps * batch))


def bytes_per_element(op: str, timesteps: int, itemsize: int) -> float:
    """Bytes that lasnn's op moves for each element and step, forward and backward, counted in kernels/README.md.

    Each reading or writing of a tensor of T steps counts `itemsize`, of one step `itemsize`/T, of an fp32 state 4/T.
    The count is the GPU's; a CPU reads and writes a little more, most of it in cache.

    Args:
        op: one of `OPS`.
        timesteps: T. Every segment of 8 steps after the first has its first state saved.
        itemsize: bytes of an element.
    """
    saved = segments(timesteps)[0] - 1
    whole, once, states = {
        # x, spikes; x, gradient, dx. v_last is a state, written.
        "lif": (5, 0, 1 + 2 * saved),
        # y; y, spikes; gradient, y; gradient, y, dy. Saved states are written once and read by both passes backward.
        "norm_lif": (8, 0, 3 * saved),
        # y; y, residual, spikes; gradient, y, residual, g; g, y, dy.
        "norm_lif+residual": (11, 0, 2 * saved),
        # Whole: spikes; gradient. One step: y; y; y, g; g, y, dy.
        "norm_lif+constant": (2, 7, 2 * saved),
        # x; x. One step: dx, the same for all.
        "attention_map": (2, 1, 0),
    }[op]
    return whole * itemsize + (once * itemsize + 4 * states) / timesteps


class Inputs(NamedTuple):
    """Input, residual where there is one, and the gradient of the output."""

    x: Tensor
    residual: Tensor | None
    gradient: Tensor

    def double(self) -> "Inputs":
        """The same values in fp64."""
        x, residual = (t if t is None else t.detach().double().requires_grad_() for t in self[:2])
        return Inputs(x, residual, self.gradient.double())


class Layer(NamedTuple):
    """One implementation of a case: images and residual -> spikes [T*B, C, H, W] or maps [B, H*W]."""

    forward: Callable[[Tensor, Tensor | None], Tensor]
    norm: nn.BatchNorm2d | None = None

    def leaves(self, inputs: Inputs) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        found = {"input": inputs.x, "residual": inputs.residual}
        if self.norm is not None:
            found |= {"weight": self.norm.weight, "bias": self.norm.bias}
        return {name: leaf for name, leaf in found.items() if leaf is not None}

    def run(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Forward and backward."""
        output = self.forward(inputs.x, inputs.residual)
        return torch.autograd.grad(output, list(self.leaves(inputs).values()), inputs.gradient)


def batch_norm(case: Case, device: torch.device, kind: type = nn.BatchNorm2d, **options: Any) -> nn.BatchNorm2d:
    """In training mode; no two channels alike."""
    norm = kind(case.image[1], **options).to(device)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, len(norm.weight)))
        norm.bias.copy_(torch.linspace(-0.3, 0.5, len(norm.bias)))
    return norm


def fused(case: Case, device: torch.device, ops: ModuleType, dtype: torch.dtype = torch.float32) -> Layer:
    """The op of `lasnn.kernels`, or of its reference, with a batch norm in `dtype`."""
    if case.op == "lif":
        return Layer(lambda x, _: ops.lif(case.unfold(x))[0].flatten(0, 1))
    if case.op == "attention_map":
        return Layer(lambda x, _: ops.attention_map(case.unfold(x), 2, "rate"))
    norm = batch_norm(case, device).to(dtype)

    def forward(y: Tensor, residual: Tensor | None) -> Tensor:
        spikes, batch = ops.norm_lif(y, norm, residual, timesteps=case.timesteps, constant=case.constant)
        # As a student's unit does, and as the peers' batch norm does inside.
        kernels.update_running_statistics(norm, batch)
        return spikes

    return Layer(forward, norm)


def norm_then_lif(case: Case, device: torch.device) -> Layer:
    """torch's batch norm and an addition, then lasnn's lif: what fusing them saves."""
    norm = batch_norm(case, device)

    def forward(y: Tensor, residual: Tensor | None) -> Tensor:
        x = norm(y) if residual is None else norm(y) + residual
        x = x.unsqueeze(0) if case.constant else case.unfold(x)
        return kernels.lif(x, timesteps=case.timesteps)[0].flatten(0, 1)

    return Layer(forward, norm)


def spikingjelly(case: Case, device: torch.device, autocast: bool = False) -> Layer:
    """SpikingJelly's multi-step layers as its user writes them, in their fastest configuration or under autocast.

    What LIFNode 2.0 does with [T, ...]: on the CPU a loop of torch operations over the steps. On CUDA in fp32 its
    compiled extension where one was built from source, else its Triton kernel; both keep h in fp32. It gives the
    state the input's type and has no kernel for a half-precision state, so with half inputs, under autocast or not, it
    takes the torch loop and says so in its log alone. The way out is a precision configuration: with `neuron_storage`
    its Triton kernel keeps h in half precision, 12 bytes an element and step instead of 16 with fp32 states.
    """
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    node = neuron.LIFNode(tau=2.0, decay_input=False, surrogate_function=surrogate.ATan(alpha=2.0), step_mode="m")
    dtype = DTYPES[case.dtype]
    if device.type == "cuda" and case.dtype != "fp32" and not autocast:
        from spikingjelly.activation_based.precision import prepare_model_for_precision

        prepare_model_for_precision(node, device, {"neuron_storage": case.dtype})
    norm = batch_norm(case, device, layer.BatchNorm2d, step_mode="m") if case.op != "lif" else None

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        functional.reset_net(node)
        with torch.autocast(device.type, dtype) if autocast else nullcontext():
            # An input that is constant in time is normalised once, then expanded, which copies nothing.
            x = x.unsqueeze(0) if case.constant else case.unfold(x)
            x = x if norm is None else norm(x)
            x = x if residual is None else x + case.unfold(residual)
            return node(x.expand(case.timesteps, *x.shape[1:])).flatten(0, 1)

    return Layer(forward, norm)


def implementations(case: Case, device: torch.device, peers: bool) -> dict[str, Callable[[], Layer]]:
    """What is timed in a case, lasnn first, each to be made when its turn comes."""
    found = {"lasnn": lambda: fused(case, device, kernels)}
    if case.op.startswith("norm_lif"):
        found["batch norm, then lif"] = lambda: norm_then_lif(case, device)
    # On a GPU the definition under plain autograd tells nothing where there are peers.
    if device.type == "cpu" or not case.spiking:
        found["reference"] = lambda: fused(case, device, reference)
    if peers and case.spiking:
        found["SpikingJelly"] = lambda: spikingjelly(case, device)
        if device.type == "cuda" and case.dtype != "fp32":
            found["SpikingJelly, autocast"] = lambda: spikingjelly(case, device, autocast=True)
    return found


class Wrong(Exception):
    """A result that is not the reference's."""


class Agreement(NamedTuple):
    """How near a result is to the reference's: share of differing spikes, largest relative error of all else."""

    flips: float
    error: float


def check(case: Case, device: torch.device) -> Agreement:
    """Compare lasnn's op with the reference in fp64 on the same inputs, on fewer images where they are many.

    At most `MOST_FLIPS` of the spikes may differ. At the neurons where one does, at any step, the spikes' gradient is
    set to 0 in both, so that they have no part in any gradient; then every gradient must agree everywhere.

    Raises:
        Wrong: something does not agree.
    """
    batch, *rest = case.image
    fewer = max(1, min(batch, CHECKED[device.type] // (case.elements // batch)))
    case = replace(case, image=(fewer, *rest))
    inputs = case.inputs(device)
    doubles = inputs.double()
    got_layer, wanted_layer = fused(case, device, kernels), fused(case, device, reference, torch.float64)
    got = got_layer.forward(inputs.x, inputs.residual)
    wanted = wanted_layer.forward(doubles.x, doubles.residual)
    if got.shape != wanted.shape:
        raise Wrong(f"the output is {list(got.shape)}, not {list(wanted.shape)}")
    flips, gradient = 0.0, inputs.gradient
    if case.spiking:
        # A NaN differs from everything.
        differ = got.double() != wanted
        flips = differ.double().mean().item()
        if flips > MOST_FLIPS:
            raise Wrong(f"{flips:.2%} of the spikes differ")
        gradient = case.unfold(gradient).masked_fill(case.unfold(differ).any(0), 0).flatten(0, 1)
    results = {} if case.spiking else {"the maps": (got, wanted)}
    if got_layer.norm is not None:
        for name in ("running_mean", "running_var"):
            results[name] = getattr(got_layer.norm, name), getattr(wanted_layer.norm, name)
    leaves = got_layer.leaves(inputs)
    got_gradients = torch.autograd.grad(got, list(leaves.values()), gradient)
    wanted_gradients = torch.autograd.grad(wanted, list(wanted_layer.leaves(doubles).values()), gradient.double())
    for name, *pair in zip(leaves, got_gradients, wanted_gradients, strict=True):
        results[f"the gradient of {name}"] = pair
    largest = 0.0
    for name, (a, b) in results.items():
        error, tolerance = difference(a, b), TOLERANCE[a.dtype]
        # Not `>`, which a NaN would pass.
        if not error <= tolerance:
            raise Wrong(f"{name} is off by {error:.2g}, more than {tolerance:g}")
        largest = max(largest, error)
    return Agreement(flips, largest)


def difference(got: Tensor, wanted: Tensor) -> float:
    """The larger of two errors: the largest, over the largest wanted value, and the norm's, over the wanted norm."""
    off = got.double() - wanted
    return torch.stack([off.norm(p) / wanted.norm(p) for p in (float("inf"), 2)]).max().item()


def measure(options: Options, progress: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """Check and time every case.

    Args:
        options: what to measure.
        progress: told of each case as it begins.

    Returns:
        `environment`: device, versions, threads, date; `copy_gb_per_s`; `notes`; `rows`, one dict for each case and
        implementation with the keys `COLUMNS` of `lasnn.bench.report`, None where there is nothing to say. Where
        lasnn's op is wrong or fails, its row says so in `status` and the case has no other.
    """
    device = options.device
    found, notes = spikingjelly_version(device)
    peers = found is not None
    conditions = {**environment(device), "spikingjelly": found, **more_conditions(device)}
    cases = options.cases()
    rows: list[dict[str, Any]] = []
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if peers and device.type == "cuda":
            from spikingjelly.activation_based.functional import neuron_implementation

            # It asks for a device with a number.
            kind = neuron_implementation("lif", torch.device("cuda", torch.cuda.current_device()))["implementation"]
            notes.append(f"SpikingJelly's LIF here: {kind} in fp32, triton with states in half precision otherwise")
        progress("copy bandwidth")
        bandwidth = copy_gb_per_s(device, (2**24 if options.quick else 2**28) * (2 if device.type == "cuda" else 1))
        for number, case in enumerate(cases, start=1):
            progress(f"{number}/{len(cases)}  {case}")
            rows += measure_case(case, options, peers, bandwidth)
            if device.type == "cuda":
                # What one case leaves in the allocator is in the way of the next, of other sizes.
                torch.cuda.empty_cache()
    return {"environment": conditions, "copy_gb_per_s": bandwidth, "notes": notes, "rows": rows}


def spikingjelly_version(device: torch.device) -> tuple[str | None, list[str]]:
    """SpikingJelly's version where it can be compared with on a device; otherwise None, and a note that says why."""
    try:
        import spikingjelly  # noqa: F401
    except ImportError:
        return None, ["SpikingJelly is not installed, and left out: pip install 'lasnn[bench]'"]
    found = importlib.metadata.version("spikingjelly")
    if not found.startswith("2.0."):
        return None, [f"SpikingJelly {found} is left out: the comparison is written for 2.0"]
    if torch.version.hip and device.type == "cuda":
        return None, ["SpikingJelly is left out: it needs an NVIDIA GPU"]
    return found, []


def more_conditions(device: torch.device) -> dict[str, Any]:
    """What speed depends on besides a run's environment."""
    known: dict[str, Any] = {"date": datetime.now().astimezone().isoformat(timespec="seconds")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = Path("/proc/driver/nvidia/version")
        number = re.search(r"\d{3}\.[\d.]+", driver.read_text()) if driver.is_file() else None
        known |= {
            "cuda": torch.version.cuda,
            "driver": number and number.group(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        known["processor"] = names[0] if names else None
    return known


def measure_case(case: Case, options: Options, peers: bool, bandwidth: float) -> list[dict[str, Any]]:
    """The rows of one case; one row alone where lasnn's op is wrong or fails."""
    try:
        return checked_and_timed(case, options, peers, bandwidth)
    except Wrong as wrong:
        return [row(case, "lasnn", f"wrong: {wrong}")]
    except Exception as error:
        # A kernel that does not run, or memory that is too small, must not cost the other rows of a long measurement.
        return [row(case, "lasnn", f"failed: {first_line(error)}")]


def checked_and_timed(case: Case, options: Options, peers: bool, bandwidth: float) -> list[dict[str, Any]]:
    """lasnn's row and those of the others; one of them that fails has its error for a status."""
    device = options.device
    agreement = check(case, device)
    sets = [case.inputs(device, seed) for seed in range(input_sets(case, device))]
    steps, kept, failed = {}, {}, {}
    for name, make in implementations(case, device, peers).items():
        try:
            layer = make()
            kept[name] = kept_bytes(lambda layer=layer: layer.forward(sets[0].x, sets[0].residual))
            layer.run(sets[0])
            steps[name] = lambda number, layer=layer: layer.run(sets[number % len(sets)])
        except Exception as error:
            if name == "lasnn":
                raise
            failed[name] = f"failed: {first_line(error)}"
    effort = (0.05, 3) if options.quick else (0.5, 10) if device.type == "cuda" else (1.0, 5)
    times = take_turns(steps, device, seconds=effort[0], rounds=effort[1])
    rows = [row(case, name, "ok", times[name], times["lasnn"].median, kept[name]) for name in times]
    rate = case.bytes_moved / times["lasnn"].median / 1e6
    rows[0] |= {
        "bytes": round(case.bytes_moved),
        "gb_per_s": rate,
        "share_of_copy": rate / bandwidth,
        "spikes_differ": agreement.flips if case.spiking else None,
        "largest_error": agreement.error,
    }
    return rows + [row(case, name, status) for name, status in failed.items()]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def input_sets(case: Case, device: torch.device) -> int:
    """How many sets of inputs to take in turn, so that none is still in the GPU's cache from the round before."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = case.elements * DTYPES[case.dtype].itemsize
    return max(1, min(16, -(-2 * cache // size)))


def row(
    case: Case,
    implementation: str,
    status: str,
    times: Times | None = None,
    lasnn_ms: float | None = None,
    kept: int | None = None,
) -> dict[str, Any]:
    """One row of the result; times are in milliseconds."""
    known = dict.fromkeys(COLUMNS) | asdict(case)
    known |= {"implementation": implementation, "status": status, "kept_bytes": kept}
    known |= {"elements": case.elements, "large": case.elements > LARGE}
    if times is not None:
        known |= {
            "median_ms": times.median,
            "p10_ms": times.low,
            "p90_ms": times.high,
            "runs": times.runs,
            "issue_ms": times.host,
            "times_lasnn": times.median / lasnn_ms,
        }
    return known
