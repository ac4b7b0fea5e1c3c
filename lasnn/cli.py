"""The command line: parse, call, print. PyTorch is imported by the commands, not by `--help`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lasnn import __version__
from lasnn.errors import MachineError, UserError

app = typer.Typer(
    name="lasnn",
    # Boxes and colours are for people; a pipe gets plain lines.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a trained ANN, layer by layer, into a small and fast spiking network.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]


def show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or a shipped recipe's name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as student.timesteps=2. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder.  [default: runs/<recipe>-<number>]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, or the newest unfinished one."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; no data.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train or load the teacher, distil it into the student, leave a run folder."""
    from lasnn.display import Shown, print_plan, to_stderr, to_stdout
    from lasnn.recipe import Recipe

    checked = Recipe.load(recipe, overrides or [])
    console = to_stderr() if as_json else to_stdout()
    if dry_run:
        from lasnn.plan import make_plan

        plan = make_plan(checked)
        if as_json:
            print(json.dumps(plan.summary()))
        else:
            print_plan(console, plan)
        return
    from lasnn.distillation import Stopped
    from lasnn.distillation import distill as run_recipe

    progress = Shown(console)
    try:
        run = run_recipe(checked, out, resume=resume, progress=progress)
    except Stopped as stopped:
        progress.close()
        command = f"lasnn distill {stopped.run / 'recipe.toml'} --out {stopped.run} --resume"
        say_error(f"{stopped}\ngo on with: {command}")
        raise typer.Exit(128 + stopped.signum) from None
    finally:
        progress.close()
    if as_json:
        print(json.dumps({"run": str(run.path), **run.read_json("summary.json")}))


@app.command()
def evaluate(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run folder.  [default: the newest under runs/]")
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(metavar="T[,T...]", help="Time steps.  [default: those of the training]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy, firing rate, energy and speed of a trained student at any T."""
    steps = None if timesteps is None else parse_timesteps(timesteps)
    from lasnn.display import to_stdout
    from lasnn.evaluation import conditions, load_run
    from lasnn.evaluation import evaluate as measure_run

    loaded = load_run(run, device="auto")
    results = measure_run(loaded, steps)
    known = conditions(loaded)
    if as_json:
        several = timesteps is not None and "," in timesteps
        print(json.dumps({**known, "results": results} if several else {**known, **results[0]}))
        return
    from lasnn.display import print_evaluation

    print_evaluation(to_stdout(), known, results)


@app.command("list")
def list_parts(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="architectures, encoders, neurons, losses, datasets or recipes."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a recipe can name, each with a line of description and its options."""
    from lasnn.errors import unknown
    from lasnn.registry import REGISTRIES, REQUIRED

    kinds = [*REGISTRIES, "recipes"]
    if what is not None and what not in kinds:
        raise UserError(unknown("kind", what, kinds))
    from lasnn.recipe import shipped, summary

    found: dict[str, dict] = {}
    for kind in kinds if what is None else [what]:
        if kind == "recipes":
            found[kind] = {name: {"description": summary(path)} for name, path in shipped().items()}
            continue
        registry, found[kind] = REGISTRIES[kind], {}
        for name in registry:
            entry = registry[name]
            options = {
                option: {
                    "type": info.type_name,
                    "default": None if info.default is REQUIRED else info.default,
                }
                for option, info in entry.options.items()
                if option not in ("in_channels", "num_classes")
            }
            found[kind][name] = {"description": entry.description, "options": options}
    if as_json:
        print(json.dumps(found))
        return
    from lasnn.display import print_parts, to_stdout

    print_parts(to_stdout(), found)


def parse_timesteps(text: str) -> list[int]:
    """`4` or `1,2,4,8`.

    Raises:
        UserError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise UserError(f"--timesteps {text}: give whole numbers of at least 1, as 4 or 1,2,4,8")
    return [int(part) for part in parts]


def say_error(text: str) -> None:
    """Lines on standard error, the first marked."""
    print(f"lasnn: {text}", file=sys.stderr)


def main() -> None:
    """Run a command; exit code 0 done, 2 wrong input, 130/143 stopped by a signal, 1 the machine's fault."""
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            say_error(problem)
        sys.exit(2)
    except MachineError as error:
        say_error(str(error))
        sys.exit(1)
    except OSError as error:
        # A disk's failure outside the places that expect one; a missing or wrong file was caught before.
        say_error(f"{error.filename or 'the system'}: {error.strerror or error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say_error("stopped")
        sys.exit(130)
