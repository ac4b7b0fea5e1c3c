"""Encoders: what each promises about its spikes, over all that are registered and one by one."""

import pytest
import torch

from lasnn.encoder import Encoder, check_images
from lasnn.network.staged import build as build_network
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.network.units import ann_units, snn_units
from lasnn.random import generator
from lasnn.registry import encoders

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)


def build(name: str) -> Encoder:
    return encoders.build(name, MEAN, STD)


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator("images"))


@pytest.fixture
def images():
    return random_images(2, 3, 5, 7)


# Every encoder


@pytest.mark.parametrize("name", encoders.names())
@pytest.mark.parametrize("timesteps", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_shape_type_and_values(name, timesteps, dtype, images):
    encoder = build(name)
    out = encoder(images.to(dtype), timesteps, generator(0))
    assert out.shape == (1 if encoder.constant else timesteps, *images.shape)
    assert out.dtype == dtype
    if encoder.spiking:
        assert ((out == 0) | (out == 1)).all()


@pytest.mark.parametrize("name", encoders.names())
def test_causal_where_it_says_so(name):
    encoder = build(name)
    images = random_images(4, 3, 8, 8)
    long = encoder(images, 6, generator(0))
    prefixes = [
        torch.equal(encoder(images, t, generator(0)), long if encoder.constant else long[:t]) for t in range(1, 6)
    ]
    assert all(prefixes) == encoder.causal


@pytest.mark.parametrize("name", encoders.names())
def test_repeats_with_the_same_generator(name, images):
    encoder = build(name)
    assert torch.equal(encoder(images, 4, generator(7)), encoder(images, 4, generator(7)))


class Noisy(Encoder):
    """As a user would write one: it draws all steps at once."""

    random = True

    def encode(self, images, timesteps, generator):
        return images + torch.randn(timesteps, *images.shape, generator=generator)


@pytest.mark.parametrize("name", [*encoders.names(), "noisy"])
def test_a_part_of_a_batch_in_stretches_of_time_is_that_of_the_whole(name):
    encoder = Noisy(MEAN, STD) if name == "noisy" else build(name)
    images = random_images(5, 3, 4, 4)
    whole = encoder(images, 7, generator(3))
    for first, last in ((0, 2), (2, 5)):
        draws = generator(3)
        parts = [
            encoder.part(images[first:last], 7, draws, first=first, total=5, start=start, stop=min(7, start + 3))
            for start in (0, 3, 6)
        ]
        if encoder.constant:
            assert all(torch.equal(part, whole[:, first:last]) for part in parts)
        else:
            assert [len(part) for part in parts] == [3, 3, 1]
            assert torch.equal(torch.cat(parts), whole[:, first:last])


@pytest.mark.parametrize("name", encoders.names())
@pytest.mark.parametrize("timesteps", [0, -1])
def test_too_few_steps(name, timesteps, images):
    with pytest.raises(ValueError, match=f"timesteps must be at least 1, not {timesteps}"):
        build(name)(images, timesteps)


@pytest.mark.parametrize("name", encoders.names())
def test_bytes_are_refused(name):
    with pytest.raises(TypeError, match="uint8"):
        build(name)(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 2)


@pytest.mark.parametrize("name", encoders.names())
def test_runs_on_the_meta_device(name):
    images = torch.empty(2, 3, 8, 8, device="meta")
    assert build(name).to("meta")(images, 4).shape[1:] == images.shape


@pytest.mark.parametrize("name", encoders.names())
def test_takes_strided_images_and_leaves_them_alone(name, images):
    strided = images.to(memory_format=torch.channels_last)
    out = build(name)(strided, 4, generator(0))
    assert torch.equal(out, build(name)(images, 4, generator(0)))
    assert torch.equal(strided, images)


@pytest.mark.parametrize("name", encoders.names())
def test_has_no_state_and_a_description(name):
    encoder = build(name)
    assert not encoder.state_dict()
    assert not list(encoder.parameters())
    assert encoders[name].description


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", encoders.names())
def test_on_a_gpu(name, images):
    encoder, there = build(name).to("cuda"), images.to("cuda")
    out = encoder(there, 5, generator(0, device="cuda"))
    assert out.is_cuda
    if encoder.causal:
        prefix = encoder(there, 3, generator(0, device="cuda"))
        assert torch.equal(prefix, out[: len(prefix)])
    if name == "rate":
        assert torch.equal(out.cpu(), build(name)(images, 5))


# One by one


def test_direct_is_the_normalised_image(images):
    encoder = build("direct")
    assert encoder.constant
    assert not encoder.spiking
    expected = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    for timesteps in (1, 4):
        assert torch.equal(encoder(images, timesteps), expected[None])


def test_direct_passes_gradients(images):
    images.requires_grad_()
    build("direct")(images, 4).sum().backward()
    expected = (1 / torch.tensor(STD)).view(1, 3, 1, 1).expand_as(images)
    torch.testing.assert_close(images.grad, expected)


@pytest.mark.parametrize("timesteps", [1, 2, 3, 4, 8, 31, 256])
def test_rate_counts_are_exact(timesteps):
    # All values that an 8-bit pixel can have; in exact arithmetic none of them is a tie.
    pixels = torch.arange(256)
    spikes = build("rate")((pixels / 255).view(1, 1, 16, 16), timesteps).flatten(1)
    expected = (2 * pixels * timesteps + 255) // 510
    assert torch.equal(spikes.sum(0).long(), expected)


def test_rate_rounds_ties_to_even():
    intensity = torch.tensor([1, 3, 5, 7]).view(1, 1, 2, 2) / 8
    spikes = build("rate")(intensity, 4)
    assert spikes.sum(0).flatten().tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("timesteps", [1, 2, 5, 8, 32])
def test_rate_spreads_its_spikes_evenly(timesteps):
    count = torch.arange(timesteps + 1)
    spikes = build("rate")((count / timesteps).view(1, 1, 1, -1), timesteps).flatten(1).long()
    elapsed = torch.arange(1, timesteps + 1)[:, None]
    assert ((spikes.cumsum(0) * timesteps - elapsed * count).abs() * 2 <= timesteps).all()
    for train in spikes.T:
        gaps = train.nonzero().flatten().diff()
        if len(gaps):
            assert gaps.max() - gaps.min() <= 1


def test_rate_of_four_steps():
    spikes = build("rate")(torch.tensor([0, 0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 5), 4)
    assert spikes.flatten(1).T.tolist() == [
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 1, 0, 1],
        [1, 1, 1, 1],
    ]


def test_rate_needs_no_randomness(images):
    encoder = build("rate")
    assert torch.equal(encoder(images, 8, generator(0)), encoder(images, 8, generator(1)))


def test_poisson_rate_is_the_intensity():
    levels = torch.linspace(0, 1, 11)
    batch, timesteps = 50, 200
    images = levels.view(1, 1, 1, -1).expand(batch, 1, 20, 11)
    spikes = build("poisson")(images, timesteps, generator(0))
    draws = batch * timesteps * 20
    rate = spikes.mean((0, 1, 2, 3))
    # Five standard deviations of a binomial mean; 0 at the ends, where the rate must be exact.
    assert ((rate - levels).abs() <= 5 * (levels * (1 - levels) / draws).sqrt() + 1e-7).all()
    # The counts of single pixels vary as a binomial's do.
    variance = spikes.sum(0).view(-1, 11).var(0)
    binomial = timesteps * levels * (1 - levels)
    torch.testing.assert_close(variance, binomial, rtol=0.25, atol=1e-6)


def test_poisson_draws_are_independent():
    images = torch.full((10_000, 1, 2, 2), 0.5)
    spikes = build("poisson")(images, 4, generator(0)).transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(spikes.T)
    assert (correlation - torch.eye(16)).abs().max() < 5 / 10_000**0.5


def test_poisson_seeds(images):
    encoder = build("poisson")
    assert not torch.equal(encoder(images, 8, generator(0)), encoder(images, 8, generator(1)))
    torch.manual_seed(3)
    first = encoder(images, 8)
    assert not torch.equal(first, encoder(images, 8))
    torch.manual_seed(3)
    assert torch.equal(first, encoder(images, 8))


@pytest.mark.parametrize("name", [name for name in encoders if build(name).spiking])
def test_out_of_range_acts_as_clipped(name):
    images = torch.tensor([-3.0, -0.1, 0, 1, 1.2, 9]).view(1, 1, 2, 3)
    spikes = build(name)(images, 5, generator(0))
    assert torch.equal(spikes, build(name)(images.clamp(0, 1), 5, generator(0)))
    assert spikes.sum(0).flatten().tolist() == [0, 0, 0, 5, 5, 5]


@pytest.mark.parametrize("wrong", [-0.01, 1.01, float("nan"), float("inf")])
def test_check_images(wrong, images):
    check_images(images)
    images[0, 0, 0, 0] = wrong
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        check_images(images)


def test_check_images_type_and_shape(images):
    with pytest.raises(ValueError, match="uint8"):
        check_images(images.byte())
    with pytest.raises(ValueError, match=r"\[3, 5, 7\]"):
        check_images(images[0])
    channels = images.shape[1]
    check_images(images, channels)
    with pytest.raises(ValueError, match=f"images have {channels} channels, those .* trained on {channels + 1}"):
        check_images(images, channels + 1)


@pytest.mark.parametrize("encoder", ["direct", "poisson", "rate"])
def test_grey_images_are_not_taken_for_coloured_ones(encoder):
    """Nor the other way round: one channel would fit the mean of any number."""
    mean = std = (0.5, 0.5, 0.5)
    shape = {"in_channels": 3, "num_classes": 2, "width": 2}
    teacher = Teacher(build_network("vgg5", ann_units(), **shape), mean, std)
    network = build_network("vgg5", snn_units(), **shape)
    for model in (teacher.eval(), Student(network, encoders.build(encoder, mean, std), 2).eval()):
        model(torch.rand(2, 3, 16, 16))
        for channels in (1, 4):
            with pytest.raises(ValueError, match=f"images have {channels} channels"):
                model(torch.rand(2, channels, 16, 16))
