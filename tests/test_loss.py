"""Each loss against a hand calculation, and what all losses have in common."""

import math

import pytest
import torch
import torch.nn.functional as F

from lasnn import losses
from lasnn.loss import attention, cross_entropy, ensemble_kd, entropy, feature_mse, logit_kd, tet

T, B, K = 3, 4, 5


@pytest.fixture
def given():
    torch.manual_seed(0)
    sizes = [(6, 8, 8), (8, 4, 4)]
    return {
        "logits": torch.randn(T, B, K, requires_grad=True),
        "targets": torch.randint(K, (B,)),
        "teacher_logits": torch.randn(B, K),
        "student_features": [(torch.rand(T, B, *size) > 0.6).float().requires_grad_() for size in sizes],
        "teacher_features": [torch.rand(B, *size) for size in sizes],
    }


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_is_one_finite_scalar_with_a_gradient(name, given):
    entry = losses[name]
    loss = entry.function(*(given[tensor] for tensor in entry.inputs))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    learnt = given["logits"] if "logits" in entry.inputs else given["student_features"][0]
    assert learnt.grad.isfinite().all()
    assert learnt.grad.abs().sum() > 0


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_loss_computes_in_single_precision(name, dtype, given):
    entry = losses[name]
    half = {
        key: [item.to(dtype) for item in value] if isinstance(value, list) else value.to(dtype)
        for key, value in given.items()
        if key != "targets"
    } | {"targets": given["targets"]}
    assert entry.function(*(half[tensor] for tensor in entry.inputs)).dtype == torch.float32


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
