"""Compiles what the launchers launch, for GPUs that are not here; prints a line of JSON for each kernel.

    python compile_kernels.py default|full [table]

The launchers run as they are, with a driver that only says which GPU there is, and every launch stops after
compiling. Run by test_triton_compiled.py in a process of its own, where Triton's interpreter is off. With `table` the
registers of each thread are printed instead.
"""

import inspect
import json
import operator
import re
import subprocess
import sys
import tempfile
from itertools import product
from math import prod
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernel_cases import pairwise
from lasnn.kernels import SURROGATES
from lasnn.kernels.triton.attention import attention_backward, attention_forward
from lasnn.kernels.triton.lif import lif_backward, lif_forward
from lasnn.kernels.triton.norm_lif import norm_grad, norm_lif_forward, norm_lif_grad, norm_lif_sums, norm_statistics

TARGETS = {f"cuda{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
try:
    # Older Triton (3.4) links AMD's code with ROCm's own linker; newer brings one along.
    getattr(HIPBackend, "path_to_rocm_lld", lambda: None)()
    TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
except Exception as error:
    print(f"gfx942 left out: {error}", file=sys.stderr)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIMESTEPS = (1, 4, 8, 15, 32)
LAYOUTS = ("dense", "strided", "constant")
# Images whose elements, and positions, are more than 32 bits count.
HUGE = (2**24, 16, 16, 16)


class Absent:
    """A driver for a GPU that is not here."""

    def __init__(self, name):
        self.get_current_target = lambda: TARGETS[name]
        # Triton keeps what it compiled by device: each target is another one.
        self.get_current_device = lambda: list(TARGETS).index(name)
        self.get_current_stream = lambda device: 0


launch = JITFunction.run
# What every launch in progress adds: launch options, and what its row of the report says.
extra, what = {}, {}
rows, seen = [], set()


def compile_only(self, *args, grid, warmup, **kwargs):
    if not what["target"].startswith("cuda"):
        # As PyTorch's build for AMD leaves it out.
        kwargs.pop("maxnreg", None)
    compiled = launch(self, *args, grid=grid, warmup=True, **{**kwargs, **extra})
    # A kernel that does not depend on what varies is compiled, and reported, once.
    if id(compiled) in seen:
        return
    seen.add(id(compiled))
    values = dict(zip(inspect.signature(self.fn).parameters, args, strict=False)) | kwargs
    asm = compiled.asm
    row = {"kernel": self.fn.__name__.removesuffix("_kernel"), **what, **extra}
    if "SUMS" in values:
        row["kernel"] += "_sums" if values["SUMS"] else "_grad"
    row["int32"], row["reach"] = largest_indices(asm["ttir"], grid, arguments(compiled.src.signature, values))
    for op in ("load", "store"):
        row[f"tile_{op}s"] = tile_accesses(op, asm["ttgir"], compiled.metadata.num_warps)
    if "ptx" in asm:
        row["fma"] = len(re.findall(r"\bfma\.", asm["ptx"]))
        row["unrounded"] = len(re.findall(r"\b(?:add|sub|mul)\.f32", asm["ptx"]))
        for name, op in (("loads", "ld"), ("stores", "st")):
            row[name] = len(re.findall(rf"\b{op}\.global", asm["ptx"]))
            widths = (r"\.v4\.[bu]32", r"(?:\.v2\.[bu]32|\.[bu]64)")
            row[f"wide_{name}"] = [len(re.findall(rf"\b{op}\.global\S*{width}", asm["ptx"])) for width in widths]
        row["registers"], row["spilled"] = resources(asm["cubin"])
    else:
        row["spilled"] = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", asm["amdgcn"])[1])
        row["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", asm["amdgcn"])[1])
    rows.append(row)


def tile_accesses(op: str, ttgir: str, num_warps: int) -> list[int]:
    """How many instructions of 16 bytes, and how many of 8, a thread needs for its share of the kernel's tiles.

    What is one number a channel is less than that, and is no tile.
    """
    needed = [0, 0]
    for shape, bits in re.findall(rf"tt\.{op} .*: tensor<((?:\d+x)+)!tt\.ptr<\D+(\d+)>, #", ttgir):
        size = prod(map(int, shape.split("x")[:-1])) * int(bits) // 8 // (32 * num_warps)
        needed[0] += size // 16
        needed[1] += size == 8
    return needed


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack) as cuobjdump, which comes with Triton, reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return int(found[1]), int(found[2])


# The largest result of an operation on integers or pointers (their offset) that are at most so large, and at least 0.
LARGEST = {
    "arith.addi": operator.add,
    "tt.addptr": operator.add,
    "arith.muli": operator.mul,
    "arith.subi": max,
    "arith.maxsi": max,
    "arith.minsi": min,
    "arith.divsi": lambda a, b: a // max(b, 1),
    "arith.remsi": lambda a, b: min(a, b - 1),
    "arith.select": lambda condition, a, b: max(a, b),
    **dict.fromkeys(
        ("arith.extsi", "arith.trunci", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape"), lambda a: a
    ),
}
WHOLE = re.compile(r"(?:tensor<[\dx]*)?(i32|i64|!tt\.ptr<\w+>)>?$")


def arguments(signature, values) -> list:
    """The arguments that are left in compiled code, in order: no constants, tuples flattened."""
    left = []
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            left += arguments(dict(enumerate(kind)), values[name])
        elif kind != "constexpr":
            left.append(values[name])
    return left


def largest_indices(ttir: str, grid: tuple[int, ...], arguments: list) -> tuple[int, int]:
    """The largest integer that is held in 32 bits, and the largest offset from a pointer, for these arguments.

    Divisors are sizes, which arguments and constants give exactly; all else is bounded from above. An operation that
    is not known here is an error.
    """
    signature = re.search(r"tt\.func public .*", ttir)[0]
    symbols = re.findall(r"(%[\w.]+): ([^ ,)]+)", signature)
    largest = {
        symbol: 0 if kind.startswith("!tt.ptr") else value
        for (symbol, kind), value in zip(symbols, arguments, strict=True)
    }
    int32 = reach = 0
    for line in ttir.splitlines():
        line = re.sub(r" loc\(.*", "", line.strip())
        if loop := re.search(r"scf\.for (%\w+) = \S+ to (%[\w.]+) (.*)", line):
            carried = loop[3].partition("-> (")[2].partition(")")[0].split(", ")
            assert not any(WHOLE.match(kind) for kind in carried), line
            largest[loop[1]] = largest[loop[2]] - 1
            continue
        found = re.match(r"(%\w+) = ([\w.]+) (.*?) : (?:.* (?:to|->) )?([^:]*)$", line)
        whole = found and WHOLE.match(found[4].split(", ")[0])
        # The type that these two print is their operands'.
        if not whole or found[2] in ("arith.cmpi", "tt.load"):
            continue
        result, op, operands, _ = found.groups()
        if op == "arith.constant":
            value = abs(int(re.search(r"-?\d+", operands)[0]))
        elif op == "tt.get_program_id":
            value = grid["xyz".index(operands)] - 1
        elif op == "tt.make_range":
            value = int(re.search(r"end = (\d+)", operands)[1]) - 1
        else:
            value = LARGEST[op](*(largest.get(operand) for operand in re.findall(r"%[\w.]+(?:#\d+)?", operands)))
        largest[result] = value
        if whole[1] == "i32":
            int32 = max(int32, value)
        elif op == "tt.addptr":
            reach = max(reach, value)
    return int32, reach


def use(target: str, dtype: torch.dtype, timesteps: int, *variant: str) -> None:
    """`variant`: what is not the default, in words; empty ones are left out."""
    driver.set_active(Absent(target))
    what.clear()
    words = " ".join(filter(None, variant))
    what.update(target=target, dtype=str(dtype).removeprefix("torch."), T=timesteps, variant=words)


def neuron(learnt: bool, surrogate: str, v_reset: float | None, detach: bool) -> tuple[str, ...]:
    soft = "soft reset" * (v_reset is None)
    return "learnt" * learnt, surrogate * (surrogate != "atan"), soft, "detached reset" * detach


def lif(
    target,
    dtype,
    timesteps,
    layout="dense",
    learnt=False,
    surrogate="atan",
    v_reset=0.0,
    detach=False,
    shape=(2, 16, 16, 32),
    device="cpu",
):
    use(target, dtype, timesteps, layout * (layout != "dense"), *neuron(learnt, surrogate, v_reset, detach))
    x = torch.empty(1 if layout == "constant" else timesteps, *shape, dtype=dtype, device=device)
    x = x[..., ::2] if layout == "strided" else x
    v0, decay = (torch.empty(x.shape[1:], device=device), torch.tensor(0.5)) if learnt else (None, None)
    options = (timesteps, 0.3, 0.7, learnt, v_reset, surrogate, 2.5, detach)
    spikes, v_last, saved_states = lif_forward(x, v0, decay, *options)
    lif_backward(spikes, v_last if learnt else None, x, v0, decay, saved_states, *options)


def images(count, shape, dtype, channels_last, device):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(count, *shape, dtype=dtype, device=device, memory_format=memory)


def norm_lif(
    target,
    dtype,
    timesteps,
    channels_last=False,
    residual=False,
    constant=False,
    learnt=False,
    state=False,
    train=True,
    surrogate="atan",
    v_reset=0.0,
    detach=False,
    shape=(2, 64, 16, 16),
    device="cpu",
):
    flags = "channels_last" * channels_last, "residual" * residual, "constant" * constant, "state" * state
    use(target, dtype, timesteps, *flags, "eval" * (not train), *neuron(learnt, surrogate, v_reset, detach))
    batch, *image = shape
    y = images(batch if constant else timesteps * batch, image, dtype, channels_last, device)
    weight = bias = torch.empty(image[0], device=device)
    decay = torch.tensor(0.5, device=device) if learnt else None
    statistics = norm_statistics(y)
    parameters = (statistics, weight, bias, decay)
    means = statistics if train else None
    dynamics = (0.3, 0.7, learnt, v_reset, surrogate, 2.5, detach)
    write, other = residual or constant, y if residual else None
    v0 = images(batch, image, torch.float32, channels_last, device) if state else None
    options = (1e-5, timesteps, constant)
    spikes, _, saved_states = norm_lif_forward(y, other, v0, *parameters, 0, *options, state, *dynamics)
    norm_lif_sums(spikes, v0, y, other, v0, *parameters, saved_states, write, *options, *dynamics)
    if write:
        norm_grad(y, y, statistics, weight, means, 1e-5)
    else:
        norm_lif_grad(spikes, v0, y, v0, *parameters, saved_states, means, 1e-5, timesteps, *dynamics)


def attention(
    target, temporal, power, channels_last, dtype=torch.bfloat16, timesteps=4, shape=(2, 64, 16, 16), device="cpu"
):
    use(target, dtype, timesteps, temporal, f"power {power}", "channels_last" * channels_last)
    batch, *image = shape
    x = images(timesteps * batch, image, dtype, channels_last, device).unflatten(0, (timesteps, batch))
    attention_backward(attention_forward(x, power, temporal), x, power, temporal)


@triton.jit
def overflowing_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 0.0)


def huge(stateful):
    """Tensors on no device, where nothing is allocated; and a kernel whose offsets do not hold them."""
    seen.clear()
    at = {"shape": HUGE, "device": "meta"}
    use("cuda90", torch.bfloat16, 1, "32-bit offsets")
    overflowing_kernel[(prod(HUGE) // 1024,)](torch.empty(HUGE, device="meta"), 1024, enable_fp_fusion=False)
    lif("cuda90", torch.bfloat16, 15, **at)
    lif("cuda90", torch.bfloat16, 4, "strided", **at)
    for last in (False, True):
        for state in stateful:
            norm_lif("cuda90", torch.bfloat16, 15, last, state=state, **at)
        norm_lif("cuda90", torch.bfloat16, 4, last, residual=True, constant=True, **at)
        attention("cuda90", "map", 2, last, **at)


def default(stateful=(True,)):
    lif("cuda90", torch.bfloat16, 4)
    extra["enable_fp_fusion"] = True
    lif("cuda90", torch.bfloat16, 4)
    extra.clear()
    lif("cuda80", torch.bfloat16, 15, "strided", learnt=True)
    lif("cuda100", torch.float32, 4, v_reset=None)
    attention("cuda90", "rate", 2, False)
    attention("cuda90", "step", 2, True)
    for target in TARGETS:
        norm_lif(target, torch.bfloat16, 4, channels_last=True)
    norm_lif("cuda90", torch.bfloat16, 4)
    norm_lif("cuda90", torch.bfloat16, 4, residual=True)
    norm_lif("cuda90", torch.bfloat16, 8, channels_last=True, state=True)
    norm_lif("cuda80", torch.float16, 8, constant=True)
    norm_lif("cuda100", torch.float32, 15, True, residual=True, learnt=True, train=False)
    if "gfx942" in TARGETS:
        lif("gfx942", torch.bfloat16, 4)
        attention("gfx942", "map", 1.5, True)
    huge(stateful)


def full():
    default(stateful=(False, True))
    for target, dtype, timesteps, layout in product(TARGETS, DTYPES, TIMESTEPS, LAYOUTS):
        lif(target, dtype, timesteps, layout)
        if layout == "strided":
            lif(target, dtype, timesteps, layout, learnt=True)
    # What networks are made of: blocks without and with a shortcut, and the stem of an input constant in time.
    for target, dtype, timesteps, last in product(TARGETS, DTYPES, TIMESTEPS, (False, True)):
        norm_lif(target, dtype, timesteps, last)
        norm_lif(target, dtype, timesteps, last, residual=True)
        norm_lif(target, dtype, timesteps, last, constant=True)
        # The same in chunks of time.
        norm_lif(target, dtype, timesteps, last, state=True)
        norm_lif(target, dtype, timesteps, last, residual=True, state=True)
    for target, last, residual in product(TARGETS, (False, True), (False, True)):
        norm_lif(target, torch.bfloat16, 8, last, residual, learnt=True)
    flags = dict.fromkeys(("channels_last", "residual", "constant", "learnt", "state", "train"), (False, True))
    for case in pairwise({"target": tuple(TARGETS), "dtype": DTYPES, "timesteps": TIMESTEPS, **flags}):
        norm_lif(**case)
    for surrogate, v_reset, detach in product(SURROGATES, (0.0, None), (False, True)):
        lif("cuda90", torch.bfloat16, 8, surrogate=surrogate, v_reset=v_reset, detach=detach)
        for last in (False, True):
            norm_lif("cuda90", torch.bfloat16, 8, last, surrogate=surrogate, v_reset=v_reset, detach=detach)
    for target, temporal, power, last in product(TARGETS, ("rate", "step", "map"), (1, 2, 1.5), (False, True)):
        attention(target, temporal, power, last)


def table(rows: list[dict]) -> str:
    """Registers of a thread, a line for each kernel and variant, a column for each target."""
    lines = {}
    for row in rows:
        key = (row["kernel"], row["variant"], row["dtype"], row["T"])
        lines.setdefault(key, {})[row["target"]] = row["registers"]
    targets = sorted({row["target"] for row in rows})
    text = [f"{'registers a thread':78}{'T':>3}" + "".join(f"{target:>9}" for target in targets)]
    for (kernel, variant, dtype, timesteps), found in sorted(lines.items()):
        name = f"{kernel:23}{dtype:9}{variant}"
        text.append(f"{name:78}{timesteps:3}" + "".join(f"{found.get(target, ''):>9}" for target in targets))
    return "\n".join(text)


if __name__ == "__main__":
    JITFunction.run = compile_only
    {"default": default, "full": full}[sys.argv[1]]()
    print(table(rows) if "table" in sys.argv else "\n".join(map(json.dumps, rows)))
