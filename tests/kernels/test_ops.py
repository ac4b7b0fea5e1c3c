import ast
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lasnn.kernels
from kernel_cases import IMAGE_LAYOUTS, batch_norm, grid, images, make
from lasnn.kernels import SURROGATES, attention_map, lif, norm_lif, ops

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
    torch.library.opcheck(ops.lif.overload, lif_arguments(leaf), test_utils=CHECKS[:3])
    torch.library.opcheck(ops.lif.overload, lif_arguments(leaf[:1], v0, torch.tensor(0.4), 3), test_utils=CHECKS[:3])
    spikes, v_last, saved_states = ops.lif(*lif_arguments(x))
    torch.library.opcheck(
        ops.lif_backward.overload,
        (spikes, v_last, x, None, None, saved_states, *lif_arguments(x)[3:]),
        test_utils=CHECKS[:3],
    )


@pytest.mark.parametrize("temporal", ["rate", "step", "map"])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_opcheck_attention(layout, temporal):
    x = make(layout, 2)
    f = ops.attention(x, 2.0, temporal)
    torch.library.opcheck(ops.attention.overload, (x.detach().requires_grad_(), 2.0, temporal), test_utils=CHECKS[:3])
    torch.library.opcheck(ops.attention_backward.overload, (f, x, 2.0, temporal), test_utils=CHECKS[:3])


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_opcheck_norm_lif(last, dtype, residual, constant):
    torch.manual_seed(0)
    y = images(2 if constant else 18, (3, 5, 7), dtype, last)
    r = images(len(y), (3, 5, 7), dtype, last) if residual else None
    v0 = images(2, (3, 5, 7), torch.float32, last)
    statistics = ops.norm_statistics(y)
    weight, bias, decay = torch.rand(3), torch.rand(3), torch.tensor(0.4)
    dynamics = (0.5, 1.0, False, 0.0, "atan", 2.0, False)
    options = (1e-5, 9, constant, *dynamics)
    stateless, stateful = (1e-5, 9, constant, False, *dynamics), (1e-5, 9, constant, True, *dynamics)

    def leaf(tensor):
        return None if tensor is None else tensor.detach().requires_grad_()

    def check(op, *arguments):
        torch.library.opcheck(op.overload, arguments, test_utils=CHECKS[:3])

    check(ops.norm_statistics, y)
    check(ops.norm_lif, leaf(y), leaf(r), None, statistics, leaf(weight), leaf(bias), None, 70, *stateless)
    check(ops.norm_lif, leaf(y), leaf(r), leaf(v0), statistics, None, None, leaf(decay), 0, *stateful)
    spikes, v_last, saved_states = ops.norm_lif(y, r, v0, statistics, weight, bias, decay, 70, *stateful)
    parameters = (statistics, weight, bias, decay, saved_states)
    given = (spikes, v_last, y, r, v0, *parameters)
    sums, g, _, _ = ops.norm_lif_sums(*given, True, *options)
    check(ops.norm_lif_sums, *given, True, *options)
    check(ops.norm_lif_sums, None, *given[1:8], None, saved_states, False, *options)
    check(ops.norm_lif_sums, spikes, None, y, r, None, *parameters, False, *options)
    check(ops.norm_grad, g, y, statistics, weight, sums, 1e-5)
    check(ops.norm_grad_, g, y, statistics, None, None, 1e-5)
    if not (residual or constant):
        check(ops.norm_lif_grad, spikes, None, y, None, *parameters, sums, 1e-5, 9, *dynamics)
        check(ops.norm_lif_grad, None, v_last, y, v0, *parameters, sums, 1e-5, 9, *dynamics)


@pytest.mark.usefixtures("cpu_only")
def test_opcheck_traced():
    x = torch.randn(4, 63, requires_grad=True)
    torch.library.opcheck(ops.lif.overload, lif_arguments(x), test_utils=CHECKS)
    y, v0 = torch.randn(8, 3, 5, 7, requires_grad=True), torch.randn(2, 3, 5, 7, requires_grad=True)
    statistics = ops.norm_statistics(y.detach())
    timesteps, *dynamics = lif_arguments(x)[3:]
    for state in (None, v0):
        given = (y, None, state, statistics, None, None, None, 70, 1e-5, timesteps, False, state is not None)
        torch.library.opcheck(ops.norm_lif.overload, (*given, *dynamics))
    torch.library.opcheck(ops.attention.overload, (torch.randn(2, 3, 4, 5, 6).requires_grad_(), 2.0, "rate"))


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


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize(
    ("constant", "last", "dynamic"), grid(constant=(False, True), last=(False, True), dynamic=(False, True))
)
def test_norm_lif_compiles_without_a_graph_break(constant, last, dynamic):
    torch.manual_seed(0)
    norm = batch_norm(3)

    def unit(y, residual, v0, tau):
        options = {"timesteps": 4, "constant": constant, "tau": tau}
        if v0 is None:
            return norm_lif(y, norm, residual, **options)
        spikes, v_last, batch = norm_lif(y, norm, residual, v0=v0, return_state=True, **options)
        return spikes + v_last.mean(), batch

    torch.compiler.reset()
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        for stateful in (False, True):
            residual = images(batch if constant else 4 * batch, (3, 5, 7), torch.float32, last) if stateful else None
            v0 = images(batch, (3, 5, 7), torch.float32, last) if stateful else None
            y = images(batch if constant else 4 * batch, (3, 5, 7), torch.float32, last).requires_grad_()
            tau = torch.tensor(2.5, requires_grad=True)
            results = []
            for function in (unit, compiled):
                spikes, (mean, variance, count) = function(y, residual, v0, tau)
                assert count == y.numel() // 3
                gradients = torch.autograd.grad(spikes.square().sum(), (y, norm.weight, norm.bias, tau))
                results.append((spikes, mean, variance, *gradients))
            for a, b in zip(*results, strict=True):
                assert a.stride() == b.stride()
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("last", [False, True])
def test_meta_images_lie_as_the_real_ones(last):
    y = images(8, (3, 5, 7), torch.bfloat16, last)
    with torch.device("meta"):
        norm = nn.BatchNorm2d(3)
    options = {"timesteps": 4, "return_state": True}
    meta = norm_lif(torch.empty_like(y, device="meta"), norm, **options)
    real = norm_lif(y, nn.BatchNorm2d(3), **options)
    for a, b in zip(real[:2], meta[:2], strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_autocast_leaves_the_op_alone():
    x = torch.randn(4, 63)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spikes, v_last = lif(x)
        halves, v_half = lif(x.bfloat16())
    assert spikes.dtype == v_last.dtype == v_half.dtype == torch.float32
    assert halves.dtype == torch.bfloat16


X = torch.zeros(4, 3)
Y = torch.zeros(8, 3, 5, 7)
NORM = nn.BatchNorm2d(3)
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
    (lambda: norm_lif([1.0], NORM, timesteps=4), TypeError, "norm_lif: y must be a tensor, got list"),
    (lambda: norm_lif(Y.int(), NORM, timesteps=4), TypeError, "norm_lif: no kernel for torch.int32 on cpu"),
    (lambda: norm_lif(Y[0], NORM, timesteps=4), ValueError, "y must be [T*B, C, H, W], got [3, 5, 7]"),
    (lambda: norm_lif(Y, NORM, timesteps=3), ValueError, "timesteps = 3 does not divide 8"),
    (lambda: norm_lif(Y, NORM, timesteps=0), ValueError, "norm_lif: timesteps must be at least 1, got 0"),
    (lambda: norm_lif(Y, NORM, timesteps=4.0), TypeError, "norm_lif: timesteps must be an integer"),
    (lambda: norm_lif(Y, nn.BatchNorm2d(4), timesteps=4), ValueError, "y has 3 channels but norm has 4"),
    (lambda: norm_lif(Y, nn.Identity(), timesteps=4), TypeError, "norm must be an nn.BatchNorm2d, got Identity"),
    (lambda: norm_lif(Y, nn.SyncBatchNorm(3), timesteps=4), TypeError, "got SyncBatchNorm"),
    (lambda: norm_lif(Y, nn.BatchNorm2d(3, device="meta"), timesteps=4), ValueError, "norm.weight is on meta but y"),
    (lambda: norm_lif(Y[..., ::2], NORM, timesteps=4), ValueError, "neither contiguous nor channels_last; use y.cont"),
    (lambda: norm_lif(Y, NORM, Y.bfloat16(), timesteps=4), TypeError, "residual is torch.bfloat16 but y is torch.fl"),
    (lambda: norm_lif(Y, NORM, Y.to("meta"), timesteps=4), ValueError, "residual is on meta but y is on cpu"),
    (lambda: norm_lif(Y, NORM, Y[:4], timesteps=4), ValueError, "residual must be [8, 3, 5, 7], or [2, 3, 5, 7] if"),
    (lambda: norm_lif(Y, NORM, Y[:, :2], timesteps=4), ValueError, "got [8, 2, 5, 7]"),
    (
        lambda: norm_lif(Y, NORM, Y.contiguous(memory_format=torch.channels_last), timesteps=4),
        ValueError,
        "use residual.contiguous(memory_format=torch.contiguous_format)",
    ),
    (lambda: norm_lif(Y, NORM, v0=0.0, timesteps=4), TypeError, "norm_lif: v0 must be a tensor or None"),
    (
        lambda: norm_lif(Y, NORM, v0=Y[:2].bfloat16(), timesteps=4),
        TypeError,
        "norm_lif: v0 must be torch.float32 for y",
    ),
    (lambda: norm_lif(Y, NORM, v0=Y, timesteps=4), ValueError, "v0 must have the shape of one step, [2, 3, 5, 7], got"),
    (lambda: norm_lif(Y, NORM, v0=Y[:2].to("meta"), timesteps=4), ValueError, "norm_lif: v0 is on meta but y is on"),
    (lambda: norm_lif(Y, NORM, timesteps=4, threshold=-1), ValueError, "norm_lif: threshold must be above 0"),
    (lambda: norm_lif(Y, NORM, timesteps=4, tau=0.5), ValueError, "norm_lif: tau must be at least 1 step, got 0.5"),
    (lambda: norm_lif(Y, NORM, timesteps=4, v_reset=2), ValueError, "norm_lif: v_reset must be below the threshold"),
    (
        lambda: norm_lif(torch.zeros(1, 3, 1, 1), NORM, timesteps=1),
        ValueError,
        "the variance of one value a channel",
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
    from lasnn.kernels import reference
    from lasnn.kernels.cpu import neuron

    assert set(SURROGATES) == set(neuron.SURROGATES) == set(reference.SURROGATES)


def test_kernels_import_nothing_else_of_lasnn():
    for file in KERNELS.rglob("*.py"):
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


@pytest.mark.usefixtures("cpu_only")
def test_the_cpu_path_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from lasnn.kernels import lif, ops
assert lif(torch.ones(2, 3))[0].sum() == 6
try:
    ops.launcher("lif", "lif_forward")(torch.ones(2, 3))
except ImportError as error:
    print(error)
"""
    assert "pip install 'triton>=3.4'" in run(program)


@pytest.mark.parametrize(
    ("found", "hip", "wanted"),
    [
        (None, None, "found none: pip install 'triton>=3.4'"),
        ("3.3.1", None, "found 3.3.1: pip install 'triton>=3.4'"),
        (
            None,
            "7.1.2",
            r"found none: install the one built for this PyTorch \(ROCm 7.1.2\), from the index that torch",
        ),
        ("3.2.0+rocm6.4", "6.4", "found 3.2.0.rocm6.4: install the one built for this PyTorch"),
    ],
)
def test_what_a_gpu_lacks_is_named(found, hip, wanted, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", found and SimpleNamespace(__version__=found))
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(ImportError, match=wanted):
        ops.require_triton()


def test_a_triton_that_will_do(monkeypatch):
    for version in ("3.4.0", "3.10.0+git1234", "4.0.0"):
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
        ops.require_triton()


@pytest.mark.usefixtures("cpu_only")
def test_importing_a_launcher_leaves_the_function_and_triton_in_place():
    program = "import lasnn.kernels.triton.lif, triton; print(type(lasnn.kernels.lif), triton.__version__)"
    assert "function" in run(program)


@pytest.mark.parametrize("residual", [False, True])
def test_a_gradient_is_not_differentiated_again(residual):
    """A penalty on gradients would be silently wrong; it is refused by name."""
    norm = nn.BatchNorm2d(3)
    y = torch.randn(4, 3, 2, 2, requires_grad=True)
    added = torch.randn(4, 3, 2, 2) if residual else None
    spikes, _ = norm_lif(y, norm, added, timesteps=2)
    [gradient] = torch.autograd.grad(spikes.sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.square().sum().backward()
