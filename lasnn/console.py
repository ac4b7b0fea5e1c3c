"""What a distillation tells while it runs: a bar and a live line on a terminal, plain lines when piped."""

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lasnn.callback import Callback

# Characters of a bar.
BAR = 20
AS_BUILT = "not trained: its weights are those that its own code gives it"


class RunProgress(Callback):
    """What a run tells of its progress; where it is shown is a subclass's."""

    def __init__(self) -> None:
        self._last: Mapping[str, Any] = {}

    def say(self, text: str) -> None:
        """Show a line."""
        raise NotImplementedError

    def begin_live(self) -> bool:
        """Begin to show the epoch in progress; False where that is not shown."""
        return False

    def live(self, text: str, share: float) -> None:
        """Show where the epoch in progress is, and how much of the phase is done."""

    def start(self, plan: Any, run: Path) -> None:
        self._plan = plan
        self.say(f"run folder: {run}")

    def note(self, text: str) -> None:
        self.say(text)

    def teacher(self, result: Mapping[str, Any]) -> None:
        self.say(f"teacher: test accuracy {result['accuracy']:.4f}")

    def epoch(self, phase: str, epoch: int, epochs: int, steps: int) -> None:
        if epoch == 0 or not self._last or self._last.get("phase") != phase:
            self._begun, self._begun_at, self._paced = time.perf_counter(), epoch, False
        self._now = (phase, epoch, epochs, steps)
        self._shown = self.begin_live()

    def step(self, step: int, rate: float, sums: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        phase, epoch, epochs, steps = self._now
        batch = self._plan.recipe.data.batch_size
        done = epoch + (step + 1) / steps
        if not self._paced:
            # A resumed run begins within an epoch; its pace says where.
            self._paced = True
            self._begun_at = max(self._begun_at, done - rate * (time.perf_counter() - self._begun) / (batch * steps))
        if not self._shown:
            return
        seen = min((step + 1) * batch, self._plan.data.train_size - self._plan.recipe.data.validation)
        terms = "  ".join(f"{name} {float(sums[name]) / seen:.4g}" for name in weights)
        left = self._left(done, epochs)
        accuracy = f"  accuracy {self._last['accuracy']:.4f}" if self._last.get("phase") == phase else ""
        text = (
            f"{phase} epoch {epoch + 1}/{epochs}  step {step + 1}/{steps}  {terms}{accuracy}  "
            f"{rate:.0f} images/s  {left}"
        )
        self.live(text, done / epochs)

    def end_epoch(self, metrics: Mapping[str, Any]) -> None:
        _, epoch, epochs, _ = self._now
        self._last = metrics
        self.epoch_done(metrics, epochs, self._left(epoch + 1, epochs))
        if epoch + 1 == epochs:
            self.close()

    def epoch_done(self, metrics: Mapping[str, Any], epochs: int, left: str) -> None:
        """Show a whole epoch."""
        terms = "  ".join(f"{name} {value:.4g}" for name, value in metrics["losses"].items())
        held_out = ""
        if "validation_nll" in metrics:
            held_out = f"held out {metrics['validation_accuracy']:.4f} (nll {metrics['validation_nll']:.4f})  "
        self.say(
            f"{metrics['phase']} epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  loss {metrics['loss']:.4f} "
            f"({terms})  accuracy {metrics['accuracy']:.4f}  {held_out}{metrics['images_per_second']:.0f} images/s  "
            f"{left}"
        )

    def finish(self, summary: Mapping[str, Any], run: Path) -> None:
        self.close()
        teacher = summary["teacher_accuracy"]
        beside = "" if teacher is None else f" (teacher {teacher:.4f})"
        self.say(
            f"student: test accuracy {summary['accuracy']:.4f}{beside} at T = {summary['timesteps']}, "
            f"{summary['firing_rate']:.3f} spikes per neuron and step, {summary['seconds']:.0f} s of training"
        )
        if summary["weights"].startswith("exponential"):
            self.say(f"student.safetensors has the {summary['weights']}: these are what was measured")
        if advice := summary.get("advice"):
            self.say(f"the student is {teacher - summary['accuracy']:.3f} below its teacher; what to try:")
            for line in advice:
                self.say(f"  {line}")
        for line in summary.get("terms", ()):
            self.say(line)

    def _left(self, done: float, epochs: int) -> str:
        """Time left in this phase, of which so many epochs are done, from the pace since it began or went on."""
        if done >= epochs:
            return "done"
        seconds = int((time.perf_counter() - self._begun) / (done - self._begun_at) * (epochs - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


class ConsoleProgress(RunProgress):
    """One line an epoch on a stream, and on a terminal a bar and a live line for the epoch in progress."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console
        self._live: Live | None = None

    def say(self, text: str) -> None:
        print_text(self.console, text)

    def start(self, plan: Any, run: Path) -> None:
        print_plan(self.console, plan)
        super().start(plan, run)

    def begin_live(self) -> bool:
        if self.console.is_terminal and self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self._live is not None

    def live(self, text: str, share: float) -> None:
        line = Table.grid(padding=(0, 1))
        line.add_row(ProgressBar(total=1.0, completed=share, width=BAR), Text(text, overflow="ellipsis", no_wrap=True))
        self._live.update(line)

    def finish(self, summary: Mapping[str, Any], run: Path) -> None:
        super().finish(summary, run)
        self.say(f"next: lasnn evaluate {shlex.quote(str(run))} --timesteps 1,2,4,8")

    def close(self) -> None:
        """End the live line; what was said before stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def print_table(console: Console, table: Table) -> None:
    """A table at its own width: a console that is narrower wraps its lines, and cuts no number."""
    width, console.width = console.width, 1000
    console.print(table)
    console.width = width


def print_plan(console: Console, plan: Any) -> None:
    """The plan of a run as a few lines and a table of the paired stages."""

    say = partial(print_text, console)
    facts = plan.summary()
    channels, height, width = facts["image"]
    say(
        f"data     {facts['data']}: {facts['images']['train']:,} training and {facts['images']['test']:,} test images, "
        f"{channels} x {height} x {width}, {facts['classes']} classes"
    )
    for line in facts["notes"]:
        say(line)
    if facts["teacher"]:
        how = f"{facts['teacher_steps']:,} steps unless cached"
        how = AS_BUILT if facts["teacher_frozen"] else facts["teacher_checkpoint"] or how
        say(f"teacher  {facts['teacher']}: {facts['teacher_parameters']:,} parameters, {how}")
        if facts["teacher_stages"]:
            say("stages   " + ", ".join(f"{name} = {path}" for name, path in facts["teacher_stages"].items()))
    else:
        say("teacher  none: the student trains alone")
    if facts["start"]:
        how = AS_BUILT if facts["start_frozen"] else facts["start_checkpoint"]
        how = how or f"{facts['start_steps']:,} steps unless cached"
        say(f"start    {facts['start']}: {facts['start_parameters']:,} parameters, {how}")
    say(
        f"student  {facts['student']}: {facts['student_parameters']:,} parameters, {facts['neuron']} neurons, "
        f"{facts['encoder']} encoding, T = {facts['timesteps']}, {facts['student_steps']:,} steps"
    )
    say(f"init     {facts['init']}")
    say("losses   " + " + ".join(f"{weight:g} x {name}" for name, weight in facts["losses"].items()))
    say(
        f"device   {facts['device']}, {facts['precision']}; about {facts['memory_bytes'] / 2**20:,.0f} MiB a step "
        "(weights, gradients, optimiser, saved activations)"
        + "".join(f"; {size / 2**20:,.0f} MiB to train the {name}" for name, size in facts["ann_memory_bytes"].items())
    )
    if facts["pairs"]:
        table = Table("student stage", "C x H x W", "teacher stage", "C x H x W", box=None, pad_edge=False)
        for pair in facts["pairs"]:
            shapes = [" x ".join(map(str, pair[side])) for side in ("student_shape", "teacher_shape")]
            table.add_row(pair["student"], shapes[0], pair["teacher"], shapes[1])
        print_table(console, table)


def print_evaluation(console: Console, known: Mapping[str, Any], results: list[dict[str, Any]]) -> None:
    """The result of an evaluation: a line for each T, then the firing rate of each layer."""
    first = results[0]
    where = (
        known["device"] if known["device"] == known["device_name"] else f"{known['device']} ({known['device_name']})"
    )
    source = f" ({known['data_source']})" if known["data_source"] else ""
    lines = [
        f"{known['run']}: {first['images']:,} test images of {known['data']}{source}, {where}, torch {known['torch']}"
    ]
    if first.get("teacher_accuracy") is not None:
        lines.append(f"teacher: accuracy {first['teacher_accuracy']:.4f}, {first['teacher_energy_uj']:.3f} µJ an image")
    for line in (*lines, *data_change_lines(known)):
        print_text(console, line)
    # Of a conversion for each T that of the last, whose layers are shown.
    converted = known.get("converted") or results[-1].get("converted")
    if converted:
        _say_converted(console, converted)
    table = Table(box=None, pad_edge=False)
    drawn = "accuracy_deviation" in first
    titles = ("T", "accuracy", *(["sd"] if drawn else []), "ECE", "spikes per\nneuron, step", "silent")
    for title in (*titles, "µJ/image", "images/s", "ms at\nbatch 1", "MiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            str(result["timesteps"]),
            f"{result['accuracy']:.4f}",
            *([f"{result['accuracy_deviation']:.4f}"] if drawn else []),
            f"{result['calibration_error']:.4f}",
            f"{result['firing_rate']:.4f}",
            f"{result['silent']:.1%}",
            f"{result['energy_uj']:.3f}",
            f"{result['images_per_second']:.0f}",
            f"{result['latency_ms']:.2f}",
            f"{result['peak_memory_mib']:.0f}",
        )
    print_table(console, table)
    if "exit" in first:
        early = Table(box=None, pad_edge=False)
        titles = ("at most T", "mean steps", "accuracy", "µJ/image")
        for title in titles:
            early.add_column(title, justify="right", no_wrap=True)
        for result in results:
            found = result["exit"]
            early.add_row(
                str(result["timesteps"]),
                f"{found['mean_steps']:.3f}",
                f"{found['accuracy']:.4f}",
                f"{found['energy_uj']:.3f}",
            )
        console.print(f"early exit at a confidence of {first['exit']['threshold']:g}:", highlight=False)
        print_table(console, early)
    # A conversion is asked for many T, more than there is room for beside each other.
    shown = [results[-1]] if converted else results
    layers = Table(box=None, pad_edge=False)
    layers.add_column("spikes per neuron, step", no_wrap=True)
    for result in shown:
        layers.add_column(f"T = {result['timesteps']}", justify="right", no_wrap=True)
    layers.add_column("silent", justify="right", no_wrap=True)
    if converted:
        layers.add_column("threshold", justify="right", no_wrap=True)
    for name in first["firing_rate_by_layer"]:
        layers.add_row(
            name,
            *(f"{result['firing_rate_by_layer'][name]:.4f}" for result in shown),
            f"{shown[-1]['silent_by_layer'][name]:.1%}",
            *([f"{converted['thresholds'][name]:.4g}"] if converted else []),
        )
    print_table(console, layers)
    _say_classes(console, known["classes"], results[-1])
    _say_operations(console, results[-1])
    _show_energy_with_memory(console, shown)
    for note in (
        "ECE: expected calibration error. silent: the share of neurons that spike on no test image. µJ: 45 nm "
        "operation counts (0.9 pJ an addition, 4.6 pJ a multiply-addition), a proxy; with memory access: each read and "
        "write of a weight, a voltage, a spike or a value too (docs/energy.md).",
        "MiB: of the GPU's memory, during a batch"
        if known["device"].startswith("cuda")
        else "MiB: of this whole process, during a batch",
        *([f"means of {len(first['accuracies'])} draws of the encoder; sd is their deviation"] if drawn else []),
    ):
        print_text(console, note)


def data_change_lines(result: Mapping[str, Any]) -> list[str]:
    """What has changed in the data set since the run began, for people; nothing where nothing has."""
    return [f"data changed since the run began: {change}" for change in result["data_changes"]]


def _say_classes(console: Console, classes: Sequence[str], result: Mapping[str, Any]) -> None:
    """The accuracy of each class, of the worst ten where there are many."""
    known = [pair for pair in zip(classes, result["accuracy_by_class"], strict=True) if pair[1] is not None]
    which = "by class"
    if len(known) > 20:
        known, which = sorted(known, key=lambda pair: pair[1])[:10], "of the ten worst classes"
    text = "  ".join(f"{name} {accuracy:.3f}" for name, accuracy in known)
    line = f"accuracy {which}, T = {result['timesteps']}: {text}"
    print_text(console, line)


def _say_operations(console: Console, result: Mapping[str, Any]) -> None:
    """What was counted for an image, on a line."""
    counted = result["operations"]
    line = (
        f"operations an image, T = {result['timesteps']}: {counted['additions']:,.0f} additions by spikes, "
        f"{counted['multiply_additions']:,.0f} multiply-additions in layers fed by real values; "
        f"{counted['dense']:,.0f} multiply-additions if computed densely"
    )
    print_text(console, line)
    for layer, note in result["counting_notes"].items():
        print_text(console, f"operations of {layer}: {note} (docs/energy.md)")


def _show_energy_with_memory(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    """The energy with memory accesses at each T and the teacher's, and the rates below which the student takes less."""
    last = results[-1]
    teacher = last.get("teacher_energy_with_memory")
    table = Table(box=None, pad_edge=False)
    table.add_column("µJ/image with memory access", no_wrap=True)
    further = ["teacher", f"break-even spikes/neuron/step (T = {last['timesteps']})"] if teacher else []
    for title in [*(f"T = {result['timesteps']}" for result in results), *further]:
        table.add_column(title, justify="right", no_wrap=True)
    for name in last["energy_with_memory"]:
        values = [f"{result['energy_with_memory'][name]['energy_uj']:.3f}" for result in results]
        if teacher:
            rate = last["break_even_firing_rate"][name]
            below = "-" if rate is None else "never" if rate == 0 else f"{rate:.4f}"
            values += [f"{teacher[name]['energy_uj']:.3f}", below]
        table.add_row(name, *values)
    print_table(console, table)


def _say_converted(console: Console, converted: Mapping[str, Any]) -> None:
    """What was converted how, on a line."""
    images, percentile = converted["calibration_images"], converted["percentile"]
    how = converted["method"] + ("" if percentile is None else f" ({percentile:g} %)")
    source = f"measured on {images:,} training images" if images else "learnt in its training"
    if converted["method"] == "threshold-iteration":
        source = "from batch norm alone"
    from lasnn.evaluation.conversion import OF_ONE_T

    if converted["method"] in OF_ONE_T:
        source += ", for each T its own"
    print_text(
        console,
        f"the teacher, converted by {how}: thresholds {source}; membranes start at {converted['membrane_start']:g} "
        "thresholds",
    )


def print_comparison(console: Console, known: Mapping[str, Any], notes: Sequence[str], folder: Path) -> None:
    """The rows of a comparison, then the gains and what else there is to say."""

    def digits(value: float | None, places: int = 4) -> str:
        return "" if value is None else f"{value:.{places}f}"

    table = Table(box=None, pad_edge=False)
    for title in ("student", "T", "mean", "sd", "teacher", "spikes/neuron/step", "µJ/image", "s"):
        table.add_column(title, justify="left" if title == "student" else "right", no_wrap=True)
    for row in known["arms"]:
        table.add_row(
            row["name"],
            str(row["timesteps"]),
            *(digits(row[key]) for key in ("mean", "deviation", "teacher_mean", "firing_rate")),
            digits(row["energy_uj"], 3),
            digits(row["seconds"], 0),
        )
    measure = known["measure"].replace("_", " ") if known["measure"] != "accuracy" else "test accuracy"
    console.print(f"\n{measure} over {len(known['seeds'])} seeds, last epoch", highlight=False)
    print_table(console, table)
    for gain in known["gains"]:
        if gain["mean"] is not None:
            interval = interval_said(gain)
            interval = f"({interval})" if gain["half_width"] is None else f"{interval} (95 %, paired)"
            line = f"{gain['name']} over {gain['over']}, T = {gain['timesteps']}: {gain['mean']:+.4f} {interval}"
            print_text(console, line)
    for line in notes:
        print_text(console, line)
    console.print(f"tables: {folder / 'compare.md'}, {folder / 'compare.json'}", highlight=False, soft_wrap=True)


def interval_said(gain: Mapping[str, Any]) -> str:
    """A gain's interval, or why it has none."""
    if gain["mean"] is None:
        return "no pair yet"
    if gain["half_width"] is not None:
        return f"± {gain['half_width']:.4f}"
    return "one seed: no interval" if gain["seeds"] == 1 else f"the same in all {gain['seeds']} seeds: no interval"


def print_export(console: Console, result: Mapping[str, Any]) -> None:
    """What was written, and how far each reader agrees."""
    lines = [
        f"{result['file']}: {result['format']}, T = {result['timesteps']}, {result['bytes']:,} bytes",
        f"takes    {result['takes']}",
        f"gives    {result['gives']}",
    ]
    if needs := result["needs"]:
        lines.append(f"needs    {', '.join(needs)} beside it, to be loaded")
    lines += data_change_lines(result)
    if why := result.get("why_drawn"):
        lines.append(f"verified on drawn images, for the test images cannot be used: {why}")
    for found in result["agreements"]:
        spikes = f"{found['flipped']:,} of {found['spikes']:,} spikes differ" if found["spikes"] else "spikes not shown"
        if found["margin"] is not None:
            spikes += f" (first in {found['first_layer']}, |h - threshold| <= {found['margin']:.1e} there)"
        equal = f"{found['same_class']}/{found['images']}"
        lines.append(
            f"verified in {found['reader']}: {found['images']} {result['verified_on']}, arg-max equal on {equal}, "
            f"largest logit difference {found['logit_difference']:.2g}, {spikes}"
        )
    for line in lines:
        print_text(console, line)


def print_runs(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """A line for each run, and below them what is wrong with those that are broken."""
    if not found:
        print_text(console, "no runs in runs/; `lasnn distill quickstart` makes one")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "progress", "accuracy", "teacher", "resumable"):
        table.add_column(title, justify="right" if title in ("accuracy", "teacher") else "left", no_wrap=True)
    for run in found:
        progress = f"{run['phase']} {run['epoch']}/{run['epochs'] or '?'}" if run["phase"] else ""
        figures = ["" if run[key] is None else f"{run[key]:.4f}" for key in ("accuracy", "teacher_accuracy")]
        resumable = "yes" if run["resumable"] else "no"
        table.add_row(Text(run["run"]), run["state"], progress, *figures, resumable)
    print_table(console, table)
    for run in found:
        if run["problem"]:
            print_text(console, run["problem"])


def print_parts(console: Console, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """The registered parts by kind: name, description, options with types and defaults."""
    for number, (kind, parts) in enumerate(found.items()):
        console.print(("\n" if number else "") + kind, style="bold", highlight=False)
        for name, part in parts.items():
            line = Text(f"  {name}", style="cyan").append(f"  {part['description']}", style="default")
            if kind == "models":
                line.append(
                    f" ({part['bytes'] / 1024:.0f} KiB; accuracy {part['accuracy']:.4f} at T = {part['timesteps']}, "
                    f"its teacher {part['teacher_accuracy']:.4f})",
                    style="default",
                )
            console.print(line, soft_wrap=True, highlight=False)
            for option, info in part.get("options", {}).items():
                default = "" if info.get("default") is None else f" = {json.dumps(info['default'])}"
                print_text(
                    console,
                    f"      {option}{default}  ({info['type']})",
                )


def print_bench(
    console: Console, head: str, titles: list[str], lines: list[list[str]], notes: list[str], groups: int = 2
) -> None:
    """A table of measurements; the first `groups` cells of the lines are the headings of its groups."""
    grid = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles[groups:]):
        grid.add_column(title, justify="right" if number else "left", no_wrap=True)
    group = None
    for line in lines:
        if groups and line[:groups] != group:
            group = line[:groups]
            grid.add_row(Text(" ".join(group), style="bold"))
        grid.add_row(*map(Text, line[groups:]))
    print_text(console, head)
    print_table(console, grid)
    for note in notes:
        print_text(console, note)


def print_text(console: Console, text: str) -> None:
    """Print a text as it is: what looks like markup stays, and no line is broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def to_stdout() -> Console:
    """Results and progress go here; a pipe gets whole lines."""
    return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty())


def to_stderr() -> Console:
    """Errors, and progress where standard output is kept for one JSON object."""
    return Console(file=sys.stderr, soft_wrap=not sys.stderr.isatty())
