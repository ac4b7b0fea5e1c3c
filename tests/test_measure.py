"""Operation counts against brute force, and the accuracy over T."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lasnn import Staged
from lasnn.data import Images
from lasnn.evaluation.measure import accuracy, measure
from lasnn.evaluation.operations import OperationCounter, teacher_energy_uj
from lasnn.network.staged import build
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import Product, ann_units, snn_units
from lasnn.registry import encoders


def images(count=6, channels=2, size=12):
    torch.manual_seed(1)
    pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8)
    return Images(pixels, torch.randint(3, (count,)))


def small(encoder="direct", timesteps=3):
    """Stride, padding, groups, an average pool and a linear head."""
    torch.manual_seed(0)
    act = snn_units(threshold=0.5)
    stages = {
        "stage1": nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), act(4)),
        "stage2": nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), act(6)),
        "stage3": nn.Sequential(nn.Conv2d(6, 5, 2, bias=False), act(5)),
    }
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    return Student(Staged(stages, head), encoders.build(encoder, (0.5, 0.5), (0.25, 0.25)), timesteps).eval()


def connections(layer, spikes):
    """Additions that spikes [N, C, H, W] cause in a convolution: its weights replaced by ones, summed."""
    ones = torch.ones_like(layer.weight)
    options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    return float(F.conv2d(spikes, ones, **options).sum())


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
def test_operations_against_brute_force(encoder):
    student, data = small(encoder), images()
    batch = data.pixels.float() / 255
    with torch.no_grad():
        draws = torch.Generator().manual_seed(5)
        with OperationCounter(student, 3) as counter:
            student.steps(batch, generator=draws)
        draws = torch.Generator().manual_seed(5)
        _, taps = student.steps(batch, ["stage1", "stage2", "stage3"], draws)
        draws = torch.Generator().manual_seed(5)
        spikes_in = student.encoder(batch, 3, draws)
    net = student.network
    first, second, third = net.stage1[0], net.stage2[1], net.stage3[0]
    for steps in (1, 3):
        one, two, three = (taps[name][:steps].flatten(0, 1) for name in ("stage1", "stage2", "stage3"))
        # Each spike that enters the pool counts as one in the layer behind it: the pool as a sum.
        additions = connections(second, F.avg_pool2d(one, 2) * 4) + connections(third, two) + float(three.sum()) * 3
        multiply = 0.0
        if encoder == "direct":
            multiply = 6 * 12 * 12 * first.weight.numel()
        else:
            additions += connections(first, spikes_in[:steps].flatten(0, 1))
        result = counter.after(steps)
        assert result["operations"]["additions"] * 6 == pytest.approx(additions)
        assert result["operations"]["multiply_additions"] * 6 == pytest.approx(multiply)
        assert result["energy_uj"] == pytest.approx(1e-6 * (0.9 * additions + 4.6 * multiply) / 6)
        rates = [float(spikes.mean()) for spikes in (one, two, three)]
        assert list(result["firing_rate_by_layer"].values()) == pytest.approx(rates)
        total = sum(float(spikes.sum()) for spikes in (one, two, three))
        assert result["firing_rate"] == pytest.approx(total / sum(spikes.numel() for spikes in (one, two, three)))
    assert total > 0


@pytest.mark.parametrize("encoder", ["direct", "poisson"])
@pytest.mark.parametrize("style", ["sew", "membrane"])
def test_operations_of_residual_styles_against_brute_force(style, encoder):
    """A sum of spikes costs what its spikes cost; what reads a current multiplies, once where it is constant."""
    torch.manual_seed(0)
    network = build("resnet20", snn_units(threshold=0.3), in_channels=2, num_classes=3, width=4, residual=style)
    student, data = Student(network, encoders.build(encoder, (0.5, 0.5), (0.25, 0.25)), 3).eval(), images()
    additions, multiply, largest = 0.0, 0.0, 0.0

    def count(layer, inputs, output):
        nonlocal additions, multiply, largest
        [x] = inputs
        if isinstance(layer, nn.Linear):
            # The mean of 3 x 3 spikes.
            additions += float((9 * x).round().sum()) * 3
        elif torch.equal(x, x.round()):
            largest = max(largest, float(x.max()))
            additions += connections(layer, x)
        else:
            multiply += output.numel() * layer.weight[0].numel()

    hooks = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad(), OperationCounter(student, 3) as counter:
        student.steps(data.pixels.float() / 255, generator=torch.Generator().manual_seed(5))
    for hook in hooks:
        hook.remove()
    found = counter.after(3)["operations"]
    assert found["additions"] * 6 == pytest.approx(additions)
    assert found["multiply_additions"] * 6 == pytest.approx(multiply)
    assert (multiply > 0) == (style == "membrane" or encoder == "direct")
    assert (largest > 1) == (style == "sew")


def test_the_products_of_a_transformer_against_brute_force():
    """Pair by pair and pixel by pixel; the other layers read numbers of spikes."""
    torch.manual_seed(0)
    network = build("spikformer", snn_units(threshold=0.3), in_channels=2, num_classes=3, width=16, heads=4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.2)
    student, data = Student(network, encoders.build("poisson", (0.5, 0.5), (0.25, 0.25)), 3).eval(), images(4)
    products: dict[str, float] = {}

    def count(product, inputs, _, name):
        for n, head in ((n, head) for n in range(12) for head in range(4)):
            q, k, v = (x[n, 4 * head : 4 * head + 4].flatten(1) for x in inputs)
            pairs = sum(float(k[i, pixel] * v[j, pixel]) for pixel in range(9) for i in range(4) for j in range(4))
            products[name] = products.get(name, 0.0) + pairs + 4 * float(q.sum())

    hooks = [
        module.register_forward_hook(partial(count, name=name))
        for name, module in network.named_modules()
        if isinstance(module, Product)
    ]
    with torch.no_grad(), OperationCounter(student, 3) as counter:
        student.steps(data.pixels.float() / 255, generator=torch.Generator().manual_seed(5))
    for hook in hooks:
        hook.remove()
    assert len(products) == 4
    assert min(products.values()) > 0
    assert {name: float(counter.additions[name].sum()) for name in products} == products
    assert not counter.multiply_additions
    per_image = counter.batch_additions.sum()
    assert float(per_image) == pytest.approx(counter.after(3)["operations"]["additions"] * 4)


def test_a_product_of_real_values_costs_multiplications():
    act = snn_units()

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = Product(2)

        def forward(self, x):
            return self.product(x, x, 0.5 * x)

    stages = {"stage1": nn.Sequential(nn.Conv2d(2, 4, 1), act(4), nn.Sigmoid(), Attend(), act(4))}
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    student = Student(Staged(stages, head), encoders.build("direct", (0.5, 0.5), (0.25, 0.25)), 3).eval()
    with torch.no_grad(), OperationCounter(student, 3) as counter:
        student.steps(images().pixels.float() / 255)
    # Two products of 2 x 2 channels in each of two heads, at each of 144 pixels.
    assert float(counter.multiply_additions["stage1.3.product"].sum()) == 6 * 3 * 2 * 2 * 2 * 2 * 144


def test_a_real_valued_layer_at_every_step_costs_t_times():
    act = snn_units()
    stages = {"stage1": nn.Sequential(act(2), nn.Sigmoid(), nn.Conv2d(2, 4, 1, bias=False), act(4))}
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    student = Student(Staged(stages, head), encoders.build("direct", (0.5, 0.5), (0.25, 0.25)), 3).eval()
    with torch.no_grad(), OperationCounter(student, 3) as counter:
        student.steps(images().pixels.float() / 255)
    assert counter.after(3)["operations"]["multiply_additions"] == 3 * 12 * 12 * 8


@pytest.mark.parametrize("encoder", ["direct", "poisson", "rate"])
def test_one_pass_gives_the_accuracy_at_every_t(encoder):
    student, data = small(encoder), images(40)
    options = {"batch_size": 16, "seed": 3}
    together = measure(student, data, [4, 1, 2], **options)
    assert [result["timesteps"] for result in together] == [4, 1, 2]
    for result in together:
        student.timesteps = result["timesteps"]
        assert measure(student, data, [result["timesteps"]], **options) == [result]
        assert accuracy(student, data, **options) == result["accuracy"]


def test_hooks_leave_no_trace():
    student = small()
    with OperationCounter(student, 3):
        pass
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in student.modules())


def test_teacher_energy_is_the_hand_count():
    network = build("vgg5", ann_units(), in_channels=1, num_classes=10, width=2)
    macs = 28 * 28 * 9 * 1 * 2 + 14 * 14 * 9 * 2 * 4 + 7 * 7 * 9 * (4 * 8 + 8 * 8) + 8 * 10
    energy = teacher_energy_uj(Teacher(network, (0.5,), (0.5,)).eval(), (1, 28, 28))
    assert energy == pytest.approx(4.6e-6 * macs)
