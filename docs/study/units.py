"""What the study runs: each unit's name and what it changes in study.toml, in the order of running.

Teachers and twins come first; then the screening, on 50,000 training images with 10,000 held out, chooses the learning
rate, the weight of the logits and one term of the features, by negative log-likelihood on the images held out; then the
confirmation, on all 60,000 images and with fresh seeds, measures what was chosen. Its primary contrast is C - B at
T = 1 from the converted start.
"""

from pathlib import Path

TEACHERS = Path(__file__).absolute().parent / "teachers"
# The networks that are trained first: a twin of the student, and the wider and deeper one that teaches.
TRAINED = {
    "vgg5": ["teacher.architecture=vgg5"],
    "vgg9": ["teacher.architecture=vgg9", "teacher.epochs=10", "precision=bf16"],
}
# What is chosen on images held out must not have been seen by the networks that it starts from.
HELD_OUT = "data.validation=10000"
HALF = "precision=bf16"
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


def taught(block: int | str, start: str = "converted") -> list[str]:
    """The settings of a student that a VGG-9 teaches; it starts from its VGG-5 twin, or from random weights."""
    settings = ["teacher.architecture=vgg9", f"teacher.checkpoint={TEACHERS / f'vgg9-{block}.safetensors'}", HALF]
    if start == "random":
        return [*settings, "student.init=random"]
    twin = TEACHERS / f"vgg5-{block}.safetensors"
    return [*settings, "start.architecture=vgg5", "start.width=16", f"start.checkpoint={twin}", f"student.init={start}"]


UNITS: dict[str, list[str]] = {}
for network, settings in TRAINED.items():
    for seed in range(3):
        UNITS[f"teacher/{network}/{seed}"] = [*settings, f"seed={seed}", "student.init=random"]
    # For the screening: shorter, and without the images that it holds out.
    UNITS[f"teacher/{network}/screening"] = [
        *settings, "teacher.epochs=8", HALF, HELD_OUT, f"seed={SCREENING_SEEDS[0]}", "student.init=random",
    ]  # fmt: skip
# Students of copied weights and cross-entropy alone at a rate that was not screened: those that ship.
for seed in range(3):
    for steps in (1, 4, 2):
        UNITS[f"student/copied/T{steps}/{seed}"] = [
            "teacher.architecture=vgg5",
            f"teacher.checkpoint={TEACHERS / f'vgg5-{seed}.safetensors'}",
            "student.init=teacher",
            f"student.timesteps={steps}",
            "distill.lr=0.05",
            f"seed={seed}",
        ]
SCREENED = [HELD_OUT, "distill.epochs=2"]
for seed in SCREENING_SEEDS:
    for start in ("converted", "copied"):
        for rate in RATES:
            UNITS[f"screen/rate/{start}/{rate}/{seed}"] = [
                *taught("screening", start), *SCREENED, losses(LABELS), f"distill.lr={rate}", f"seed={seed}",
            ]  # fmt: skip
