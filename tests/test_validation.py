"""Training images that are held out."""

import json
import signal

import pytest
import torch
from test_distillation import StopAt, digest, without_times

from lasnn import distill, load_run
from lasnn.data import Images, Streamed, hold_out
from lasnn.data.stream import InMemory, place
from lasnn.errors import UserError
from lasnn.evaluation.measure import validate
from lasnn.plan import read_plan
from lasnn.training.stop import Stopped

HELD = ["data.validation=40"]


def pictures(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 3, 3), dtype=torch.uint8, generator=draws)
    return Images(pixels, torch.arange(count) % 7)


def as_set(images):
    return {image.numpy().tobytes() for image in images.pixels}


def test_what_is_held_out_is_of_each_image_alone():
    images = pictures(200)
    train, held = hold_out(images, 50)
    assert (len(train), len(held)) == (150, 50)
    assert as_set(train) | as_set(held) == as_set(images)
    assert not as_set(train) & as_set(held)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    _, again = hold_out(Images(images.pixels[order], images.labels[order]), 50)
    assert as_set(again) == as_set(held)
    # Each label goes with its image.
    where = {image.numpy().tobytes(): int(label) for image, label in zip(images.pixels, images.labels, strict=True)}
    assert [where[image.numpy().tobytes()] for image in held.pixels] == held.labels.tolist()
    assert hold_out(images, 0) == (images, None)
    for wrong in (200, 201, -1):
        with pytest.raises(ValueError, match="count must be from 0 to 199"):
            hold_out(images, wrong)


def test_an_addition_moves_at_most_one_other():
    images, further = pictures(200), pictures(20, seed=9)
    _, held = hold_out(images, 50)
    moved = 0
    for number in range(20):
        more = Images(
            torch.cat([images.pixels, further.pixels[number : number + 1]]),
            torch.cat([images.labels, further.labels[number : number + 1]]),
        )
        _, now = hold_out(more, 50)
        gone, new = as_set(held) - as_set(now), as_set(now) - as_set(held)
        assert len(gone) == len(new) <= 1
        assert not new or new == {further.pixels[number].numpy().tobytes()}
        moved += len(new)
    assert 0 < moved < 20


def test_streamed_images_are_split_as_resident_ones():
    images = pictures(100)
    for kept, streamed in zip(
        hold_out(images, 30), hold_out(Streamed(InMemory(images), torch.device("cpu"), 0), 30), strict=True
    ):
        assert kept.fingerprint() == streamed.fingerprint() != images.fingerprint()
        assert torch.equal(kept.labels, streamed.labels)
        [(pixels, labels)] = streamed.batches([torch.arange(len(streamed))])
        assert torch.equal(pixels, kept.pixels)
        assert torch.equal(labels, kept.labels)


def test_a_run_measures_them_and_does_not_train_on_them(tiny, cached_teachers):
    run = distill(tiny, "run", overrides=HELD)
    summary = json.loads((run / "summary.json").read_text())
    epochs = run.metrics()
    assert len(epochs) == 4
    for line in epochs:
        assert 0 <= line["validation_accuracy"] <= 1
        assert line["validation_nll"] > 0
    for key in ("validation_accuracy", "validation_nll"):
        assert summary[key] == epochs[-1][key]
        assert summary[f"teacher_{key}"] == epochs[1][key]
    loaded = load_run(run.path)
    assert (len(loaded.images.train), len(loaded.images.validation)) == (360, 40)
    assert not as_set(loaded.images.train) & as_set(loaded.images.validation)
    again = validate(loaded.student, loaded.images.validation, batch_size=50, seed=0)
    assert again == {key: summary[key] for key in again}
    # By hand, in one batch.
    with torch.no_grad():
        held = loaded.images.validation
        logits = loaded.student(held.pixels.float() / 255)
    wanted = torch.nn.functional.cross_entropy(logits, held.labels).item()
    assert again["validation_nll"] == pytest.approx(wanted, rel=1e-5)
    assert again["validation_accuracy"] == (logits.argmax(-1) == held.labels).double().mean().item()
    # The held-out images change nothing but by not being there; what was trained on all images is another teacher.
    without = distill(tiny, "without")
    assert digest(without / "teacher.safetensors") != digest(run / "teacher.safetensors")
    assert not any(key.startswith("validation") for line in without.metrics() for key in line)
    streamed = distill(tiny, "streamed", overrides=[*HELD, "data.residence=stream", "data.workers=0"])
    assert digest(streamed / "student.safetensors") == digest(run / "student.safetensors")
    assert streamed.metrics()[-1]["validation_nll"] == summary["validation_nll"]


def test_a_teacher_that_is_read_is_measured_on_them_too(tiny, cached_teachers):
    run = distill(tiny, "first", overrides=[*HELD, "distill.epochs=1"])
    again = distill(
        tiny, "second", overrides=[*HELD, "distill.epochs=1", f"teacher.checkpoint={run / 'teacher.safetensors'}"]
    )
    for key in ("teacher_accuracy", "teacher_validation_accuracy", "teacher_validation_nll"):
        assert again.read_json("summary.json")[key] == run.read_json("summary.json")[key]


def test_a_stopped_run_resumes_and_refuses_another_number(tiny, cached_teachers):
    whole = distill(tiny, "whole", overrides=HELD)
    with pytest.raises(Stopped):
        distill(tiny, "stopped", overrides=HELD, progress=StopAt("student", 1, signal.SIGTERM))
    for other in (["data.validation=41"], []):
        with pytest.raises(UserError, match=r"data\.validation: was 40, now (41|0)"):
            distill(tiny, "stopped", overrides=other, resume=True)
    resumed = distill(tiny, "stopped", overrides=HELD, resume=True)
    assert digest(resumed / "student.safetensors") == digest(whole / "student.safetensors")
    assert without_times(resumed.metrics()) == without_times(whole.metrics())


def test_the_plan_counts_what_is_left(tiny):
    plan = read_plan(tiny, HELD)
    assert plan.summary()["images"] == {"train": 360, "validation": 40, "test": 120}
    assert plan.steps_per_epoch == 8
    assert read_plan(tiny, ["data.validation=60"]).steps_per_epoch == 7
    assert plan.notes[0] == "held out 40 of the 400 training images, by a hash of each; not trained on"
    with pytest.raises(UserError, match=r"data\.validation: 400 images to hold out; there are 400 training images"):
        read_plan(tiny, ["data.validation=400"])


def test_networks_that_may_have_learnt_from_them_are_named(tiny, cached_teachers):
    run = distill(tiny, "run", overrides=["distill.epochs=1"])
    teacher = f"teacher.checkpoint={run / 'teacher.safetensors'}"
    start = f"student.init={run / 'student.safetensors'}"
    for given, names in (([teacher], "teacher.checkpoint"), ([teacher, start], "teacher.checkpoint and student.init")):
        notes = read_plan(tiny, [*HELD, *given]).notes
        assert any(f"whether {names} learnt from these images is not known" in note for note in notes)
    assert not any("is not known" in note for note in read_plan(tiny, HELD).notes)
    assert not any("is not known" in note for note in read_plan(tiny, [teacher]).notes)


def test_there_is_room_for_the_copies(monkeypatch):
    """Those held out and the others lie beside the whole while it is split."""
    images = pictures(100)
    monkeypatch.setattr("lasnn.data.stream.free_bytes", lambda _: 2 * 9 * 150)
    cpu = torch.device("cpu")
    for copies, kind in ((0, Images), (100, Streamed)):
        [placed], _ = place([images], cpu, residence="auto", workers=0, copies=copies)
        assert isinstance(placed, kind)


def test_the_command_says_them(tiny, lasnn, cached_teachers):
    said = lasnn("distill", tiny, "--set", "data.validation=40", "--set", "distill.epochs=1")
    text = said.stdout + said.stderr
    assert "held out by class: T-shirt/top " in text
    assert "(nll " in text


def test_rows_are_compared_by_them(tiny, lasnn, cached_teachers):
    command = ["compare", tiny, "--seeds", "2", "--set", "distill.epochs=1", "--by", "validation_nll"]
    assert "set data.validation" in lasnn(*command, code=2).stderr
    assert "unknown --by 'loss'" in lasnn(*command[:-1], "loss", code=2).stderr
    assert "--by validation_nll" in lasnn(*command, "--against-conversion", code=2).stderr
    found = lasnn.json(*command, "--set", "data.validation=40")
    assert found["measure"] == "validation_nll"
    assert found["conditions"]["images"] == 40
    for row in found["arms"]:
        by_seed = {}
        for seed in ("0", "1"):
            folder = tiny.parent / "runs" / "compare" / "tiny" / f"{row['name']}-T2-seed{seed}"
            by_seed[seed] = json.loads((folder / "summary.json").read_text())["validation_nll"]
        assert row["validation_nll"] == by_seed
        assert row["mean"] == pytest.approx(sum(by_seed.values()) / 2)
        assert "accuracy" not in row
    ours, alone = (row["validation_nll"] for row in found["arms"])
    gain = found["gains"][0]
    assert gain["mean"] == pytest.approx(sum(ours[seed] - alone[seed] for seed in ours) / 2)
    text = (tiny.parent / "runs" / "compare" / "tiny" / "compare.md").read_text()
    assert text.startswith("Negative log-likelihood on the images held out")
    assert "40 images held out" in text


def test_held_out_pictures_stay_known_to_the_run(tiny, cached_teachers):
    run = distill(tiny, "run", overrides=[*HELD, "distill.epochs=1"])
    described = json.loads((run / "data.json").read_text())
    assert described["validation"] == 40
    assert described["train_size"] == 400
    assert load_run(run.path).description.validation == 40
