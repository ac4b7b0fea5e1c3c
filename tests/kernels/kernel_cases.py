"""What the kernel tests share: option grids, inputs in every layout, comparison with the reference."""

import copy
import math
import os
from itertools import combinations, product

import pytest
import torch

from lasnn.kernels import SURROGATES, reference
from lasnn.kernels.layout import memory_format

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
# Whether the tests reach the Triton kernels, on a GPU or under the interpreter; else the CPU path.
TRITON = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

# How far a gradient may be from the reference's, as a share of the largest one. Half-precision gradients are
# rounded once, from fp32, and Triton's interpreter rounds bf16 differently: one unit in the last place.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-5, torch.float16: 1.1e-3, torch.bfloat16: 8.5e-3}


def pairwise(options: dict[str, tuple]) -> list[dict]:
    """Few combinations in which every pair of two options' values occurs: greedy, always the same ones."""
    names = list(options)
    missing = {(a, x, b, y) for a, b in combinations(names, 2) for x, y in product(options[a], options[b])}
    order = sorted(missing, key=repr)
    rows = []
    while missing:
        a, x, b, y = next(pair for pair in order if pair in missing)
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                row[name] = max(
                    options[name],
                    key=lambda value: sum(
                        pair in missing
                        for other in row
                        for pair in ((name, value, other, row[other]), (other, row[other], name, value))
                    ),
                )
        rows.append({name: row[name] for name in names})
        missing -= {(a, row[a], b, row[b]) for a, b in combinations(names, 2)}
    return rows


def full(options: dict[str, tuple]) -> list[dict]:
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def grid(**options: tuple) -> list:
    """pytest's parameters of every combination; `make test` runs those in which every pair of two values occurs."""
    few = pairwise(options)
    return [pytest.param(*case.values(), marks=[] if case in few else pytest.mark.full) for case in full(options)]


def name(case: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def contiguous(shape):
    return torch.randn(shape)


def channels_last(shape):
    steps, batch, *image = shape
    return torch.randn(steps * batch, *image).contiguous(memory_format=torch.channels_last).unflatten(0, (steps, batch))


def every_other_column(shape):
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


def every_other_step(shape):
    return torch.randn(2 * shape[0], *shape[1:])[::2]


def time_inside(shape):
    """[B, T, ...] in memory: a step is not dense, no two dimensions of it join."""
    return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def reversed_dims(shape):
    return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))


def expanded(shape):
    return torch.randn(*shape[:-1], 1).expand(shape)


LAYOUTS = {
    layout.__name__: layout
    for layout in (
        contiguous,
        channels_last,
        every_other_column,
        every_other_step,
        time_inside,
        reversed_dims,
        expanded,
    )
}

STEPS = {"one": (1,), "63": (63,), "500": (500,), "image": (2, 3, 5, 7), "scalar": ()}
IMAGE_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "contiguous")

LIF_OPTIONS = {
    "x": ("one", "63", "500", "scalar", "image", *IMAGE_LAYOUTS),
    "timesteps": (1, 2, 3, 4, 7, 16, 33),
    "constant": (False, True),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "surrogate": SURROGATES,
    "alpha": (2.0, 0.7),
    "tau": (2.0, 2.7, math.inf, "learnt"),
    "threshold": (1.0, 0.6),
    "v_reset": (0.0, None, -0.25),
    "decay_input": (False, True),
    "detach_reset": (False, True),
    "v0": (False, True),
    "upstream": ("both", "spikes", "v_last"),
}

LIF_FULL = {
    **LIF_OPTIONS,
    "x": ("63", "every_other_column"),
    "timesteps": (9,),
    "alpha": (2.0,),
    "threshold": (0.6,),
    "upstream": ("both",),
    "dtype": (torch.float32, torch.bfloat16),
}


def make(layout: str, steps: int) -> torch.Tensor:
    shape = STEPS.get(layout, STEPS["image"])
    return LAYOUTS.get(layout, contiguous)((steps, *shape))


def lif_results(function, x, v0, tau, grad_spikes, grad_v_last, **options):
    """Every output and every gradient of `function`."""
    x = x.detach().requires_grad_()
    leaves = {"x": x}
    if v0 is not None:
        leaves["v0"] = v0 = v0.detach().requires_grad_()
    if isinstance(tau, torch.Tensor):
        leaves["tau"] = tau = tau.detach().requires_grad_()
    spikes, v_last = function(x, v0, tau=tau, **options)
    outputs = [(spikes, grad_spikes), (v_last, grad_v_last)]
    gradients = torch.autograd.grad(
        [out for out, grad in outputs if grad is not None],
        list(leaves.values()),
        [grad for _, grad in outputs if grad is not None],
    )
    named = {f"gradient of {leaf}": grad for leaf, grad in zip(leaves, gradients, strict=True)}
    return {"spikes": spikes.detach(), "v_last": v_last.detach(), **named}


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str = "", rounding=0.0) -> None:
    """Within `tolerance` of the largest wanted value, plus `rounding`: what nearly cancels cannot be nearer."""
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), what
    scale = max(wanted.abs().max().item(), 0.01) if wanted.numel() else 0.0
    atol = tolerance * scale + rounding
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=atol, msg=lambda text: f"{what}: {text}")


def check_lif(function, case: dict) -> None:
    case = dict(case)
    dtype, timesteps = case.pop("dtype"), case.pop("timesteps")
    layout, constant, upstream = case.pop("x"), case.pop("constant"), case.pop("upstream")
    if case["decay_input"] and case["tau"] == math.inf:
        case["tau"] = 3.0
    state = torch.float64 if dtype == torch.float64 else torch.float32

    torch.manual_seed(0)
    x = make(layout, 1 if constant else timesteps)
    x = x.to(dtype)
    step = x[0]
    v0 = torch.randn(step.shape).to(state) * 0.5 if case.pop("v0") else None
    tau = case.pop("tau")
    tau = torch.tensor(2.5, dtype=state) if tau == "learnt" else tau
    grad_spikes = torch.randn(timesteps, *step.shape).to(dtype) if upstream != "v_last" else None
    grad_v_last = torch.randn(step.shape).to(state) if upstream != "spikes" else None

    arguments = (x, v0, tau, grad_spikes, grad_v_last)
    got = lif_results(function, *arguments, timesteps=timesteps, **case)
    wanted = lif_results(reference.lif, *arguments, timesteps=timesteps, **case)
    assert got.keys() == wanted.keys()
    assert torch.equal(got["spikes"], wanted["spikes"])
    assert torch.equal(got["v_last"], wanted["v_last"])
    # The sum over elements and steps that tau's gradient is has terms of the size of x's gradient.
    rounding = 1e-7 * wanted["gradient of x"].abs().sum().item()
    for key in got:
        spread = rounding if key == "gradient of tau" else 0.0
        assert_close(got[key], wanted[key], TOLERANCE[got[key].dtype], key, spread)


NORM_LIF_OPTIONS = {
    "image": ((1, 1, 1), (1, 9, 7), (5, 1, 1), (40, 3, 3), (3, 7, 9), (16, 4, 4), (2, 20, 25)),
    "batch": (1, 2, 3),
    "timesteps": (1, 2, 3, 4, 7, 16, 33),
    "last": (False, True),
    "residual": (False, True),
    "v0": (False, True),
    "upstream": ("both", "spikes", "v_last"),
    "constant": (False, True),
    "training": (True, False),
    "affine": (True, False),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "surrogate": SURROGATES,
    "tau": (2.0, 2.7, math.inf, "learnt"),
    "threshold": (1.0, 0.6),
    "v_reset": (0.0, None, -0.25),
    "decay_input": (False, True),
    "detach_reset": (False, True),
}

NORM_LIF_FULL = {
    "image": ((3, 7, 9), (17, 4, 4)),
    "timesteps": (1, 4, 9),
    "last": (False, True),
    "residual": (False, True),
    "v0": (False, True),
    "constant": (False, True),
    "training": (True, False),
    "dtype": (torch.float32, torch.bfloat16),
    "tau": (2.0, "learnt"),
    "v_reset": (0.0, None),
    "decay_input": (False, True),
}


def images(count: int, image: tuple[int, ...], dtype: torch.dtype, last: bool = False) -> torch.Tensor:
    memory = torch.channels_last if last else torch.contiguous_format
    return torch.randn(count, *image).to(dtype).contiguous(memory_format=memory)


def batch_norm(channels: int, training: bool = True, affine: bool = True, **options) -> torch.nn.BatchNorm2d:
    """A batch norm whose every value tells."""
    norm = torch.nn.BatchNorm2d(channels, affine=affine, **options).train(training)
    if affine:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.2, 0.3)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


def norm_lif_results(
    function, y, norm, residual, tau, grad_spikes, v0=None, grad_v_last=None, dtype=None, **options
) -> dict[str, torch.Tensor]:
    """Every output and every gradient of `function`, computed in `dtype` where given.

    v_last is asked for where there is a gradient of it.
    """

    def leaf(tensor):
        return None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()

    norm = copy.deepcopy(norm) if dtype is None else copy.deepcopy(norm).to(dtype)
    y, residual, v0 = leaf(y), leaf(residual), leaf(v0)
    tau = leaf(tau) if isinstance(tau, torch.Tensor) else tau
    leaves = {"y": y, "residual": residual, "v0": v0, "weight": norm.weight, "bias": norm.bias, "tau": tau}
    leaves = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    return_state = grad_v_last is not None
    spikes, *v_last, batch = function(y, norm, residual, v0=v0, return_state=return_state, tau=tau, **options)
    outputs = [(spikes, grad_spikes), *((v, grad_v_last) for v in v_last)]
    gradients = torch.autograd.grad(
        [out for out, grad in outputs if grad is not None],
        list(leaves.values()),
        [grad.to(out.dtype) for out, grad in outputs if grad is not None],
    )
    found = {"spikes": spikes.detach(), **dict(zip(("v_last",), (v.detach() for v in v_last), strict=False))}
    if batch is not None:
        assert not batch.mean.requires_grad
        found |= {"mean": batch.mean, "variance": batch.variance, "count": torch.tensor(float(batch.count))}
    return found | {f"gradient of {leaf}": grad for leaf, grad in zip(leaves, gradients, strict=True)}


def check_norm_lif(function, case: dict) -> None:
    """Against the reference in fp64. With these seeds no h lies near enough to the threshold, or to a surrogate's edge,
    for a rounding to tell.
    """
    case = {"batch": 2, "affine": True, "upstream": "both", **case}
    image, batch, timesteps, dtype = case.pop("image"), case.pop("batch"), case["timesteps"], case.pop("dtype")
    last, training, affine = case.pop("last"), case.pop("training"), case.pop("affine")
    if case["decay_input"] and case["tau"] == math.inf:
        case["tau"] = 3.0
    if training and batch * math.prod(image[1:]) < 4:
        # Of one value a channel there is no variance; of few the gradient cancels.
        batch = 4
    state = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    steps = batch if case["constant"] else timesteps * batch
    y = images(steps, image, dtype, last) * 1.3 + 0.7
    residual = images(steps, image, dtype, last) if case.pop("residual") else None
    upstream = case.pop("upstream")
    grad_spikes = images(timesteps * batch, image, dtype, last) if upstream != "v_last" else None
    tau = case.pop("tau")
    tau = torch.tensor(2.5) if tau == "learnt" else tau
    norm = batch_norm(image[0], training, affine)
    # In the other memory order: it is copied.
    v0 = images(batch, image, state, not last) * 0.5 if case.pop("v0") else None
    grad_v_last = images(batch, image, state, last) if upstream != "spikes" else None

    arguments = (y, norm, residual, tau, grad_spikes, v0, grad_v_last)
    got = norm_lif_results(function, *arguments, **case)
    wanted = norm_lif_results(reference.norm_lif, *arguments, torch.float64, **case)
    assert got.keys() == wanted.keys()
    assert got["spikes"].dtype == dtype
    for key in {"spikes", "v_last"} & got.keys():
        assert got[key].stride() == torch.empty_like(got[key], memory_format=memory_format(y)).stride()
    assert torch.equal(got["spikes"].double(), wanted["spikes"].double())
    # A sum over many elements, or the rest of one after its mean is gone, has terms of the size of g.
    scale = max(wanted[key].abs().max().item() for key in got if key.startswith("gradient"))
    for key, value in got.items():
        half = key in ("gradient of y", "gradient of residual") and dtype != torch.float32
        # g is rounded to half precision before y's gradient is, where it is the residual's too.
        tolerance = 2 * TOLERANCE[dtype] if half else 2e-5
        assert_close(value.double(), wanted[key].double(), tolerance, key, 3e-6 * scale)


ATTENTION_OPTIONS = {
    "x": ("image", *IMAGE_LAYOUTS),
    "image": ((1, 1, 1), (3, 5, 7), (70, 1, 9), (17, 9, 9)),
    "timesteps": (1, 3),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "power": (1, 2, 1.5, 3),
    "temporal": ("rate", "step", "map"),
}


def check_attention(function, case: dict) -> None:
    torch.manual_seed(0)
    layout = LAYOUTS.get(case["x"], contiguous)
    x = layout((case["timesteps"], 2, *case["image"])).to(case["dtype"])
    # Spikes are mostly 0, where the derivative is a matter of definition.
    x = x * (torch.rand(x.shape) < 0.5).to(x.dtype) if layout is contiguous else x
    results = []
    for op in (function, reference.attention_map):
        leaf = x.detach().requires_grad_()
        maps = op(leaf, case["power"], case["temporal"])
        grad = torch.randn(maps.shape, generator=torch.Generator(DEVICE).manual_seed(1)).to(maps.dtype)
        results.append((maps.detach(), *torch.autograd.grad(maps, leaf, grad)))
    (maps, gradient), (wanted_maps, wanted_gradient) = results
    assert_close(maps, wanted_maps, 1e-5, "maps")
    assert_close(gradient, wanted_gradient, max(TOLERANCE[gradient.dtype], 1e-4), "gradient of x")
