"""The command line: parse, call, print. PyTorch is imported by the commands, not by `--help`."""

import json
import logging
import os
import shlex
import signal
import sys
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lasnn import __version__, streams
from lasnn.errors import MachineError, UserError, out_of_memory

app = typer.Typer(
    name="lasnn",
    # Boxes and colours are for people; a pipe gets plain lines. Standard output may be closed.
    rich_markup_mode="rich" if sys.stdout is not None and sys.stdout.isatty() else None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a trained ANN into a small and fast spiking network: by labels, logits, features of its layers.",
)

# About 0.1 ms: longer than what lies between two ops.
SPIN_COUNT = "3000"

bench = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(bench, name="bench")


def complete_recipe(typed: str) -> list[str]:
    """The shipped recipes that begin with what was typed, for a shell."""
    from lasnn.recipe.load import shipped

    return [name for name in shipped() if name.startswith(typed)]


A_RUN = "A run folder, a student's .safetensors file, or model:NAME.  [default: the newest under runs/]"
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as student.timesteps=2. Repeatable."),
]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A TOML file, or a shipped recipe's name.",
        autocompletion=complete_recipe,
    ),
]
DataFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The folder of the run's images.  [default: where it has them]")
]
RunDevice = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or auto.  [default: the recipe's]")
]
# Of several benchmarks.
BenchTimesteps = Annotated[str | None, typer.Option(metavar="T[,T...]", help="Time steps.  [default: the recipe's]")]
Rounds = Annotated[int, typer.Option(metavar="N", min=6, help="Rounds, in each of which all take turns.")]
ResultsFolder = Annotated[Path, typer.Option(metavar="DIR", help="Where the CSV and JSON files go.")]
IntoPage = Annotated[
    Path | None, typer.Option(metavar="FILE.md", help="Put the table into this page, as docs/benchmarks.md.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]


def show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if (command := context.invoked_subcommand) != "distill" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"lasnn {command} runs in one process: start it without torchrun")


@app.command()
def distill(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder.  [default: runs/<recipe>-<number>]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, or the newest unfinished one."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print the plan; no data.")] = False,
    detect_anomaly: Annotated[
        bool, typer.Option("--detect-anomaly", help="Find the operation at which a training breaks; slow.")
    ] = False,
    callbacks: Annotated[
        list[str] | None,
        typer.Option("--callback", metavar="NAME", help="Also tell this one of the run, as tensorboard. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train or load the teacher, distil it into the student, leave a run folder."""
    with json_alone(as_json) as answer:
        from lasnn import processes
        from lasnn.console import ConsoleProgress, print_plan, to_stderr, to_stdout

        processes.join()
        console = to_stderr() if as_json else to_stdout()
        console.quiet = not processes.is_main()
        if dry_run:
            from lasnn.callback import CallbackList
            from lasnn.open_run import check_run
            from lasnn.plan import read_plan
            from lasnn.training.parallel import check_processes

            plan = read_plan(recipe, overrides or [])
            check_processes(plan.recipe)
            CallbackList(callbacks or [])
            if not processes.is_main():
                return
            check_run(plan.recipe, out, resume)
            if as_json:
                answer.update(plan.summary())
            else:
                print_plan(console, plan)
            return
        from lasnn.run import resume_command
        from lasnn.training.distill import distill as run_recipe
        from lasnn.training.stop import Stopped

        options = {"overrides": overrides or [], "resume": resume, "detect_anomaly": detect_anomaly}
        try:
            run = run_recipe(recipe, out, progress=ConsoleProgress(console), callbacks=callbacks or [], **options)
        except Stopped as stopped:
            if processes.is_main():
                say_error(f"{stopped}\ngo on with: {resume_command(stopped.run)}")
            raise typer.Exit(128 + stopped.signum) from None
        if not processes.is_main():
            return
        answer.update({"run": str(run.path), **run.read_json("summary.json")})


@app.command()
def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help=A_RUN),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="T[,T...]", help="Time steps.  [default: those of the training; with --converted 1,2,4,...,256]"
        ),
    ] = None,
    converted: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Instead of the student its teacher, converted: maxnorm, percentile, qcfs, "
            "threshold-iteration, local-balancing or light-calibration.",
        ),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(metavar="P", help="With --converted percentile: which.  [default: 99.9]")
    ] = None,
    membrane_start: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With --converted: the voltage at first, in thresholds.  [default: the method's, 0 or 0.5]",
        ),
    ] = None,
    early_exit: Annotated[
        float | None,
        typer.Option("--exit", metavar="P", help="Also stop each image once a class reaches this probability."),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(metavar="N", help="Seeds of an encoder that draws, as poisson.  [default: 3]")
    ] = None,
    data: DataFolder = None,
    device: RunDevice = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy, firing rate, energy and speed of a trained student at any T, or of its teacher, converted."""
    steps = None if timesteps is None else parse_timesteps(timesteps)
    options = {"membrane_start": membrane_start, "percentile": percentile}
    with json_alone(as_json) as answer:
        from lasnn.console import print_text, to_stderr
        from lasnn.evaluation.conversion import OF_ONE_T
        from lasnn.evaluation.evaluate import conditions, load_run
        from lasnn.evaluation.evaluate import evaluate as measure_run

        loaded = load_run(run, device=device or "recipe", data_root=data)
        options |= {"converted": converted, "early_exit": early_exit, "draws": draws}
        results = measure_run(loaded, steps, **options, tell=partial(print_text, to_stderr()))
        known = conditions(loaded)
        if converted and converted not in OF_ONE_T:
            # The same at every T.
            known["converted"] = results[0]["converted"]
            results = [{key: value for key, value in result.items() if key != "converted"} for result in results]
        answer.update({**known, **results[0]} if len(results) == 1 else {**known, "results": results})
    if not as_json:
        from lasnn.console import print_evaluation, to_stdout

        print_evaluation(to_stdout(), known, results)


@app.command()
def export(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run folder, a student's .safetensors, or model:NAME.  [default: the newest under runs/]",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="onnx, nir, pt2, safetensors; `lasnn list exporters`.")
    ] = ...,
    timesteps: Annotated[
        int | None, typer.Option(metavar="T", help="Time steps.  [default: those of the training]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file.  [default: student-t<T>.<format> in the run folder]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    data: DataFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write a student to a file that other programs read, and verify it there."""
    with json_alone(as_json) as answer:
        from lasnn.export import Disagreement
        from lasnn.export import export as export_run

        try:
            answer.update(export_run(run, form, timesteps=timesteps, out=out, force=force, data_root=data))
        except Disagreement as disagreement:
            answer.update(disagreement.result)
            raise
    if not as_json:
        from lasnn.console import print_export, to_stdout

        print_export(to_stdout(), answer)


@app.command()
def compare(
    recipe: RecipeName,
    seeds: Annotated[int, typer.Option(metavar="N", help="How many seeds, from the recipe's own on.")] = 5,
    overrides: Overrides = None,
    timesteps: Annotated[
        str | None, typer.Option(metavar="T[,T...]", help="Rows at each T.  [default: the recipe's]")
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", metavar="NAME:KEY=VALUE[;...]", help="A further row: the recipe with settings. Repeatable."
        ),
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Further rows, each without one of the things the teacher gives.")
    ] = False,
    against_conversion: Annotated[
        bool,
        typer.Option(
            "--against-conversion", help="Convert the teachers too: the T that reaches the student's accuracy."
        ),
    ] = False,
    longest: Annotated[
        int | None,
        typer.Option(metavar="T", help="With --against-conversion: where a conversion is given up.  [default: 1024]"),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="MEASURE",
            help="accuracy (test images), or validation_accuracy, validation_nll (those data.validation holds out).",
        ),
    ] = "accuracy",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Runs and tables.  [default: runs/compare/<recipe>]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train the student with and without its teacher over seeds; what is done is not done again."""
    steps = [] if timesteps is None else parse_timesteps(timesteps)
    named = parse_variants(variants or [])
    if longest is not None and not against_conversion:
        raise UserError("--longest goes with --against-conversion")
    with json_alone(as_json) as answer:
        from lasnn.compare import Stopped
        from lasnn.compare import compare as compare_rows
        from lasnn.console import print_comparison, print_text, to_stderr, to_stdout

        console = to_stderr() if as_json else to_stdout()
        try:
            found = compare_rows(
                recipe,
                seeds,
                overrides=overrides or [],
                timesteps=steps,
                variants=named,
                ablation=ablation,
                against_conversion=against_conversion,
                **({} if longest is None else {"longest": longest}),
                by=by,
                out=out,
                tell=partial(print_text, console),
            )
        except Stopped as stopped:
            say_error(f"{stopped}\nthe same command goes on")
            raise typer.Exit(128 + stopped.signum) from None
        print_comparison(console, found.as_json(), found.conversion_said(), found.folder)
        answer.update(found.as_json())


@app.command()
def report(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help=A_RUN),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page.  [default: report.html in the run folder]")
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(metavar="T[,T...]", help="Of the student.  [default: 1 to twice the training's]")
    ] = None,
    converted: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="How its teacher is converted beside it: as for evaluate, or none.  "
            "[default: qcfs if it has learnt thresholds, else percentile]",
        ),
    ] = None,
    longest: Annotated[int, typer.Option(metavar="T", help="Where the conversion ends.")] = 64,
    data: DataFolder = None,
    device: RunDevice = None,
    as_json: AsJson = False,
) -> None:
    """One HTML page that shows a run: attention maps, accuracy over T, spikes, energy, mistakes, training, recipe."""
    steps = None if timesteps is None else parse_timesteps(timesteps)
    with json_alone(as_json) as answer:
        from lasnn.console import data_change_lines, print_text, to_stderr, to_stdout
        from lasnn.loaded_run import load_run
        from lasnn.report import report as write_report

        console = to_stderr() if as_json else to_stdout()

        tell = partial(print_text, console)
        options = {"timesteps": steps, "converted": converted, "longest": longest}
        loaded = load_run(run, device=device or "recipe", data_root=data)
        answer.update(write_report(loaded, out, **options, tell=tell))
        for line in data_change_lines(answer):
            tell(line)
        tell(f"report: {answer['file']} ({answer['bytes'] / 1024:,.0f} KiB)")


@app.command("list")
def list_parts(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="architectures, teachers, encoders, neurons, losses, datasets, augmentations, exporters, "
            "callbacks, recipes, models or runs.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a recipe or a command can name, each with a line of description and its options."""
    from lasnn.errors import unknown
    from lasnn.registry import REGISTRIES, REQUIRED

    kinds = [*REGISTRIES, "recipes", "models"]
    if what == "runs":
        list_runs(as_json)
        return
    if what is not None and what not in kinds:
        raise UserError(unknown("kind", what, [*kinds, "runs"]))
    from lasnn.recipe.load import shipped, summary
    from lasnn.run import model_facts, shipped_models

    found: dict[str, dict] = {}
    for kind in kinds if what is None else [what]:
        if kind == "recipes":
            found[kind] = {name: {"description": summary(path)} for name, path in shipped().items()}
            continue
        if kind == "models":
            found[kind] = {name: model_facts(folder) for name, folder in shipped_models().items()}
            continue
        registry, found[kind] = REGISTRIES[kind], {}
        for name in registry:
            entry = registry[name]
            options = {
                option: {"type": info.type_name, "required": True}
                if info.default is REQUIRED
                else {"type": info.type_name, "default": info.default}
                for option, info in entry.options.items()
                # What a network is given; a data set may have an option of this name.
                if kind not in ("architectures", "teachers") or option not in ("in_channels", "num_classes")
            }
            found[kind][name] = {"description": entry.description, "options": options}
    if as_json:
        print(json.dumps(found))
        return
    from lasnn.console import print_parts, to_stdout

    print_parts(to_stdout(), found)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Your pictures, with a folder a class in it.")],
    size: Annotated[
        int | None, typer.Option(metavar="N", help="Pixels a side.  [default: of the pictures, at most 64]")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of teacher and student.  [default: by size and number]")
    ] = None,
    timesteps: Annotated[int | None, typer.Option(metavar="T", help="Of the student.  [default: 4]")] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Of each training.  [default: by the number of pictures]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The recipe.  [default: <folder>.toml in this folder]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing, take the defaults.")] = False,
) -> None:
    """Write a first recipe, with comments, for a folder of your pictures; asks four questions on a terminal."""
    from lasnn import starter
    from lasnn.console import print_plan, print_text, to_stdout

    given = starter.Choices(size, architecture, timesteps, epochs)
    pictures = starter.look(folder)
    console = to_stdout()

    choices = starter.propose(pictures, given)
    asked = not yes and sys.stdin is not None and sys.stdin.isatty() and console.is_terminal
    print_text(
        console,
        f"{pictures.root}: {len(pictures.classes)} classes, {pictures.train:,} training and {pictures.test:,} test "
        f"pictures, {'grey' if pictures.grey else 'coloured'}, {pictures.side} pixels a side in the median",
    )
    if asked:
        choices = starter.ask(choices, given, lambda question, value: typer.prompt(question, value, type=type(value)))
    elif not yes and choices != given:
        taken = [f"--{name} {value}" for name, value in vars(choices).items() if getattr(given, name) is None]
        print_text(console, f"no terminal to ask on; taken: {' '.join(taken)}")
    path, plan = starter.write(pictures, choices, out)
    print_plan(console, plan)
    print_text(console, f"recipe: {path}\nnext: lasnn distill {shlex.quote(str(path))}")


@app.command()
def schema(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Also with the parts that this recipe's plugins register."),
    ] = None,
) -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks them."""
    from lasnn.recipe.json_schema import json_schema
    from lasnn.recipe.schema import Recipe

    if recipe is not None:
        # A plugin may print what it likes.
        with redirect_stdout(sys.stderr):
            Recipe.load(recipe)
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def list_runs(as_json: bool) -> None:
    """The runs under runs/, the newest last: how far they are, and whether they can be resumed."""
    from lasnn.run import all_runs, status

    found = [status(folder) for folder in all_runs(compared=True)]
    if as_json:
        print(json.dumps({"runs": found}))
        return
    from lasnn.console import print_runs, to_stdout

    print_runs(to_stdout(), found)


@bench.command("kernels")
def bench_kernels(
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="T[,T...]", help="All shapes at the first, one at the others.  [default: 4; on CUDA 4,8,16,32]"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAMES", help="fp32, bf16, fp16.  [default: fp32; on CUDA fp32,bf16]")
    ] = None,
    op: Annotated[
        str | None, typer.Option(metavar="NAMES", help="lif, norm_lif, norm_lif+residual, ...  [default: all]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes and few rounds: whether it runs.")] = False,
    out: ResultsFolder = Path("runs/bench"),
    write: IntoPage = None,
    as_json: AsJson = False,
) -> None:
    """Each op forward and backward: checked, then timed beside SpikingJelly where it is installed."""
    with json_alone(as_json) as answer:
        from lasnn.bench.kernels import Options, measure
        from lasnn.bench.page import conditions
        from lasnn.bench.report import LEGEND, complain, save, table
        from lasnn.console import print_bench, to_stderr, to_stdout

        options = Options.read(device, timesteps, dtype, op, quick, out, write)
        with to_stderr().status("") as status:
            result = measure(options, status.update)
        files = [str(path) for path in save(result, options.out, options.write)]
        answer.update({"files": files, **result})
    if not as_json:
        notes = [LEGEND, *result["notes"], f"files: {', '.join(files)}"]
        print_bench(to_stdout(), conditions(result), *table(result), notes)
    complain(result)


@bench.command("step")
def bench_step(
    recipe: RecipeName,
    overrides: Overrides = None,
    timesteps: BenchTimesteps = None,
    rounds: Rounds = 15,
    neighbour: Annotated[bool, typer.Option("--neighbour", help="Measure it again beside a busy process.")] = False,
    out: ResultsFolder = Path("runs/bench"),
    write: IntoPage = None,
    as_json: AsJson = False,
) -> None:
    """A whole training step, beside SpikingJelly's layers and beside its convolutions alone."""
    steps = () if timesteps is None else parse_timesteps(timesteps)
    # Before PyTorch is imported: its profiler prints what it does.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with json_alone(as_json) as answer:
        from lasnn.bench.step import LEGEND, Options, head, kinds_said, measure, save, table
        from lasnn.console import print_bench, to_stderr, to_stdout

        options = Options.read(recipe, overrides or [], steps, rounds, neighbour, out, write)
        with to_stderr().status("") as status:
            result = measure(options, status.update)
        files = [str(path) for path in save(result, options)]
        answer.update({"files": files, **result})
    if not as_json:
        notes = [LEGEND, *kinds_said(result), *result["notes"], f"files: {', '.join(files)}"]
        titles, lines = table(result)
        print_bench(to_stdout(), head(result), titles, lines, notes, groups=0)


@bench.command("inference")
def bench_inference(
    recipe: RecipeName,
    overrides: Overrides = None,
    timesteps: BenchTimesteps = None,
    rounds: Rounds = 15,
    out: ResultsFolder = Path("runs/bench"),
    write: IntoPage = None,
    as_json: AsJson = False,
) -> None:
    """A student's forward pass, whole and step by step, beside SpikingJelly's layers and its convolutions alone."""
    steps = () if timesteps is None else parse_timesteps(timesteps)
    with json_alone(as_json) as answer:
        from lasnn.bench.inference import LEGEND, Options, head, measure, save, table
        from lasnn.console import print_bench, to_stderr, to_stdout

        options = Options.read(recipe, overrides or [], steps, rounds, out, write)
        with to_stderr().status("") as status:
            result = measure(options, status.update)
        files = [str(path) for path in save(result, options)]
        answer.update({"files": files, **result})
    if not as_json:
        titles, lines = table(result)
        notes = [LEGEND, *result["notes"], f"files: {', '.join(files)}"]
        print_bench(to_stdout(), head(result), titles, lines, notes, groups=0)


@bench.command("memory")
def bench_memory(
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images a step.")] = 50,
    precision: Annotated[str, typer.Option(metavar="NAME", help="fp32, bf16 or fp16.")] = "fp32",
    as_json: AsJson = False,
) -> None:
    """Peak memory of a distillation at T = 100, whole and in chunks of time, beside that of T = 8."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise UserError(f"--precision {precision}: it is fp32, bf16 or fp16")
    with json_alone(as_json) as answer:
        from lasnn.bench.memory import complain, measure, table
        from lasnn.console import to_stderr

        with to_stderr().status("") as status:
            result = measure(device, batch_size, precision, status.update)
        answer.update(result)
    if not as_json:
        print("\n".join(table(result)))
    complain(result)


@contextmanager
def json_alone(as_json: bool):
    """With `--json`, print the yielded dict at the end of the block; all else goes to standard error."""
    answer: dict = {}
    if not as_json:
        yield answer
        return
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            yield answer
        finally:
            if answer:
                print(json.dumps(answer), file=out)


def parse_timesteps(text: str) -> list[int]:
    """`4` or `1,2,4,8`.

    Raises:
        UserError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise UserError(f"--timesteps {text}: give whole numbers of at least 1, as 4 or 1,2,4,8")
    return [int(part) for part in parts]


def parse_variants(given: list[str]) -> dict[str, list[str]]:
    """`NAME:KEY=VALUE[;KEY=VALUE...]`, each once.

    Raises:
        UserError: something else, or a name twice.
    """
    found: dict[str, list[str]] = {}
    for text in given:
        name, colon, settings = text.partition(":")
        parts = [part.strip() for part in settings.split(";")]
        if not (name.strip() and colon and all("=" in part for part in parts)):
            raise UserError(f"--variant {text}: give NAME:KEY=VALUE, further settings after semicolons")
        if name.strip() in found:
            raise UserError(f"--variant {text}: there are two variants of this name")
        found[name.strip()] = parts
    return found


def say_error(text: str) -> None:
    """Lines on standard error, the first marked."""
    print(f"lasnn: {text}", file=sys.stderr)


class Lines(logging.Handler):
    """What lasnn logs (the plugins that it loads), among the lines that the command prints."""

    def emit(self, record: logging.LogRecord) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            print(record.getMessage(), flush=True)


def main() -> None:
    """Run a command; exit code 0 done, 2 wrong input, 130/143 stopped by a signal, 1 the machine's fault, or
    nobody reads the output any more.
    """
    streams.prepare()
    share_cores()
    try:
        try:
            run_command()
        finally:
            streams.flush()
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        fail(1, f"cannot write the output: {error.strerror or error}")


def share_cores() -> None:
    """Let GNU's OpenMP, which PyTorch brings, sleep soon where it waits. Before PyTorch is imported.

    By itself a thread that waits for another keeps its core busy for about 8 ms. Where a core is taken by another
    process that is time which the other thread would need: a training step took three times as long (docs/benchmarks).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def run_command() -> None:
    """The command, its failures said in lines."""
    # Until a run takes signals over, to end after a whole step.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    log = logging.getLogger("lasnn")
    log.setLevel(logging.INFO)
    log.addHandler(Lines())
    try:
        app()
    except UserError as error:
        fail(2, *error.problems)
    except MachineError as error:
        fail(1, str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        # A disk's failure outside the places that expect one; a missing or wrong file was caught before.
        fail(1, f"{error.filename or 'cannot read or write'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail(130, "stopped")
    except Exception as error:
        if said := out_of_memory(error):
            fail(1, said)
        processes = sys.modules.get("lasnn.processes")
        if processes is not None and processes.connection_lost(error):
            fail(1, "another of the run's processes has ended")
        if speaks(str(error)):
            raise
        sys.exit(1)


def fail(code: int, *lines: str) -> NoReturn:
    """End with an exit code; of several processes the first that fails says why."""
    if speaks("\n".join(lines)):
        for line in lines:
            say_error(line)
    sys.exit(code)


def speaks(text: str) -> bool:
    """Whether this process is the one to tell of a failure (see `lasnn.processes.reports_failure`)."""
    processes = sys.modules.get("lasnn.processes")
    if processes is None:
        # All of them have found it.
        return int(os.environ.get("RANK", 0)) == 0
    return processes.reports_failure(text)
