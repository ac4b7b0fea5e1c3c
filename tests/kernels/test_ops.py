import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lasnn.kernels
from kernel_cases import IMAGE_LAYOUTS, make
from lasnn.kernels import SURROGATES, attention_map, lif, ops

KERNELS = Path(lasnn.kernels.__file__).parent
LAYOUTS = ("63", "scalar", "image", *IMAGE_LAYOUTS)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def lif_arguments(x, v0=None, decay=None, timesteps=None):
    return (x, v0, decay, timesteps or len(x), 0.5, 1.0, False, 0.0, "atan", 2.0, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_lif(layout, dtype):
    x = make(layout, 9).to(dtype)
    leaf = x.detach().requires_grad_()
    v0 = torch.zeros(x.shape[1:]).requires_grad_()
    torch.library.opcheck(ops.lif, lif_arguments(leaf), test_utils=CHECKS[:3])
    torch.library.opcheck(ops.lif, lif_arguments(leaf[:1], v0, torch.tensor(0.4), 3), test_utils=CHECKS[:3])
    spikes, v_last, borders = ops.lif(*lif_arguments(x))
    torch.library.opcheck(
        ops.lif_backward,
        (spikes, v_last, x, None, None, borders, *lif_arguments(x)[3:]),
        test_utils=CHECKS[:3],
    )


@pytest.mark.parametrize("temporal", ["rate", "step", "map"])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_opcheck_attention(layout, temporal):
    x = make(layout, 2)
    f = ops.attention(x, 2.0, temporal)
    torch.library.opcheck(ops.attention, (x.detach().requires_grad_(), 2.0, temporal), test_utils=CHECKS[:3])
    torch.library.opcheck(ops.attention_backward, (f, x, 2.0, temporal), test_utils=CHECKS[:3])


@pytest.mark.usefixtures("cpu_only")
def test_opcheck_traced():
    x = torch.randn(4, 63, requires_grad=True)
    torch.library.opcheck(ops.lif, lif_arguments(x), test_utils=CHECKS)
    torch.library.opcheck(ops.attention, (torch.randn(2, 3, 4, 5, 6).requires_grad_(), 2.0, "rate"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_tensors_lie_as_the_real_ones(layout):
    x = make(layout, 9)
    real, meta = lif(x), lif(x.to("meta") if x.is_contiguous() else torch.empty_like(x, device="meta"))
    for a, b in zip(real, meta, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if x.is_contiguous():
        assert [t.stride() for t in real] == [t.stride() for t in meta]
    if x.dim() == 5:
        assert attention_map(x).shape == attention_map(x.to("meta")).shape


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def network(x, v0, tau):
        spikes, v_last = lif(x, v0, tau=tau, surrogate="sigmoid")
        return attention_map(spikes).sum() + v_last.sum()

    torch.manual_seed(0)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(4, batch, 3, 5, 7, requires_grad=True)
        v0 = torch.zeros(batch, 3, 5, 7)
        tau = torch.tensor(2.5, requires_grad=True)
        wanted = torch.autograd.grad(network(x, v0, tau), (x, tau))
        got = torch.autograd.grad(compiled(x, v0, tau), (x, tau))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_leaves_the_op_alone():
    x = torch.randn(4, 63)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spikes, v_last = lif(x)
        halves, v_half = lif(x.bfloat16())
    assert spikes.dtype == v_last.dtype == v_half.dtype == torch.float32
    assert halves.dtype == torch.bfloat16


X = torch.zeros(4, 3)
IMAGES = torch.zeros(4, 2, 3, 5, 7)
WRONG = [
    (lambda: lif([1.0]), TypeError, "x must be a tensor, got list"),
    (lambda: lif(torch.zeros(4, 3, dtype=torch.int64)), TypeError, "no kernel for torch.int64 on cpu"),
    (lambda: lif(torch.tensor(1.0)), ValueError, "no time dimension"),
    (lambda: lif(X[:0]), ValueError, "T must be at least 1"),
    (lambda: lif(X, timesteps=0), ValueError, "timesteps must be at least 1, got 0"),
    (lambda: lif(X, timesteps=5), ValueError, "x has 4 steps but timesteps is 5"),
    (lambda: lif(X, timesteps=2.0), TypeError, "timesteps must be an integer"),
    (lambda: lif(X, 0.0), TypeError, "v0 must be a tensor or None"),
    (lambda: lif(X, X[0].bfloat16()), TypeError, "v0 must be torch.float32"),
    (lambda: lif(X, X), ValueError, "v0 must have the shape of one step, [3], got [4, 3]"),
    (lambda: lif(X, X[0].to("meta")), ValueError, "v0 is on meta but x is on cpu"),
    (lambda: lif(X, threshold=0), ValueError, "threshold must be above 0, got 0.0"),
    (lambda: lif(X, threshold="1"), TypeError, "threshold must be a number"),
    (lambda: lif(X, alpha=-1), ValueError, "alpha must be above 0"),
    (lambda: lif(X, alpha=math.nan), ValueError, "alpha must be finite"),
    (lambda: lif(X, v_reset=1.0), ValueError, "v_reset must be below the threshold 1.0"),
    (lambda: lif(X, tau=0), ValueError, "tau must be at least 1 step, got 0.0"),
    (lambda: lif(X, tau=0.5), ValueError, "tau must be at least 1 step, got 0.5"),
    (lambda: lif(X, tau=torch.ones(3)), TypeError, "tau must hold one floating-point number"),
    (lambda: lif(X, tau=torch.tensor(2)), TypeError, "tau must hold one floating-point number"),
    (lambda: lif(X, tau=math.inf, decay_input=True), ValueError, "set decay_input=False"),
    (
        lambda: lif(X, surrogate="atam"),
        ValueError,
        "unknown surrogate 'atam'; did you mean 'atan'? known: atan,",
    ),
    (lambda: attention_map(X), ValueError, "x must be [T, B, C, H, W], got [4, 3]"),
    (lambda: attention_map(IMAGES[:0]), ValueError, "T must be at least 1"),
    (lambda: attention_map(IMAGES.bool()), TypeError, "no kernel for torch.bool"),
    (lambda: attention_map(IMAGES, 0.5), ValueError, "power must be at least 1"),
    (
        lambda: attention_map(IMAGES, temporal="steps"),
        ValueError,
        "did you mean 'step'? known: rate, step, map",
    ),
    (lambda: attention_map(IMAGES, eps=0), ValueError, "eps must be above 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_a_mistake_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_the_surrogates_are_the_implemented_ones():
    from lasnn.kernels import cpu, reference

    assert set(SURROGATES) == set(cpu.SURROGATES) == set(reference.SURROGATES)


def test_kernels_import_nothing_else_of_lasnn():
    for file in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module]
            for name in names:
                assert not name.startswith("lasnn") or name.startswith("lasnn.kernels"), f"{file.name}: {name}"


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_cpu_path_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from lasnn.kernels import lif, ops
assert lif(torch.ones(2, 3))[0].sum() == 6
try:
    ops.launcher("lif_triton", "lif_forward")(torch.ones(2, 3))
except ImportError as error:
    print(error)
"""
    assert "pip install 'triton>=3.4'" in run(program)


def test_importing_a_launcher_leaves_the_function_in_place():
    assert "function" in run("import lasnn.kernels.lif_triton; print(type(lasnn.kernels.lif))")
