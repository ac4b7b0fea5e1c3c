"""The report: figures that agree with the rest of lasnn, and a page that is whole, safe and legible."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import ROOT, TINY, TINY_DATA
from lasnn.data import Batches
from lasnn.errors import UserError
from lasnn.evaluation.evaluate import evaluate, load_run
from lasnn.factory import load_data
from lasnn.report import report
from lasnn.report.chart import TICK, Series, apart, breadth, lines, ticks
from lasnn.report.facts import measure_teacher
from lasnn.report.picture import heat, palette, photo
from lasnn.training.distill import distill

# Random pixels: as many classes and channels as a test asks for, and names that a page must not believe.
ODD_DATA = '''
import torch
from lasnn import datasets
from lasnn.data import Dataset, Images


@datasets.register("odd")
class Odd(Dataset):
    """60 training and 40 test images of noise."""

    height, width, train_size, test_size = 12, 16, 60, 40

    def __init__(self, root, *, count: int = 4, channels: int = 1):
        hostile = ["<script>alert('x')</script>", '" onload="alert(1)', "a & b < c", "W" * 40]
        self.classes = tuple(hostile[i] if i < 4 else f"class {i}" for i in range(count))
        self.channels = channels
        self.mean = self.std = (0.5,) * channels

    def load(self):
        draws = torch.Generator().manual_seed(0)
        shape = (self.channels, self.height, self.width)
        return tuple(
            Images(
                torch.randint(0, 256, (n, *shape), generator=draws).to(torch.uint8),
                torch.randint(0, len(self.classes), (n,), generator=draws),
            )
            for n in (self.train_size, self.test_size)
        )
'''
ODD = """
plugins = ["odd.py"]
[data]
name = "odd"
batch_size = 20
[teacher]
architecture = "vgg5"
width = 2
epochs = 1
[student]
architecture = "vgg5"
width = 2
timesteps = 2
[distill]
epochs = 1
"""
ALONE = ("teacher=", 'losses=[{name="cross-entropy"}]')
# Runs by name: the recipe, and what is set.
RUNS = {
    "plain": (TINY, ()),
    "hostile": (ODD, ()),
    "alone": (ODD, (*ALONE, "student.encoder=poisson", "student.timesteps=1")),
    "rate": (ODD, ("student.encoder=rate", "student.timesteps=3", 'losses=[{name="cross-entropy"}]')),
    "many": (ODD, ("data.count=100", "data.channels=3", "data.residence=stream", "data.workers=0", "student.pool=max")),
    "pooled": (
        ODD,
        (
            "teacher.pool=max",
            "student.architecture=vgg9",
            'distill.pairs=["stage1:stage2"]',
            "losses.1.temporal=step",
            "losses.1.tap=spikes",
        ),
    ),
    "start": (ODD, ("student.width=8", "start.architecture=vgg5", "start.width=8", "start.epochs=1")),
    "current": (ODD, ("losses.1.tap=current", "losses.1.pool=4")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def runs(folder):
    """Makes a run of `RUNS` once, and gives its folder."""
    (folder / "tiny_clothes.py").write_text(TINY_DATA)
    (folder / "odd.py").write_text(ODD_DATA)

    def make(name: str) -> Path:
        text, settings = RUNS[name]
        if not (folder / name).exists():
            text = 'plugins = ["tiny_clothes.py"]\n' + text if text is TINY else text
            (folder / f"{name}.toml").write_text(text)
            before = os.getcwd()
            os.chdir(folder)
            try:
                losses = 'losses=[{name="cross-entropy"}, {name="attention", weight=10.0, power=1.0}]'
                distill(f"{name}.toml", name, overrides=[losses, *settings])
            finally:
                os.chdir(before)
        return folder / name

    return make


@pytest.fixture(scope="module")
def pages(runs):
    """The page of a run and what `report` returned, made once."""
    made = {}

    def make(name: str) -> tuple[str, dict]:
        if name not in made:
            found = report(runs(name), longest=4)
            made[name] = Path(found["file"]).read_text(encoding="utf-8"), found
        return made[name]

    return make


class Balance(HTMLParser):
    """Every element that is opened is closed, in order; ids are there once; figures have a text alternative."""

    VOID = ("meta", "link", "img", "br", "line", "polyline", "circle", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.figures, self.text = [], [], [], 0, []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag != "script"
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if attrs.get("href", "").startswith("#"):
            self.links.append(attrs["href"][1:])
        for name in ("src", "href", "data"):
            assert re.match(r"#|data:|$", attrs.get(name, "")), attrs
        if tag == "img":
            self.figures += 1
            assert attrs["alt"].strip()
        if tag == "svg":
            self.figures += 1
            assert attrs["role"] == "img"
            assert attrs["aria-label"].strip()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    return parser


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_whole_and_needs_nothing_else(name, pages):
    page, found = pages(name)
    assert page.startswith("<!doctype html>")
    parser = read(page)
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    assert set(parser.links) <= set(parser.ids)
    assert parser.figures > 20
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert not re.search(r"url\(", page)
    text = " ".join(parser.text)
    assert not re.search(r"\bnan\b|\binf\b|None|undefined|\{\{|tensor\(", text)
    assert found["bytes"] == len(page.encode()) < 1_000_000


def test_figures_agree_with_evaluate(runs, pages):
    page, found = pages("plain")
    run = load_run(runs("plain"))
    by_t = {result["timesteps"]: result for result in evaluate(run, [1, 2, 4])}
    assert [one["timesteps"] for one in found["over_timesteps"]] == [1, 2, 3, 4]
    for one in found["over_timesteps"]:
        if one["timesteps"] in by_t:
            assert one == {key: by_t[one["timesteps"]][key] for key in one}
    assert found["accuracy"] == run.summary["accuracy"]
    assert found["teacher_accuracy"] == run.summary["teacher_accuracy"]
    assert found["energy_uj"] == run.summary["energy_uj"]
    assert found["teacher_energy_uj"] == pytest.approx(by_t[2]["teacher_energy_uj"])
    assert f"{100 * run.summary['accuracy']:.2f} %" in page
    for name, student in by_t[2]["energy_with_memory"].items():
        teacher = by_t[2]["teacher_energy_with_memory"][name]
        row = re.search(rf">{name}, with memory</th>(.*?)</tr>", page, re.DOTALL).group(1)
        shown = re.findall("<td>(.*?)</td>", row)
        assert shown[:2] == [f"{one['energy_uj']:.3g}" for one in (student, teacher)]
        rate = by_t[2]["break_even_firing_rate"][name]
        assert shown[2] == (f"{rate:.4f}" if rate else "never")
    _, test, _ = load_data(run.recipe, run.data, run.device)
    teacher, layers = measure_teacher(run, test)
    assert sum(layers["energy"].values()) == pytest.approx(teacher["energy_uj"])
    assert layers["rates"].keys() == by_t[2]["firing_rate_by_layer"].keys()
    converted = evaluate(run, [1, 2, 4], converted="percentile")
    assert found["converted"]["method"] == "percentile"
    assert [one["accuracy"] for one in found["converted"]["results"]] == [one["accuracy"] for one in converted]


@torch.no_grad()
def test_attention_distance_is_that_of_the_unit_norm_maps(runs, pages):
    _, found = pages("plain")
    run = load_run(runs("plain"))
    _, test, _ = load_data(run.recipe, run.data, run.device)
    distances = []
    for images, _ in Batches(test, 7, seed=0, epoch=0, shuffle=False):
        _, ours = run.student.steps(images, ["stage2"])
        _, theirs = run.teacher.taps(images, ["stage2"])
        maps = [ours["stage2"].mean(0).sum(1).flatten(1).double(), theirs["stage2"].abs().sum(1).flatten(1).double()]
        maps = [each / each.norm(dim=1, keepdim=True) for each in maps]
        # Of unit norm: the squared distance is 2 - 2 cos.
        distances.append((2 - 2 * (maps[0] * maps[1]).sum(1)).clamp(min=0).sqrt())
    assert found["attention_distance"]["stage2"] == pytest.approx(float(torch.cat(distances).mean()), rel=1e-4)


def test_every_pair_of_maps_is_shown_on_one_scale(pages):
    page, _ = pages("plain")
    pairs = re.findall(r'<div class="maps">.*?</div>\s*</div>', page, re.DOTALL)
    # Three stages of twelve images: the two extremes and one of each class, less those that are both.
    assert len(pairs) % 3 == 0
    assert 30 <= len(pairs) <= 36
    for pair in pairs:
        pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", pair)]
        assert len(pictures) == 2
        # One of the two reaches the brightest colour.
        assert max(np.asarray(picture).max() for picture in pictures) == 255


def test_hostile_names_are_text(pages):
    page, _ = pages("hostile")
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    text = " ".join(read(page).text)
    for name in ("a & b < c", "<script>alert('x')</script>", '" onload="alert(1)', "W" * 40):
        assert name in text


def test_without_a_teacher_the_students_maps_stand_alone(pages):
    page, found = pages("alone")
    assert found["teacher_accuracy"] is None
    assert found["attention_distance"] == {"stage1": None, "stage2": None, "stage3": None}
    assert "the run has no teacher" in page
    assert "attention of the student's stage1" in page
    assert "attention of the teacher" not in page
    assert "has no teacher to convert" in found["converted"]["reason"]
    # One draw of a random encoder, and T = 1: no early exit.
    assert "one draw" in page
    assert "Stopping an image" not in page


def test_an_encoder_that_is_not_causal(pages):
    page, found = pages("rate")
    # Each T is a run of its own.
    assert [one["timesteps"] for one in found["over_timesteps"]] == [1, 2, 3, 4]
    assert "Each T is a run of its own" in page
    assert "Stopping an image" not in page
    assert "no attention loss" in page


def test_the_epochs_of_a_start_are_shown_and_what_it_started_from(pages):
    page, _ = pages("start")
    assert "The loss of [start]" in page
    assert "starts from the weights of [start], converted: thresholds for T = " in page
    assert "The loss of [start]" not in pages("plain")[0]
    assert "starts from random weights" in pages("alone")[0]


def test_a_loss_on_other_maps_than_those_drawn_is_said(pages):
    assert "loss compares other maps:\ntap = current, pool = 4." in pages("current")[0]
    assert "compares other maps" not in pages("plain")[0]
    assert "compares other maps" not in pages("pooled")[0]


def test_many_classes_have_no_labels(pages):
    page, _ = pages("many")
    assert "confusion matrix of 100 classes" in page
    assert "worst of 100 classes" in page
    assert page.count('class="sample large"') == 2
    assert 8 <= page.count('class="sample small"') <= 10


def test_pairs_of_different_stages_and_a_teacher_that_cannot_be_converted(runs, pages):
    page, found = pages("pooled")
    assert found["attention_distance"].keys() == {"stage1"}
    assert "stage1 : stage2" in page
    assert "max_pool" in found["converted"]["reason"]
    assert "No conversion is shown" in page
    # Asked for, it is an error.
    with pytest.raises(UserError, match="max_pool"):
        report(runs("pooled"), converted="maxnorm")


def test_options(runs, tmp_path):
    out = tmp_path / "page.html"
    found = report(runs("hostile"), out, timesteps=5, converted="none")
    assert [one["timesteps"] for one in found["over_timesteps"]] == [2, 5]
    assert found["converted"] == {"reason": "it was left out (--converted none)"}
    # An earlier report is replaced.
    report(runs("hostile"), out, timesteps=np.array([1]), converted="maxnorm", longest=np.int64(3))
    assert "maxnorm" in out.read_text()
    for bad, message in (({"longest": 0}, "at least 1"), ({"timesteps": [True]}, "at least 1")):
        with pytest.raises(UserError, match=message):
            report(runs("hostile"), out, **bad)
    with pytest.raises(UserError, match="qcfs"):
        report(runs("hostile"), out, converted="qfcs")
    with pytest.raises(UserError, match="is a folder"):
        report(runs("hostile"), tmp_path)
    with pytest.raises(UserError, match="no folder"):
        report(runs("hostile"), tmp_path / "not" / "here.html")
    out.write_text("<!doctype html>somebody's own")
    with pytest.raises(UserError, match="did not write"):
        report(runs("hostile"), out)
    assert out.read_text().endswith("own")


def test_the_commands_are_those_of_as_many_processes(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs("hostile"), run)
    known = json.loads((run / "env.json").read_text())
    words = ["torchrun", "--nproc-per-node", "2", "-m", "lasnn"]
    (run / "env.json").write_text(json.dumps({**known, "launcher": words, "command": ["x", "distill", "a.toml"]}))
    page = Path(report(run, converted="none")["file"]).read_text()
    read(page)
    assert "torchrun --nproc-per-node 2 -m lasnn distill a.toml" in page
    assert f"OMP_NUM_THREADS={known['threads']} torchrun --nproc-per-node 2 -m lasnn distill {run}/recipe.toml" in page


def test_an_old_run_lacks_what_is_newer(runs, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(runs("hostile"), old)
    (old / "env.json").unlink()
    epochs = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    kept = [{"phase": epoch["phase"], "epoch": epoch["epoch"]} for epoch in epochs if epoch["phase"] == "student"]
    (old / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in kept))
    summary = json.loads((old / "summary.json").read_text())
    (old / "summary.json").write_text(json.dumps({"accuracy": summary["accuracy"] + 0.01}))
    page = Path(report(old, converted="none")["file"]).read_text()
    read(page)
    assert "has no epochs of the teacher" in page
    assert "has no losses of the student" in page
    assert "has no accuracies" in page
    assert "summary.json says" in page


def test_command(runs, lasnn, tmp_path):
    lasnn.folder = runs("hostile").parent
    found = lasnn.json("report", "hostile", "--out", tmp_path / "page.html", "--converted", "none", "--timesteps", "1")
    assert found["file"] == str(tmp_path / "page.html")
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    page = html.unescape((tmp_path / "page.html").read_text())
    assert "lasnn distill hostile/recipe.toml --out hostile-again" in page
    # It works as it stands, in the folder that the page speaks of.
    assert "from the folder in which this report was made" in page
    lasnn("distill", "hostile/recipe.toml", "--out", "hostile-again", "--dry-run")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs("hostile"), unfinished)
    (unfinished / "summary.json").unlink()
    resume = f"lasnn distill {unfinished / 'recipe.toml'} --out {unfinished} --resume"
    assert resume in lasnn("report", unfinished, code=2).stderr
    with pytest.raises(UserError, match="needs its run folder"):
        report(unfinished / "student.safetensors")
    (unfinished / "student.safetensors").unlink()
    with pytest.raises(UserError, match=re.escape(resume)):
        report(unfinished)
    assert "--timesteps 0" in lasnn("report", "hostile", "--timesteps", "0", code=2).stderr


def test_ticks_are_round_and_cover():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.853, 0.8815) == [0.85, 0.86, 0.87, 0.88, 0.89]
    for low, high in ((0.0, 0.0), (3.0, 3.0), (-2.5, 1e-3), (1e-9, 2e-9)):
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 8


def test_an_axis_of_shares_ends_at_100_percent():
    for value in (0.0, 0.4, 1.0):
        drawn = lines([Series("a", [(1, value), (2, value)], "plain")], title="a", x="x", y="y", shares=True)
        marks = [float(mark) for mark in re.findall(r'class="tick"[^>]*>([\d.]+) %<', drawn)]
        assert len(marks) >= 2
        assert 0 <= marks[0] <= 100 * value <= marks[-1] <= 100


def test_notes_of_points_do_not_lie_on_each_other():
    """Early exits of a sure student lie on one spot."""
    points = [(1.0, 1.0), (1.001, 1.0), (1.002, 0.999), (3.0, 1.0)]
    notes = ["0.5", "0.6", "0.7", "0.99"]
    drawn = lines([Series("a", points, "plain", notes=notes)], title="a", x="x", y="y", shares=True)
    assert drawn.count("<circle") == 4
    texts = re.findall(r'<text class="(?:note|tick)" x="([\d.]+)" y="([\d.]+)" text-anchor="end">(.*?)<', drawn)
    boxes = [(float(x) - breadth(words, TICK), float(x), float(y)) for x, y, words in texts]
    for one, other in combinations(boxes, 2):
        assert one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= TICK
    assert "0.99" in {words for _, _, words in texts}


def test_labels_do_not_lie_on_each_other():
    ends = [(100.0, Series(str(i), [(0, 0)], "plain")) for i in range(6)]
    places = [place for place, _ in apart(ends, 30, 190)]
    assert all(after - before > 13 for before, after in pairwise(places))
    assert places[0] >= 29
    assert places[-1] <= 191


def test_a_chart_of_one_point():
    drawn = str(lines([Series("a<b", [(1, 0.5)], "plain")], title="t", x="epoch", y="y"))
    assert "a&lt;b" in drawn
    assert "a<b" not in drawn
    assert "nan" not in drawn


def test_pictures():
    colours = palette().astype(float)
    assert colours.shape == (256, 3)
    assert colours[[0, -1]].tolist() == [[0, 0, 4], [252, 253, 191]]
    # Every step is lighter (Rec. 709), but for the rounding of 8-bit colour.
    assert np.diff(colours @ [0.2126, 0.7152, 0.0722]).min() > -0.5
    decoded = Image.open(io.BytesIO(base64.b64decode(heat(torch.tensor([[0.0, 0.5], [1.0, 2.0]]), 1.0).split(",")[1])))
    assert np.asarray(decoded.convert("RGB")).tolist() == [
        [colours[0].tolist(), colours[128].tolist()],
        [colours[255].tolist(), colours[255].tolist()],
    ]
    for channels, mode in ((1, "L"), (3, "RGB"), (2, "L")):
        pixels = torch.randint(0, 256, (channels, 300, 150), dtype=torch.uint8)
        shown = Image.open(io.BytesIO(base64.b64decode(photo(pixels).split(",")[1])))
        assert (shown.mode, shown.size) == (mode, (48, 96))


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)


def look(page: str, folder: Path) -> tuple[list[dict], str]:
    """What the browser finds on a page at each width, and what it writes to the console."""
    frame = '<iframe srcdoc="{}" width="{}" height="900" style="border:0"></iframe>'
    frames = "".join(frame.format(html.escape(page), width) for width in WIDTHS)
    script = (ROOT / "tests" / "look.js").read_text()
    head = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">'
    wrapper = folder / "look.html"
    wrapper.write_text(f'{head}<body>{frames}<pre id="found"></pre><script>{script}</script>', encoding="utf-8")
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr "
        "--window-size=1400,1000 --virtual-time-budget=10000 --dump-dom"
    )
    command = [BROWSER, *switches.split(), f"--user-data-dir={folder / 'profile'}", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    [answer] = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(answer)), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


# The widest pages, and the one with the least on it; the others in `make test-all`.
LOOKED_AT = ("hostile", "many", "alone")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH (Debian: apt-get install chromium)")
class TestBrowser:
    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in LOOKED_AT else pytest.mark.full) for name in RUNS]
    )
    def test_nothing_overflows_and_the_console_is_empty(self, name, pages, tmp_path):
        page, _ = pages(name)
        found, console = look(page, tmp_path)
        assert console == ""
        assert [one["width"] for one in found] == list(WIDTHS)
        for one in found:
            assert one["wrong"] == [], one["width"]
            assert one["texts"] > 100
            assert one["figures"] > 20

    def test_the_browser_does_look(self, tmp_path):
        """What the test above asks for is seen where it is missing."""
        bad = (
            '<!doctype html><body><p style="width:2000px">wide</p><svg viewBox="0 0 9 9" width="20">'
            '<text x="-40">cut</text></svg><img src="data:,"><script>console.error("said")</script>'
        )
        found, console = look(bad, tmp_path)
        assert "said" in console
        for one in found:
            assert {line.partition(":")[0] for line in one["wrong"]} >= {
                "clipped",
                "a figure without a text alternative",
            }
            assert any("wide" in line for line in one["wrong"])
