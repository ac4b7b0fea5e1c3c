"""The story of a distillation, top to bottom: data, teacher, student, result.

images -> teacher (eval, no gradient) -> its logits and stage features
       -> encoder -> student          -> logits of each step and stage features
       -> objective: named terms -> weighted sum -> backward -> optimiser

trainer.py has the loop, objective.py the terms.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lasnn import processes
from lasnn.callback import Callback, CallbackList
from lasnn.data import DatasetDescription, Images, Streamed, by_class, hold_out
from lasnn.data.description import some
from lasnn.description import describe_student
from lasnn.errors import UserError
from lasnn.evaluation.measure import VALIDATION, evaluation, measure
from lasnn.factory import load_data, make_augmentation
from lasnn.memory import tune_allocator
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.notebook import default_progress
from lasnn.open_run import bind, check_run, is_done, module_digests, open_run
from lasnn.plan import Plan, check_batches, read_plan
from lasnn.random import deterministic, globals_kept
from lasnn.recipe.schema import Recipe
from lasnn.run import STATE_FILE, RunFolder, absolute_paths, changed_conditions, earlier_sessions, environment
from lasnn.training.advice import advice, term_notes
from lasnn.training.anomaly import AnomalyTrainer
from lasnn.training.checkpoints import Checkpoints
from lasnn.training.diagnostics import Diagnostics
from lasnn.training.objective import DistillationObjective
from lasnn.training.parallel import Parallel, check_processes
from lasnn.training.start import new_student
from lasnn.training.stop import StopRequest, stop_on_signals
from lasnn.training.teacher import TeacherSource
from lasnn.training.trainer import Phase, Trainer, TrainingContext
from lasnn.weights import digest, load_state, save_weights


def distill(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    resume: bool = False,
    progress: Callback | Literal["auto"] | None = "auto",
    callbacks: Iterable[Callback | str] = (),
    detect_anomaly: bool = False,
) -> RunFolder:
    """Run a recipe: train or load the teacher, distil it into the student, leave a run folder.

    Args:
        recipe: a TOML file, a shipped recipe's name, or a `Recipe`.
        out: the run folder; by default `runs/<recipe>-<number>`.
        overrides: `key.path=value` settings, as for `Recipe.load`.
        resume: continue the run in `out` from its last saved state, or else the newest unfinished one of the recipe
            under `runs/`.
        progress: a callback that shows the progress; "auto" is a table in a notebook, a bar on a terminal and plain
            lines elsewhere, None nothing.
        callbacks: further ones, as objects or by the names under which they are registered.
        detect_anomaly: check every step, and name the operation that first gives a NaN gradient; slow.

    Returns:
        The run folder; its `summary.json` holds the result.

    Raises:
        UserError: something in the recipe or the data cannot work; raised before the first batch.
        MachineError: the disk is full, or the loss or its gradient is no longer a finite number.
        Stopped: a signal came; the state is saved.
    """
    processes.join()
    resume = resume or processes.restarted()
    plan = read_plan(recipe, overrides)
    check_processes(plan.recipe)
    progress = default_progress() if progress == "auto" else progress
    # A plugin's callback is known once the recipe has been read.
    callbacks = [callbacks] if isinstance(callbacks, str | Callback) else list(callbacks)
    names = [callback for callback in callbacks if isinstance(callback, str)]
    callback = CallbackList([*([progress] if progress else []), *callbacks] if processes.is_main() else [])
    out = None if out is None else Path(out)
    if processes.is_main():
        # Before many images are read.
        check_run(plan.recipe, out, resume)
    with processes.main_process_first():
        whole, test, placed = load_data(plan.recipe, plan.data, plan.device)
        check_batches(plan)
        train, validation = hold_out(whole, plan.recipe.data.validation)
    opened = open_run(plan.recipe, out, resume, callback.note)
    with closing(callback), processes.main_process_context(opened) as run:
        callback.start(plan, run.path)
        callback.note(placed)
        if validation is not None:
            counts = by_class(validation.labels, plan.data.classes)
            callback.note(f"held out by class: {some([f'{name} {count:,}' for name, count in counts.items()])}")
        if processes.broadcast_from_main(lambda: is_done(run, plan.recipe)):
            callback.note(f"{run.path} is finished; there is nothing to resume")
            return run
        saved = processes.broadcast_from_main(lambda: saved_state(run))
        if saved is None and resume:
            callback.note(f"nothing to resume in {run.path}; starting from the beginning")
        described = processes.broadcast_from_main(partial(bind, run, plan.recipe, plan.data, (whole, test)))
        # Where some are held out, the others are a copy.
        del whole
        known = {
            "precision": plan.precision,
            "data": plan.data.source,
            "plugins": module_digests(plan.recipe),
            # For the command that goes on with the run.
            "options": [
                *(["--detect-anomaly"] if detect_anomaly else []),
                *(word for named in names for word in ("--callback", named)),
            ],
            **absolute_paths(plan.recipe),
        }
        now = {**environment(plan.device), **known}
        if saved is not None and (earlier := earlier_sessions(run)):
            now["earlier"] = earlier
            for change in changed_conditions(earlier[-1], now):
                callback.note(f"{change}: roundings may differ from here on")
        run.write_json("env.json", now)
        if plan.device.type == "cpu":
            tune_allocator(chunks=plan.recipe.time_chunk > 0)
        with training_environment(plan, detect_anomaly) as stop:
            checkpoints = Checkpoints(run / STATE_FILE, plan.recipe.save_minutes, saved)
            checkpoints.require("images", train.fingerprint())
            context = TrainingContext(plan.precision, plan.device, checkpoints, stop, run, callback)
            trainer = AnomalyTrainer if detect_anomaly else Trainer
            anns = {}
            for name in ("teacher", "start"):
                source = TeacherSource(plan, train, test, run, callback, name, validation)
                anns[name] = source.get(lambda phase: trainer(phase, context).fit())
                if name == "teacher" and anns[name] is not None:
                    checkpoints.require(name, digest(anns[name].network.state_dict()))
            student, started_from = new_student(plan, anns, train)
            checkpoints.require("start", started_from)
            phase = student_phase(plan, student, anns["teacher"], train, test, validation)
            with compiled(student, plan.recipe):
                result = trainer(phase, context).fit()
            finish(plan, described, run, student.eval(), test, result, callback)
    return run


def saved_state(run: RunFolder) -> dict[str, Any] | None:
    """The state that a run is resumed from, None where there is none."""
    return load_state(run / STATE_FILE) if (run / STATE_FILE).is_file() else None


@contextmanager
def training_environment(plan: Plan, detect_anomaly: bool) -> Iterator[StopRequest]:
    """Set signal handlers, global generators and PyTorch's modes for the training, and restore them."""
    # A gradient that overflows under fp16's scaler is expected.
    anomalies = torch.autograd.set_detect_anomaly(detect_anomaly and plan.precision != "fp16")
    with stop_on_signals() as stop, globals_kept(plan.device), deterministic(plan.recipe.deterministic), anomalies:
        yield stop


@contextmanager
def compiled(student: Student, recipe: Recipe) -> Iterator[None]:
    """Compile the student's training pass where the recipe asks for it, and say what cannot be compiled."""
    if not recipe.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    student.compile_training()
    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            recipe.line("compile", f"the student cannot be compiled in one graph: {reason}; set compile = false")
        ) from error


def student_phase(
    plan: Plan,
    student: Student,
    teacher: Teacher | None,
    train: Images | Streamed,
    test: Images | Streamed,
    validation: Images | Streamed | None = None,
) -> Phase:
    """The student's training under its teacher."""
    recipe = plan.recipe
    objective = DistillationObjective(student, teacher, plan, len(train))
    return Phase(
        name="student",
        model=student,
        objective=objective,
        networks={"student": student} | ({"teacher": teacher} if teacher else {}) | objective.modules_by_name,
        config=recipe.distill,
        images=train,
        batch_size=recipe.data.batch_size,
        augmentation=make_augmentation(recipe, plan.data),
        parallel=Parallel(recipe),
        evaluate=lambda: evaluation(student, test, validation, batch_size=recipe.data.batch_size, seed=recipe.seed),
        **({"diagnose": Diagnostics(objective, plan, train)} if recipe.distill.diagnostics else {}),
    )


def weights_kept(recipe: Recipe) -> str:
    """Which weights student.safetensors has, which are those that are measured."""
    decay = recipe.distill.ema
    return f"exponential moving average of the steps, decay {decay:g}" if decay else "of the last step"


def finish(
    plan: Plan,
    described: DatasetDescription,
    run: RunFolder,
    student: Student,
    test: Images | Streamed,
    fitted: dict[str, float],
    callbacks: Callback,
) -> None:
    """Measure the student, and write it and the summary."""
    recipe = plan.recipe
    options = {"batch_size": recipe.data.batch_size, "seed": recipe.seed}
    [result] = measure(student, test, [recipe.student.timesteps], **options)
    if not processes.is_main():
        return
    save_weights(run / "student.safetensors", student.network.state_dict(), describe_student(recipe, described))
    teacher = run.read_json("teacher.json")
    summary = {
        "accuracy": result["accuracy"],
        "teacher_accuracy": teacher.get("accuracy"),
        **{key: fitted[key] for key in VALIDATION if key in fitted},
        **{f"teacher_{key}": teacher[key] for key in VALIDATION if key in teacher},
        "timesteps": recipe.student.timesteps,
        "firing_rate": result["firing_rate"],
        "energy_uj": result["energy_uj"],
        "seconds": fitted["seconds"],
        "teacher_seconds": teacher.get("seconds"),
        "images_per_second": fitted["images_per_second"],
        "epochs": recipe.distill.epochs,
        "init": recipe.student.init if plan.start.path else plan.start.said,
        "images": len(test),
        "weights": weights_kept(recipe),
        "seed": recipe.seed,
    }
    summary["advice"] = advice(recipe, summary, run.metrics())
    summary["terms"] = list(term_notes(recipe, run.metrics()))
    run.write_json("summary.json", summary)
    callbacks.finish(summary, run.path)
