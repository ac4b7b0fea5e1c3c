"""What the study runs: each unit's name and what it changes in study.toml, in the order of running.

Teachers and twins come first. The screening, on 50,000 training images with 10,000 held out, chooses the learning rate,
then the weight of the logits, then one term of the features and its share: each time what has the lowest negative
log-likelihood on the images held out, in the mean over its seeds. The confirmation, on all 60,000 images and with other
seeds, measures what was chosen:

    A  cross-entropy                  D  B + attention maps, power 1, weight 100
    B  A + logits                     E  C with the teacher's features of another image
    C  B + the term that was chosen

Its primary contrast is C - B at T = 1, converted start; all others are secondary. It trains in single precision, which
every processor has: bfloat16, in which the screening ran, is nine times as slow where its instructions are missing.
ResNet-20 is trained in bfloat16, as twin and as student: in single precision a twin takes half an hour. So are the
students that are trained for as long as their twins.
"""

from pathlib import Path
from statistics import mean

TEACHERS = Path(__file__).resolve().parent / "teachers"
HALF = "precision=bf16"
# The networks that are trained first: a twin of the student, and the wider and deeper one that teaches.
TRAINED = {
    "vgg5": ["teacher.architecture=vgg5"],
    "vgg9": ["teacher.architecture=vgg9", "teacher.epochs=10", HALF],
}
# Further ones, of the residual student and of the conversion that needs an ANN of its own.
FURTHER = {
    "resnet20": ["teacher.architecture=resnet20", "teacher.epochs=10", HALF],
    "vgg5-qcfs": ["teacher.architecture=vgg5", "teacher.activation=qcfs"],
}
# What the twin is converted by, and where each is given up: the first two are another conversion for each T.
CONVERSIONS = {
    "threshold-iteration": 12,
    "light-calibration": 12,
    "qcfs": 32,
    "local-balancing": 64,
    "percentile": 64,
    "maxnorm": 64,
}
# What is chosen on images held out must not have been seen by the networks that it starts from.
HELD_OUT = "data.validation=10000"
SCREENING_SEEDS = (100, 101)
RATES = (0.02, 0.05, 0.1)
# A term's gradient over that of cross-entropy, where the training starts.
SHARES = (0.1, 0.3, 1.0)
# What is screened on top of cross-entropy and logits; `weight` follows from the share.
TERMS = {
    "cosine": {"name": "attention", "measure": "cosine", "power": 1.0},
    "current": {"name": "attention", "measure": "cosine", "tap": "current"},
    "softmax": {
        "name": "attention",
        "normalize": "softmax",
        "measure": "kl",
        "power": 1.0,
        "temperature": 2.0,
        "pair_weights": [0, 0, 1],
    },
    "regressor": {"name": "feature-regressor"},
    "similarity": {"name": "similarity"},
}
LABELS = {"name": "cross-entropy", "readout": "step"}
LOGITS = {
    "weight0.2": {"name": "logit-kd", "readout": "step", "temperature": 3.0, "weight": 0.2},
    "weight1": {"name": "logit-kd", "readout": "step", "temperature": 3.0, "weight": 1.0},
    "standardized": {"name": "logit-kd", "readout": "step", "temperature": 2.0, "weight": 1.0, "standardize": True},
}
SCREENED = [HELD_OUT, HALF, "distill.epochs=2"]
CONFIRMED = "distill.epochs=4"
# The attention maps that recipes/quickstart.toml had when the study began.
QUICKSTART = {"name": "attention", "power": 1.0, "weight": 100.0}


def toml(value) -> str:
    """An inline TOML value of tables, lists, texts and numbers."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def losses(*tables: dict) -> str:
    return f"losses={toml(list(tables))}"


def taught(block: int | str, start: str = "converted", student: str = "vgg5") -> list[str]:
    """The settings of a student that a VGG-9 teaches; it starts from its ANN twin, or from random weights."""
    settings = ["teacher.architecture=vgg9", f"teacher.checkpoint={TEACHERS / f'vgg9-{block}.safetensors'}"]
    if start == "random":
        return [*settings, "student.init=random"]
    twin = TEACHERS / f"{student}-{block}.safetensors"
    return [
        *settings, f"start.architecture={student}", "start.width=16", f"start.checkpoint={twin}",
        f"student.init={start}",
    ]  # fmt: skip


def units(results: dict[str, dict]) -> dict[str, list[str]]:
    """The units and their settings, as far as the results that they follow from are there."""
    found = first_units()
    rate = best(results, "screen/rate/converted")
    if rate is None:
        return found
    learnt = [f"distill.lr={rate}"]
    for seed in SCREENING_SEEDS:
        for name, logits in LOGITS.items():
            found[f"screen/logits/{name}/{seed}"] = [
                *taught("screening"), *SCREENED, *learnt, losses(LABELS, logits), f"seed={seed}",
            ]  # fmt: skip
    logits = LOGITS.get(best(results, "screen/logits"))
    if logits is None:
        return found
    for seed in SCREENING_SEEDS:
        for name, term in TERMS.items():
            for share in SHARES:
                term = {**term, "weight": f"share {share}"}
                found[f"screen/term/{name}/{share}/{seed}"] = [
                    *taught("screening"), *SCREENED, *learnt, losses(LABELS, logits, term), f"seed={seed}",
                ]  # fmt: skip
    chosen = best(results, "screen/term")
    if chosen is None:
        return found
    weights = [results[f"screen/term/{chosen}/{seed}"]["weight"] for seed in SCREENING_SEEDS]
    term = {**TERMS[chosen.partition("/")[0]], "weight": float(f"{mean(weights):.3g}")}
    arms = {
        "B": [LABELS, logits],
        "C": [LABELS, logits, term],
        "A": [LABELS],
        "E": [LABELS, logits, {**term, "name": f"{term['name']}-of-another-image"}],
        "D": [LABELS, logits, QUICKSTART],
    }

    def confirm(name: str, start: str, arm: str, block: int, seed: int, *settings: str) -> None:
        found[f"confirm/{name}/{arm}/{block}/{seed}"] = [
            *taught(block, start), CONFIRMED, losses(*arms[arm]), f"seed={seed}", *settings,
            'plugins=["another_image.py"]',
        ]  # fmt: skip

    for pair in (("B", "C"), ("A", "E"), ("D",)):
        for seed in range(4):
            for block in range(3):
                for arm in pair:
                    confirm("converted/T1", "converted", arm, block, seed, *learnt)
    for seed in range(2):
        for block in range(3):
            for arm in ("B", "C"):
                confirm("converted/T4", "converted", arm, block, seed, *learnt, "student.timesteps=4")
    for seed in range(2):
        for block in range(3):
            for arm in ("B", "C"):
                confirm("random/T1", "random", arm, block, seed)
    # Named when five of those six pairs were there and C was ahead in each: whether it is what the features say of the
    # image, and whether attention maps do as much.
    for seed in range(2):
        for block in range(3):
            for arm in ("D", "E"):
                confirm("random/T1", "random", arm, block, seed)
    for network, settings in FURTHER.items():
        for block in range(3):
            found[f"teacher/{network}/{block}"] = [*settings, f"seed={block}", "student.init=random"]
    # The residual student, at the rate and weights that were chosen for the VGG-5.
    for seed in range(2):
        for block in range(3):
            for arm in ("B", "C"):
                found[f"confirm/resnet20/T1/{arm}/{block}/{seed}"] = [
                    *taught(block, "converted", "resnet20"), CONFIRMED, losses(*arms[arm]), f"seed={seed}", *learnt,
                    "student.architecture=resnet20", HALF,
                ]  # fmt: skip
    # How near the student comes to its twin when it is trained for as many epochs as the twin was.
    for steps in (4, 1):
        for block in range(3):
            found[f"longer/T{steps}/{block}"] = [
                *taught(block), HALF, "distill.epochs=20", losses(*arms["B"]), *learnt, f"student.timesteps={steps}",
            ]  # fmt: skip
    # Named when the students of four steps above had stayed 0.0064 below their twins: the same with the twin itself as
    # teacher, as recipes/vgg5_fashionmnist_accurate.toml has it, instead of a deeper network.
    for block in range(3):
        found[f"longer-own-teacher/T4/{block}"] = [
            "teacher.architecture=vgg5", f"teacher.checkpoint={TEACHERS / f'vgg5-{block}.safetensors'}",
            "student.init=converted", HALF, "distill.epochs=20", losses(*arms["B"]), *learnt, "student.timesteps=4",
        ]  # fmt: skip
    for method in CONVERSIONS:
        for block in range(3):
            twin = TEACHERS / f"vgg5{'-qcfs' if method == 'qcfs' else ''}-{block}.safetensors"
            activation = ["teacher.activation=qcfs"] if method == "qcfs" else []
            found[f"conversion/{method}/{block}"] = [
                "teacher.architecture=vgg5", *activation, f"teacher.checkpoint={twin}", "student.init=random",
            ]  # fmt: skip
    return found


def best(results: dict[str, dict], screened: str) -> str | None:
    """What of a screening has the lowest mean over its seeds; None before all of it is there."""
    found: dict[str, list[float]] = {}
    for unit, result in results.items():
        if unit.startswith(f"{screened}/"):
            name = unit.removeprefix(f"{screened}/").rpartition("/")[0]
            found.setdefault(name, []).append(result["validation_nll"])
    expected = {"screen/logits": len(LOGITS), "screen/term": len(TERMS) * len(SHARES)}.get(screened, len(RATES))
    if sum(map(len, found.values())) < expected * len(SCREENING_SEEDS):
        return None
    return min(found, key=lambda name: mean(found[name]))


def first_units() -> dict[str, list[str]]:
    """Those that follow from nothing: teachers, the students that ship, the screening of the rate."""
    found: dict[str, list[str]] = {}
    for network, settings in TRAINED.items():
        for seed in range(3):
            found[f"teacher/{network}/{seed}"] = [*settings, f"seed={seed}", "student.init=random"]
        # For the screening: shorter, and without the images that it holds out.
        found[f"teacher/{network}/screening"] = [
            *settings, "teacher.epochs=8", HALF, HELD_OUT, f"seed={SCREENING_SEEDS[0]}", "student.init=random",
        ]  # fmt: skip
    # Students of copied weights and cross-entropy alone at a rate that was not screened: those that ship.
    for seed in range(3):
        for steps in (1, 4, 2):
            found[f"student/copied/T{steps}/{seed}"] = [
                "teacher.architecture=vgg5",
                f"teacher.checkpoint={TEACHERS / f'vgg5-{seed}.safetensors'}",
                "student.init=teacher",
                f"student.timesteps={steps}",
                "distill.lr=0.05",
                f"seed={seed}",
            ]
    for seed in SCREENING_SEEDS:
        for start in ("converted", "copied"):
            for rate in RATES:
                found[f"screen/rate/{start}/{rate}/{seed}"] = [
                    *taught("screening", start), *SCREENED, losses(LABELS), f"distill.lr={rate}", f"seed={seed}",
                ]  # fmt: skip
    return found
