"""Each loss against a hand calculation, and what all losses have in common."""

import math

import pytest
import torch
import torch.nn.functional as F

from lasnn import losses
from lasnn.errors import UserError
from lasnn.loss import (
    BoundLoss,
    FeatureRegressor,
    Pair,
    attention,
    cka,
    cross_entropy,
    ensemble_kd,
    entropy,
    feature_mse,
    logit_kd,
    pair_problems,
    reading_of,
    samd,
    similarity,
    tet,
)
from lasnn.random import keyed

T, B, K = 3, 4, 5


SIZES = [(6, 8, 8), (8, 4, 4)]
PAIRS = [Pair(f"stage{number}", f"stage{number}", size, size) for number, size in enumerate(SIZES, start=1)]


@pytest.fixture
def given():
    torch.manual_seed(0)
    return {
        "logits": torch.randn(T, B, K, requires_grad=True),
        "targets": torch.randint(K, (B,)),
        "teacher_logits": torch.randn(B, K),
        "teacher_classifier": (torch.randn(K, SIZES[-1][0]), torch.randn(K)),
        "student_features": [(torch.rand(T, B, *size) > 0.6).float().requires_grad_() for size in SIZES],
        "teacher_features": [torch.rand(B, *size) for size in SIZES],
        "student_currents": [torch.randn(1, B, *size, requires_grad=True) for size in SIZES],
        "teacher_currents": [torch.randn(B, *size) for size in SIZES],
    }


# Every loss as it stands in the registry, and attention in its forms.
FORMS = [
    *((name, {}) for name in losses.names()),
    *(
        ("attention", {"normalize": normalize, "measure": measure, "temporal": temporal, **pool})
        for normalize in ("l2", "softmax", "z-score", "max", "none")
        for measure, temporal, pool in (("mse", "step", {"pool": 2}), ("cosine", "rate", {}), ("cosine", "map", {}))
    ),
    ("attention", {"normalize": "softmax", "measure": "kl", "temperature": 0.25}),
    ("attention", {"tap": "current", "measure": "cosine", "normalize": "z-score", "pool": 3}),
    ("logit-kd", {"standardize": True, "readout": "step"}),
    ("logit-kd", {"noise": 0.1}),
    ("cka", {"temporal": "rate"}),
]


def bound(name, options):
    torch.manual_seed(1)
    return BoundLoss(losses[name], options, PAIRS, K)


def learnt_by(loss, given):
    """The first of the student's tensors that a loss reads."""
    name = next(name for name in loss.inputs if name in ("logits", "student_features", "student_currents"))
    return given[name] if name == "logits" else given[name][-1]


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_every_loss_is_one_finite_scalar_with_a_gradient(name, options, given):
    function = bound(name, options)
    loss = function(given)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    learnt = learnt_by(function, given)
    assert learnt.grad.isfinite().all()
    assert learnt.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_a_silent_student_has_a_finite_gradient(name, options, given):
    """Logits that are all equal, features of zeros."""
    for tensor in (given["logits"], *given["student_features"], *given["student_currents"]):
        tensor.data.zero_()
    function = bound(name, options)
    function(given).backward()
    gradient = learnt_by(function, given).grad
    assert gradient is None or gradient.abs().max() < 1e4


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_computes_in_single_precision(name, options, dtype, given):
    """Of half-precision tensors, under autocast: what it is of the same values in fp32."""

    def cast(value, to):
        return [cast(one, to) for one in value] if isinstance(value, list | tuple) else value.detach().to(to)

    half = {key: value if key == "targets" else cast(value, dtype) for key, value in given.items()}
    single = {key: value if key == "targets" else cast(value, torch.float32) for key, value in half.items()}
    function, other = bound(name, options), bound(name, options)
    with torch.autocast("cpu", torch.bfloat16), keyed("noise"):
        loss = function(half)
    assert loss.dtype == torch.float32
    with keyed("noise"):
        assert loss.item() == pytest.approx(other(single).item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in losses if "targets" in losses[name].inputs])
def test_targets_may_be_probabilities(name, given):
    entry = losses[name]
    indices = entry.function(*(given[tensor] for tensor in entry.inputs))
    certain = given | {"targets": F.one_hot(given["targets"], K).float()}
    torch.testing.assert_close(entry.function(*(certain[tensor] for tensor in entry.inputs)), indices)
    mixed = given | {"targets": torch.rand(B, K).softmax(-1)}
    loss = entry.function(*(mixed[tensor] for tensor in entry.inputs))
    assert loss.shape == ()
    assert loss.isfinite()


@pytest.mark.parametrize(("name", "options"), FORMS, ids=str)
def test_a_loss_reads_time_as_it_says(name, options, given):
    """What time chunks rest on: the mean of the features is enough, or the mean of the steps' losses is the loss."""
    reading = reading_of(losses[name].function, options)
    if reading is None:
        return
    function, whole = bound(name, options), bound(name, options)(given)
    features = given["student_features"]
    if reading == "mean":
        found = function(given | {"student_features": [one.mean(0, keepdim=True) for one in features]})
    else:
        found = sum(function(given | {"student_features": [one[t : t + 1] for one in features]}) for t in range(T)) / T
    torch.testing.assert_close(found, whole)


def test_cross_entropy_of_mixed_labels():
    """Logits 0 and ln 3 are 1/4 and 3/4; the label is 0.4 the first class and 0.6 the second."""
    logits = torch.tensor([[[0.0, math.log(3)]]])
    expected = 0.4 * math.log(4) + 0.6 * math.log(4 / 3)
    assert cross_entropy(logits, torch.tensor([[0.4, 0.6]])).item() == pytest.approx(expected)


def test_cross_entropy_of_each_step():
    """The label's probability is 3/4 at the first step and 1/4 at the second: ln(4/3) and ln 4."""
    logits = torch.tensor([[[math.log(3), 0.0]], [[0.0, math.log(3)]]])
    loss = cross_entropy(logits, torch.tensor([0]), readout="step").item()
    assert loss == pytest.approx((0.287682 + 1.386294) / 2, abs=1e-6)
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(math.log(2))


def test_entropy_by_hand():
    """(3/4, 1/4) has entropy 0.562335 nats, (1/2, 1/2) has ln 2."""
    logits = torch.tensor([[[math.log(3), 0.0]], [[7.0, 7.0]]])
    assert entropy(logits).item() == pytest.approx(-(0.562335 + 0.693147) / 2, abs=1e-6)
    assert entropy(torch.tensor([[[500.0, 0.0]]])).item() == pytest.approx(0)


def test_entropy_pushes_towards_uniform():
    logits = torch.tensor([[[2.0, 0.0, -1.0]]], requires_grad=True)
    entropy(logits).backward()
    assert logits.grad[0, 0, 0] > 0
    assert logits.grad[0, 0, 2] < 0


def test_ensemble_kd_by_hand():
    """Steps 1 and 2 are right, 3 is wrong: the ensemble's logits are (ln 9 + ln 3)/2 = 1.5 ln 3 and 0.

    At temperature 1.5 its odds are 3, those of the steps 9^(2/3), 3^(2/3), 3^(-2/3) = 4.32675, 2.08008, 0.48075. So
    p = 0.75 and q = 0.812268, 0.675334, 0.324666; KL(p || q) = p ln(p/q) + (1-p) ln((1-p)/(1-q)) is 0.0117936,
    0.0133155 and 0.3795196.
    """
    logits = torch.tensor([[[math.log(9), 0.0]], [[math.log(3), 0.0]], [[0.0, math.log(3)]]], requires_grad=True)
    loss = ensemble_kd(logits, torch.tensor([0]), temperature=1.5)
    assert loss.item() == pytest.approx(1.5**2 * (0.0117936 + 0.0133155 + 0.3795196) / 3, abs=2e-6)
    loss.backward()
    # d/dz = temperature (q - p) / T: the ensemble itself gets no gradient.
    expected = [1.5 * (q - 0.75) / 3 for q in (0.812268, 0.675334, 0.324666)]
    torch.testing.assert_close(logits.grad[:, 0, 0], torch.tensor(expected), atol=2e-6, rtol=0)


def test_ensemble_kd_where_no_step_is_right():
    """The ensemble is then uniform, for this image alone; KL(1/2 || 3/4) is ln(2/sqrt(3)) = 0.143841."""
    wrong = [math.log(3), 0.0]
    logits = torch.tensor([[wrong, wrong], [wrong, wrong]])
    assert ensemble_kd(logits, torch.tensor([1, 0]), temperature=1.0).item() == pytest.approx(0.143841 / 2, abs=1e-6)
    mixed = torch.tensor([[0.3, 0.7], [0.7, 0.3]])
    assert ensemble_kd(logits, mixed, temperature=1.0).item() == pytest.approx(0.143841 / 2, abs=1e-6)


def test_the_objectives_of_elkd_and_tser():
    """Two steps with odds of the label 3 and 1/3, the teacher's 9, temperature 2.

    The softened odds are 1.732, 0.577 and 3: the steps have 0.633975 and 0.366025, the teacher 0.75. The first step
    alone is right, so it is the ensemble: KL 0 for itself, 0.1471861 for the second. The teacher's are 0.0307378 and
    0.3053909. Cross-entropy is (ln(4/3) + ln 4)/2 = 0.8369882, the entropy of either step 0.5623351.
    """
    logits = torch.tensor([[[math.log(3), 0.0]], [[0.0, math.log(3)]]])
    targets, teacher = torch.tensor([0]), torch.tensor([[math.log(9), 0.0]])
    ce = cross_entropy(logits, targets, readout="step").item()
    kd = logit_kd(logits, teacher, temperature=2.0, readout="step").item()
    own = ensemble_kd(logits, targets, temperature=2.0).item()
    assert kd == pytest.approx(4 * (0.0307378 + 0.3053909) / 2, abs=2e-6)
    assert own == pytest.approx(4 * 0.1471861 / 2, abs=2e-6)
    assert ce + 0.2 * kd + 0.5 * own == pytest.approx(1.118626, abs=3e-6)
    assert 0.7 * ce + 0.3 * kd + 0.1 * entropy(logits).item() == pytest.approx(0.731335, abs=3e-6)


def test_cross_entropy_of_the_mean():
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
    expected = -math.log(math.exp(1) / (math.exp(1) + 1))
    assert cross_entropy(logits, torch.tensor([0])).item() == pytest.approx(expected)
    smooth = 0.9 * expected + 0.1 * (expected + -math.log(1 / (math.exp(1) + 1))) / 2
    assert cross_entropy(logits, torch.tensor([0]), label_smoothing=0.1).item() == pytest.approx(smooth)


def test_tet_by_hand():
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
    ce = (-math.log(math.exp(2) / (math.exp(2) + 1)) + math.log(2)) / 2
    mse = (1 + 1 + 1 + 1) / 4
    assert tet(logits, torch.tensor([0]), mse_weight=0.25).item() == pytest.approx(0.75 * ce + 0.25 * mse)


def test_logit_kd_by_hand():
    logits, teacher = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[2.0, 0.0]])
    p = 1 / (1 + math.exp(-1.0))

    def kl(q):
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    assert logit_kd(logits, teacher, temperature=2.0).item() == pytest.approx(4 * kl(0.5), abs=1e-6)
    q = 1 / (1 + math.exp(-0.5))
    expected = 4 * (kl(q) + kl(1 - q)) / 2
    assert logit_kd(logits, teacher, temperature=2.0, readout="step").item() == pytest.approx(expected, abs=1e-6)


def hand_map(x, power):
    """[B, C, H, W] -> [B, H*W], straight from the formula."""
    maps = x.abs().pow(power).sum(1).flatten(1)
    return maps / maps.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_attention_is_the_formula(given, power):
    student, teacher = given["student_features"], given["teacher_features"]
    rate = sum(
        (hand_map(s.mean(0), power) - hand_map(t, power)).square().mean() for s, t in zip(student, teacher, strict=True)
    )
    torch.testing.assert_close(attention(student, teacher, power=power), rate)
    step = sum(
        torch.stack([(hand_map(s[t], power) - hand_map(a, power)).square().mean() for t in range(T)]).mean()
        for s, a in zip(student, teacher, strict=True)
    )
    torch.testing.assert_close(attention(student, teacher, power=power, temporal="step"), step)
    total = torch.zeros(())
    for s, a in zip(student, teacher, strict=True):
        maps = s.abs().pow(power).sum(2).mean(0).flatten(1)
        total = total + (maps / maps.norm(dim=1, keepdim=True) - hand_map(a, power)).square().mean()
    torch.testing.assert_close(attention(student, teacher, power=power, temporal="map"), total)


def test_attention_weighs_its_pairs(given):
    student, teacher = given["student_features"], given["teacher_features"]
    each = [attention([s], [t]) for s, t in zip(student, teacher, strict=True)]
    weighted = attention(student, teacher, pair_weights=[2.0, 0.5])
    torch.testing.assert_close(weighted, 2 * each[0] + 0.5 * each[1])


def test_attention_pools_the_larger_feature_and_forgets_channels():
    student, teacher = torch.rand(2, 3, 5, 8, 8), torch.rand(3, 9, 4, 4)
    pooled = F.avg_pool2d(student.flatten(0, 1), 2).unflatten(0, (2, 3))
    torch.testing.assert_close(attention([student], [teacher]), attention([pooled], [teacher]))
    student, teacher = torch.rand(2, 3, 5, 7, 4), torch.rand(3, 9, 14, 8)
    torch.testing.assert_close(attention([student], [teacher]), attention([student], [F.avg_pool2d(teacher, 2)]))


@pytest.mark.parametrize("temporal", ["rate", "step", "map"])
def test_silent_maps_have_bounded_gradients(temporal):
    silent = torch.zeros(2, 3, 4, 5, 5, requires_grad=True)
    attention([silent], [torch.rand(3, 4, 5, 5)], power=1.0, temporal=temporal).backward()
    assert silent.grad.isfinite().all()
    assert 0 < silent.grad.abs().max() < 100, "power 1 reaches silent neurons, by a bounded gradient"
    silent.grad = None
    attention([silent], [torch.rand(3, 4, 5, 5)], power=2.0, temporal=temporal).backward()
    assert silent.grad.abs().max() == 0


def test_equal_maps_have_no_distance():
    feature = torch.rand(1, 2, 3, 4, 4)
    assert attention([feature], [5 * feature[0]], power=2.0).item() == pytest.approx(0, abs=1e-12)


def test_feature_mse_by_hand():
    student = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
    assert feature_mse([student], [torch.full((1, 1, 1, 1), 2.0)], pair_weights=[3.0]).item() == pytest.approx(6.75)


# Two images' maps of 1 x 2 pixels, student and teacher: energies (9, 16) and (16, 9) at power 2.
OURS = torch.tensor([3.0, 4.0]).view(1, 1, 1, 1, 2)
THEIRS = torch.tensor([4.0, 3.0]).view(1, 1, 1, 2)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # Unit maps (9, 16)/sqrt(337) and (16, 9)/sqrt(337): differences of 7/sqrt(337), cosine 288/337.
        ({}, 49 / 337),
        ({"measure": "cosine"}, 49 / 337),
        ({"normalize": "max", "measure": "cosine"}, 49 / 337),
        # (9/16, 1) and (1, 9/16).
        ({"normalize": "max"}, (7 / 16) ** 2),
        ({"normalize": "none"}, 49.0),
        # (-1, 1) and (1, -1).
        ({"normalize": "z-score"}, 4.0),
        ({"normalize": "z-score", "measure": "cosine"}, 2.0),
        # Scaled to (0, 1) and (1, 0); softmax at temperature 1/ln 3: (1/4, 3/4) and (3/4, 1/4).
        ({"normalize": "softmax", "temperature": 1 / math.log(3)}, 0.25),
        ({"normalize": "softmax", "temperature": 1 / math.log(3), "measure": "cosine"}, 1 - 6 / 10),
        ({"normalize": "softmax", "temperature": 1 / math.log(3), "measure": "kl"}, math.log(3) / 2),
        # At power 1 (3, 4) and (4, 3).
        ({"power": 1.0, "normalize": "none"}, 1.0),
        # One pixel: the mean energy is 12.5 in both.
        ({"normalize": "none", "pool": 1}, 0.0),
        ({"normalize": "none", "pool": 2}, 49.0),
    ],
    ids=str,
)
def test_attention_by_hand(options, wanted):
    assert attention([OURS], [THEIRS], **options).item() == pytest.approx(wanted, abs=1e-6)
    assert attention([OURS] * 2, [THEIRS] * 2, pair_weights=[1.0, 2.0], **options).item() == pytest.approx(
        3 * wanted, abs=1e-5
    )


def test_the_kl_is_of_the_teacher_from_the_student():
    """Teacher (3/4, 1/4), student uniform: 3/4 ln 1.5 + 1/4 ln 0.5; the other way round it is ln(2/sqrt(3))."""
    options = {"normalize": "softmax", "measure": "kl", "temperature": 1 / math.log(3)}
    equal = torch.ones(1, 1, 1, 1, 2)
    assert attention([equal], [THEIRS], **options).item() == pytest.approx(0.130812, abs=1e-6)


def test_the_cosine_weighs_stages_alike_whatever_their_size():
    """A map of four times as many pixels, each repeated: the mean of squares falls to a quarter, the cosine stays."""
    large = [F.interpolate(one.flatten(0, -4), scale_factor=2).view(*one.shape[:-2], 2, 4) for one in (OURS, THEIRS)]
    ours, theirs = ([one] for one in large)
    assert attention(ours, theirs).item() == pytest.approx(49 / 337 / 4)
    assert attention(ours, theirs, measure="cosine").item() == pytest.approx(49 / 337)


def test_coarse_maps_are_means_of_the_fine_ones(given):
    student, teacher = given["student_features"][0], given["teacher_features"][0]
    maps = [F.avg_pool2d(one.square().sum(1), 4).flatten(1) for one in (student.mean(0), teacher)]
    ours, theirs = (one / one.norm(dim=1, keepdim=True) for one in maps)
    torch.testing.assert_close(attention([student], [teacher], pool=2), (ours - theirs).square().mean())
    torch.testing.assert_close(attention([student], [teacher], pool=99), attention([student], [teacher]))


def test_attention_to_currents_reads_no_spikes(given):
    currents = [given["student_currents"], given["teacher_currents"]]
    found = bound("attention", {"tap": "current"})({"student_currents": currents[0], "teacher_currents": currents[1]})
    torch.testing.assert_close(found, attention(*currents))
    assert bound("attention", {}).inputs == ("student_features", "teacher_features")


@pytest.mark.parametrize(
    ("options", "key", "said"),
    [
        ({"measure": "kl"}, "measure", 'set normalize = "softmax"'),
        ({"temperature": 2.0, "normalize": "max"}, "temperature", 'has no effect with normalize = "max"'),
        ({"tap": "current", "temporal": "step"}, "temporal", "the mean over time alone"),
        ({"pair_weights": [1.0]}, "pair_weights", "1 weights for 2 pairs"),
    ],
)
def test_options_of_attention_that_contradict_each_other(options, key, said):
    [(option, message)] = pair_problems(attention, PAIRS, options)
    assert option == key
    assert said in message


def test_samd_by_hand():
    """The teacher decides for class 1, whose weights are (1, -1): its map is ReLU((3, 2, 1) - (1, 4, 1)) = (2, 0, 0),
    scaled to (1, 0, 0). The student's rates, summed over channels, are (0.5, 1.5, 0.5), scaled to (0, 1, 0). At
    temperature 1/ln 3 that is (3, 1, 1)/5 against (1, 3, 1)/5, whose divergence is (3/5 - 1/5) ln 3.
    """
    steps = [[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    student = torch.tensor(steps).view(2, 1, 2, 1, 3)
    teacher = torch.tensor([[3.0, 2.0, 1.0], [1.0, 4.0, 1.0]]).view(1, 2, 1, 3)
    classifier = torch.tensor([[9.0, 9.0], [1.0, -1.0]]), torch.zeros(2)
    other = torch.zeros(2, 1, 3, 4, 4), torch.zeros(1, 5, 4, 4)
    given = torch.tensor([[0.0, 1.0]]), classifier
    loss = samd([other[0], student], [other[1], teacher], *given, temperature=1 / math.log(3))
    assert loss.item() == pytest.approx(0.4 * math.log(3), abs=1e-6)
    with pytest.raises(
        UserError, match="that has 2 inputs, the last pair's stage 5 channels; name the teacher's last stage"
    ):
        samd([student, other[0]], [teacher, other[1]], *given)


def test_samd_of_currents_is_of_their_positive_part():
    """As a head activates them; a neuron that is silent learns."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, 5, requires_grad=True), torch.randn(3, 6, 5, 5)
    given = torch.randn(3, 10), (torch.randn(10, 6), torch.zeros(10))
    positive = student.detach().mean(0, keepdim=True).relu()
    loss = samd([student], [teacher], *given)
    assert loss.item() == pytest.approx(samd([positive], [teacher.relu()], *given).item(), rel=1e-6)
    silent = torch.zeros(1, 3, 4, 5, 5, requires_grad=True)
    with torch.no_grad():
        silent[:, :, :, 2, 2] = 1.0
    samd([silent], [teacher], *given).backward()
    assert silent.grad[..., 0, 0].abs().sum() > 0


def test_standardised_logits_by_hand():
    """(2, 1, 0) and (30, 20, 10) are both (1, 0, -1): no distance; (0, 2, 4) is that reversed."""
    teacher = torch.tensor([[30.0, 20.0, 10.0]])
    assert logit_kd(torch.tensor([[[2.0, 1.0, 0.0]]]), teacher, standardize=True).item() == pytest.approx(0, abs=1e-6)
    # KL(softmax(0.5, 0, -0.5) || reversed): the logarithms differ by 1, 0 and -1.
    wanted = 4 * (math.exp(0.5) - math.exp(-0.5)) / (math.exp(0.5) + 1 + math.exp(-0.5))
    found = logit_kd(torch.tensor([[[0.0, 2.0, 4.0]]]), teacher, standardize=True, temperature=2.0).item()
    assert found == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(UserError, match="leaves nothing to learn of two classes.*set standardize = false"):
        logit_kd(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[3.0, 1.0]]), standardize=True)


def test_noise_smoothed_logits_by_hand():
    """z' = z + 0.5 deviation * n with the numbers n that the global generator gives."""
    logits, teacher = torch.tensor([[[1.0, 3.0]]], requires_grad=True), torch.tensor([[0.0, 2.0]])
    with keyed("noise"):
        found = logit_kd(logits, teacher, noise=0.5, temperature=2.0)
    with keyed("noise"):
        drawn = torch.randn(1, 1, 2)
    smooth = logits.detach() + 0.5 * math.sqrt(2) * drawn
    torch.testing.assert_close(found, logit_kd(smooth, teacher, temperature=2.0))
    found.backward()
    # The noise is a constant of the gradient, temperature (q - p).
    q, p = (smooth[0] / 2).softmax(-1), (teacher / 2).softmax(-1)
    torch.testing.assert_close(logits.grad[0], 2.0 * (q - p))


def test_the_feature_regressor_by_hand():
    """The convolution's centre is 2, so that it gives 2 and 0 of rates 1 and 0; normalised these are 1 and -1."""
    regressor = FeatureRegressor([(1, 1, 1)], [(1, 1, 1)], pair_weights=[3.0])
    [[convolution, norm]] = regressor.regressors
    torch.nn.init.zeros_(convolution.weight)
    convolution.weight.data[0, 0, 1, 1] = 2.0
    student, teacher = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1), torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    assert regressor([student], [teacher]).item() == pytest.approx(3 * (1 + 9) / 2, rel=1e-4)
    assert norm.num_batches_tracked == 1
    assert convolution.bias is None


def test_similarity_by_hand():
    """Images (1, 0) and (1, 1): rows (1, 1)/sqrt(2) and (1, 2)/sqrt(5). The teacher's images are orthogonal: the
    identity. Differences: 1 - 1/sqrt(2), 1/sqrt(2), 1/sqrt(5), 1 - 2/sqrt(5).
    """
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 2, 2, 1, 1), 5 * torch.eye(2).view(2, 2, 1, 1)
    a, b = 1 / math.sqrt(2), 1 / math.sqrt(5)
    wanted = ((1 - a) ** 2 + a**2 + b**2 + (1 - 2 * b) ** 2) / 4
    assert similarity([student], [teacher], pair_weights=[2.0]).item() == pytest.approx(2 * wanted, rel=1e-5)


def test_cka_by_hand():
    """Of three images with one value each the Gram matrices are x x^T, centred: CKA is their correlation squared."""
    steps = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]).view(2, 3, 1, 1, 1)
    teacher = torch.tensor([10.0, 12.0, 14.0]).view(3, 1, 1, 1)
    # Correlations 1 and 1/2; of the mean (0, 1.5, 1.5): sqrt(3)/2.
    assert cka([steps], [teacher]).item() == pytest.approx((0 + 0.75) / 2, abs=1e-6)
    assert cka([steps], [teacher], temporal="rate", pair_weights=[2.0]).item() == pytest.approx(0.5, abs=1e-6)
