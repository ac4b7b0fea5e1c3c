"""Facts into one page: the charts, and the template's helpers."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from lasnn import __version__
from lasnn.report import chart, picture
from lasnn.report.chart import Series, percent
from lasnn.report.facts import at_trained

# A larger matrix is drawn without names and counts.
NAMED_CLASSES = 12


def render(facts: dict[str, Any]) -> str:
    """The page, of what `lasnn.report.facts.gather` returns."""
    environment = Environment(
        loader=PackageLoader("lasnn.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": as_percent, "photo": picture.photo, "bar": bar, "digits": three_digits}
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.globals |= {"heat": heat_pair, "matrix": matrix_picture, "scale": picture.scale()}
    template = environment.get_template("page.html")
    return template.render(**facts, charts=charts(facts), version=__version__, **in_words(facts))


def in_words(facts: dict[str, Any]) -> dict[str, Any]:
    """What the page says that depends on what kind of run it is."""
    said, teacher = facts["summary"].get("accuracy"), facts["teacher"]
    at = at_trained(facts)
    notes = []
    if said is not None and abs(said - at["accuracy"]) > 1e-9:
        notes.append(
            f"summary.json says {as_percent(said, 2)}, measured at the end of the training; the figures here were "
            "measured again, on this machine."
        )
    if facts["random"]:
        notes.append("The encoder is random: these are the figures of one draw, the first of the run's seed.")
    notes += [f"Operations of {layer}: {note} (docs/energy.md)." for layer, note in at["counting_notes"].items()]
    temporal = facts["attention"]["temporal"]
    readings = {"rate": "of firing rates over all T steps", "map": "the mean of the maps of the T steps"}
    alone = (
        "the run has no teacher." if teacher is None else "no stages of the two networks are paired (distill.pairs)."
    )
    by_class = [
        {"label": label, "student": ours, "teacher": None if teacher is None else teacher["accuracy_by_class"][label]}
        for label, ours in enumerate(at["accuracy_by_class"])
        if ours is not None
    ]
    by_class.sort(key=lambda one: one["student"])
    ran, now = facts["environment"], facts["reporting"]
    keys = dict.fromkeys(key for key in (*ran, *now) if key not in ("command", "launcher", "earlier"))
    return {
        "notes": notes,
        "attention_alone": alone,
        "attention_reading": f", the student's {readings[temporal]}",
        "by_class": by_class[:NAMED_CLASSES],
        "wrong": int((facts["student"]["answers"] != facts["student"]["labels"]).sum()),
        "environment_rows": {key: (ran.get(key, "–"), now.get(key, "–")) for key in keys}.items(),
    }


def charts(facts: dict[str, Any]) -> dict[str, Markup | None]:
    """Every line chart and the confusion matrix, by name; None where there is nothing to draw."""
    confusion = at_trained(facts)["confusion"]
    named = len(facts["classes"]) <= NAMED_CLASSES
    return {
        "timesteps": over_timesteps(facts),
        "exits": early_exit(facts),
        "calibration": calibration(facts),
        "accuracy": accuracy_over_epochs(facts["training"]),
        **diagnostics_over_epochs(facts["training"]),
        **{f"loss_{phase}": loss_over_epochs(facts["training"], phase) for phase in ("teacher", "start", "student")},
        "confusion": chart.matrix(confusion, facts["classes"], title="confusion matrix of the student")
        if named
        else None,
    }


def over_timesteps(facts: dict[str, Any]) -> Markup:
    """Accuracy over T: the student, the converted teacher, the teacher."""
    series = [Series("student", curve(facts["results"]), "student")]
    if "results" in facts["conversion"]:
        series.append(Series("converted", curve(facts["conversion"]["results"]), "converted"))
    if facts["teacher"]:
        series.append(Series("teacher", [(1.0, facts["teacher"]["accuracy"])], "teacher", flat=True))
    return chart.lines(
        series,
        title="accuracy over time steps",
        x="time steps T",
        y="test accuracy",
        log=True,
        shares=True,
        marked=(facts["timesteps"], "trained"),
    )


def curve(results: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(T, accuracy) of each result, by T."""
    return sorted((result["timesteps"], result["accuracy"]) for result in results)


def early_exit(facts: dict[str, Any]) -> Markup | None:
    """Accuracy over the mean number of steps, for several thresholds of confidence, and without stopping."""
    exits = facts["student"]["exits"]
    if not exits:
        return None
    points = {(round(found["mean_steps"], 4), found["accuracy"]): f"{found['threshold']:g}" for found in exits}
    series = [Series("early exit", list(points), "student", notes=list(points.values()))]
    whole = [(result["timesteps"], result["accuracy"]) for result in facts["results"]]
    series.append(Series("fixed T", [point for point in whole if point[0] <= facts["timesteps"]], "plain"))
    return chart.lines(
        series,
        title="early exit, by the threshold of confidence",
        x="mean time steps used",
        y="test accuracy, by threshold of confidence",
        shares=True,
    )


def calibration(facts: dict[str, Any]) -> Markup:
    """Accuracy over confidence, in bins that hold at least five answers."""
    series = []
    for name in ("teacher", "student"):
        bins = [one for one in facts[name]["bins"] if one["images"] >= 5] if facts[name] else []
        if bins:
            series.append(Series(name, [(one["confidence"], one["accuracy"]) for one in bins], name))
    series = series or [
        Series("student", [(one["confidence"], one["accuracy"]) for one in facts["student"]["bins"]], "student")
    ]
    return chart.lines(
        series,
        title="calibration",
        x="confidence of the answers",
        y="share that is right",
        x_ticks=[0, 0.25, 0.5, 0.75, 1],
        low=0,
        high=1,
        x_text=percent,
        shares=True,
        diagonal=True,
    )


def accuracy_over_epochs(training: dict[str, Any]) -> Markup | None:
    """Test accuracy after each epoch of each phase."""
    series = []
    for phase, style in (("teacher", "teacher"), ("start", "plain"), ("student", "student")):
        points = [(epoch["epoch"], epoch["accuracy"]) for epoch in training[phase] if "accuracy" in epoch]
        if points:
            series.append(Series(phase, points, style))
    if not series:
        return None
    return chart.lines(series, title="accuracy over epochs", x="epoch", y="test accuracy", shares=True)


def loss_over_epochs(training: dict[str, Any], phase: str) -> Markup | None:
    """The terms of a phase's objective, each times its weight, and their sum."""
    epochs = [epoch for epoch in training[phase] if "loss" in epoch]
    if not epochs:
        return None
    names = list(epochs[0]["terms"])
    series = []
    if len(names) != 1:
        series.append(Series("sum", [(epoch["epoch"], epoch["loss"]) for epoch in epochs], "plain", marks=False))
    for number, name in enumerate(names):
        points = [(epoch["epoch"], epoch["terms"][name]) for epoch in epochs if name in epoch["terms"]]
        weight = training["weights"].get(name, 1.0) if phase == "student" else 1.0
        label = name if weight == 1 else f"{weight:g} × {name}"
        alone = "plain" if phase == "start" else phase
        series.append(Series(label, points, alone if len(names) == 1 else f"term{number % 6}", marks=False))
    low = min(0.0, *(value for one in series for _, value in one.points))
    return chart.lines(
        series, title=f"{phase}'s loss over epochs", x="epoch", y="training loss, mean of the epoch", low=low
    )


# Of what `lasnn.training.diagnostics` measures: chart, title, y axis.
DIAGNOSTICS = {
    "attention_distance": ("distance of the attention maps", "1 - cos, student and teacher"),
    "gradient": ("gradient of each term beside cross-entropy's", "norm, cross-entropy = 1"),
    "firing_rate": ("firing rate by stage", "spikes per neuron and step"),
    "silent": ("silent neurons by stage", "share that never spikes"),
}


def diagnostics_over_epochs(training: dict[str, Any]) -> dict[str, Markup | None]:
    """A chart of each of the diagnostics, by name; None where there is none."""
    found = {}
    for what, (title, y) in DIAGNOSTICS.items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for epoch in training["student"]:
            for name, value in epoch.get("diagnostics", {}).get(what, {}).items():
                if value is not None:
                    curves.setdefault(name, []).append((epoch["epoch"], value))
        series = [
            Series(name, points, f"term{number % 6}", marks=False)
            for number, (name, points) in enumerate(curves.items())
        ]
        shares = what == "silent"
        found[what] = chart.lines(series, title=title, x="epoch", y=y, low=0.0, shares=shares) if series else None
    return found


def as_percent(value: float | None, places: int = 1) -> str:
    """0.8815 as 88.2 %; None as a dash."""
    return "–" if value is None else f"{100 * value:.{places}f} %"


def three_digits(value: float | None) -> str:
    """A positive figure in three digits; None as a dash."""
    return "–" if value is None else f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def bar(value: float, largest: float) -> str:
    """The width of a bar in a table."""
    return f"{100 * value / largest if largest else 0:.1f}%"


def heat_pair(both: dict[str, Any]) -> dict[str, str | None]:
    """The maps of student and teacher as pictures on one scale, from 0 to the larger maximum."""
    maps: dict[str, Tensor] = {key: both[key] for key in ("student", "teacher") if both[key] is not None}
    top = max(float(values.max()) for values in maps.values())
    return {"teacher": None, **{key: picture.heat(values, top) for key, values in maps.items()}}


def matrix_picture(confusion: list[list[float]]) -> str:
    """A confusion matrix of many classes: the root of each row's share."""
    matrix = Tensor(confusion)
    return picture.heat((matrix / matrix.sum(1, keepdim=True).clamp(min=1)).sqrt(), 1.0, limit=len(matrix))
