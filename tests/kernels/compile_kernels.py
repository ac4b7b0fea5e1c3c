"""Compiles what the launchers launch, for GPUs that are not here; prints a line of JSON for each kernel.

    python compile_kernels.py default|full

The launchers run as they are, with a driver that only says which GPU there is, and every launch stops after
compiling. Run by test_triton_compiled.py in a process of its own, where Triton's interpreter is off.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lasnn.kernels import SURROGATES
from lasnn.kernels.attention_triton import attention_backward, attention_forward
from lasnn.kernels.lif_triton import lif_backward, lif_forward

TARGETS = {f"cuda{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
try:
    # Older Triton (3.4) links AMD's code with ROCm's own linker; newer brings one along.
    getattr(HIPBackend, "path_to_rocm_lld", lambda: None)()
    TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
except Exception as error:
    print(f"gfx942 left out: {error}", file=sys.stderr)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("dense", "strided", "constant")


class Absent:
    """A driver for a GPU that is not here."""

    def __init__(self, name):
        self.get_current_target = lambda: TARGETS[name]
        # Triton keeps what it compiled by device: each target is another one.
        self.get_current_device = lambda: list(TARGETS).index(name)
        self.get_current_stream = lambda device: 0


launch = JITFunction.run
# What every launch in progress adds: launch options, and what its line of the report says.
extra, what = {}, {}


def compile_only(self, *args, warmup, **kwargs):
    report(self.fn.__name__, launch(self, *args, warmup=True, **{**kwargs, **extra}).asm)


def report(kernel, asm):
    row = {"kernel": kernel, **what, **extra}
    if "ptx" in asm:
        row["fma"] = len(re.findall(r"\bfma\.", asm["ptx"]))
        row["unrounded"] = len(re.findall(r"\b(?:add|sub|mul)\.f32", asm["ptx"]))
        row["loads"] = len(re.findall(r"\bld\.global", asm["ptx"]))
        row["wide_loads"] = len(re.findall(r"\bld\.global\S*\.v4\.[bu]32", asm["ptx"]))
        row["registers"], row["spilled"] = resources(asm["cubin"])
    else:
        row["spilled"] = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", asm["amdgcn"])[1])
    print(json.dumps(row), flush=True)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack) as cuobjdump, which comes with Triton, reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return int(found[1]), int(found[2])


def use(target: str, **say) -> None:
    driver.set_active(Absent(target))
    what.clear()
    what.update(target=target, **say)


def lif(target, dtype, timesteps, layout="dense", learnt=False, surrogate="atan", v_reset=0.0, detach=False):
    use(target, dtype=str(dtype), T=timesteps, layout=layout, learnt=learnt)
    x = torch.empty(1 if layout == "constant" else timesteps, 2, 16, 16, 32, dtype=dtype)
    x = x[..., ::2] if layout == "strided" else x
    v0, decay = (torch.empty(x.shape[1:]), torch.tensor(0.5)) if learnt else (None, None)
    options = (timesteps, 0.3, 0.7, learnt, v_reset, surrogate, 2.5, detach)
    spikes, v_last, borders = lif_forward(x, v0, decay, *options)
    lif_backward(spikes, v_last if learnt else None, x, v0, decay, borders, *options)


def attention(target, temporal, power, channels_last, dtype=torch.bfloat16):
    use(target, temporal=temporal, power=power, channels_last=channels_last)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(8, 64, 16, 16, dtype=dtype).contiguous(memory_format=memory).unflatten(0, (4, 2))
    attention_backward(attention_forward(x, power, temporal), x, power, temporal)


def default():
    lif("cuda90", torch.bfloat16, 4)
    extra["enable_fp_fusion"] = True
    lif("cuda90", torch.bfloat16, 4)
    extra.clear()
    lif("cuda80", torch.bfloat16, 15, "strided", learnt=True)
    lif("cuda100", torch.float32, 4, v_reset=None)
    attention("cuda90", "rate", 2, False)
    attention("cuda90", "step", 2, True)
    if "gfx942" in TARGETS:
        lif("gfx942", torch.bfloat16, 4)
        attention("gfx942", "map", 1.5, True)


def full():
    default()
    for target, dtype, timesteps, layout in product(TARGETS, DTYPES, (1, 4, 8, 15, 32), LAYOUTS):
        lif(target, dtype, timesteps, layout)
        if layout == "strided":
            lif(target, dtype, timesteps, layout, learnt=True)
    for surrogate, v_reset, detach in product(SURROGATES, (0.0, None), (False, True)):
        lif("cuda90", torch.bfloat16, 8, surrogate=surrogate, v_reset=v_reset, detach=detach)
    for target, temporal, power, last in product(TARGETS, ("rate", "step", "map"), (1, 2, 1.5), (False, True)):
        attention(target, temporal, power, last)


if __name__ == "__main__":
    JITFunction.run = compile_only
    {"default": default, "full": full}[sys.argv[1]]()
