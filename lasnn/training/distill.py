"""The story of a distillation, top to bottom: data, teacher, student, result.

images -> teacher (eval, no gradient) -> its logits and stage features
       -> encoder -> student          -> logits of each step and stage features
       -> objective: named terms -> weighted sum -> backward -> optimiser

trainer.py has the loop, objective.py the terms.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lasnn import processes
from lasnn.callback import Callback, CallbackList
from lasnn.data import DatasetDescription, Images, Streamed
from lasnn.description import describe_student
from lasnn.evaluation.measure import accuracy, measure
from lasnn.factory import load_data, make_augmentation, make_student
from lasnn.memory import tune_allocator
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher, without_activations
from lasnn.notebook import default_progress
from lasnn.open_run import bind, is_done, open_run
from lasnn.plan import Plan, check_batches, read_plan
from lasnn.random import deterministic, globals_kept, keyed
from lasnn.recipe.schema import Recipe
from lasnn.run import RunFolder, absolute_paths, environment
from lasnn.training.advice import advice
from lasnn.training.anomaly import AnomalyTrainer
from lasnn.training.checkpoints import STATE_FILE, Checkpoints
from lasnn.training.objective import DistillationObjective
from lasnn.training.parallel import Parallel, check_processes
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
        resume: continue the run in `out` from its last saved state.
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
    plan = read_plan(recipe, list(overrides))
    check_processes(plan.recipe)
    progress = default_progress() if progress == "auto" else progress
    # A plugin's callback is known once the recipe has been read.
    callback = CallbackList([*([progress] if progress else []), *callbacks] if processes.is_main() else [])
    with processes.main_process_first():
        train, test, placed = load_data(plan.recipe, plan.data, plan.device)
        check_batches(plan)
    opened = open_run(plan.recipe, None if out is None else Path(out), resume, callback.note)
    with closing(callback), processes.main_process_context(opened) as run:
        callback.start(plan, run.path)
        callback.note(placed)
        if processes.broadcast_from_main(lambda: is_done(run, plan.recipe)):
            callback.note(f"{run.path} is finished; there is nothing to resume")
            return run
        saved = processes.broadcast_from_main(lambda: saved_state(run))
        if saved is None and resume:
            callback.note(f"nothing to resume in {run.path}; starting from the beginning")
        described = processes.broadcast_from_main(lambda: bind(run, plan.recipe, plan.data, (train, test)))
        known = {"precision": plan.precision, "data": plan.data.source, **absolute_paths(plan.recipe)}
        run.write_json("env.json", {**environment(plan.device), **known})
        if plan.device.type == "cpu":
            tune_allocator(chunks=plan.recipe.time_chunk > 0)
        with training_environment(plan, detect_anomaly) as stop:
            checkpoints = Checkpoints(run / STATE_FILE, plan.recipe.save_minutes, saved)
            checkpoints.require("images", train.fingerprint())
            context = TrainingContext(plan.precision, plan.device, checkpoints, stop, run, callback)
            trainer = AnomalyTrainer if detect_anomaly else Trainer
            teacher = TeacherSource(plan, train, test, run, callback).get(lambda phase: trainer(phase, context).fit())
            if teacher is not None:
                checkpoints.require("teacher", digest(teacher.network.state_dict()))
            student = new_student(plan, teacher)
            result = trainer(student_phase(plan, student, teacher, train, test), context).fit()
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


def new_student(plan: Plan, teacher: Teacher | None) -> Student:
    """The student before its training, on the run's device."""
    recipe = plan.recipe
    with keyed(recipe.seed, "student"):
        student = make_student(recipe, plan.data)
    if recipe.student.init == "teacher":
        student.network.load_state_dict(without_activations(teacher.network) | learnt_by_neurons(student.network))
    return student.to(plan.device)


def learnt_by_neurons(network: nn.Module) -> dict[str, Tensor]:
    """The neurons' own parameters: what a student's state has beyond its teacher's."""
    return {name: value for name, value in network.state_dict().items() if ".neuron." in name}


def student_phase(
    plan: Plan, student: Student, teacher: Teacher | None, train: Images | Streamed, test: Images | Streamed
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
        evaluate=lambda: accuracy(student, test, batch_size=recipe.data.batch_size, seed=recipe.seed),
    )


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
        "timesteps": recipe.student.timesteps,
        "firing_rate": result["firing_rate"],
        "energy_uj": result["energy_uj"],
        "seconds": fitted["seconds"],
        "teacher_seconds": teacher.get("seconds"),
        "images_per_second": fitted["images_per_second"],
        "epochs": recipe.distill.epochs,
        "images": len(test),
        "seed": recipe.seed,
    }
    summary["advice"] = advice(recipe, summary, run.metrics())
    run.write_json("summary.json", summary)
    callbacks.finish(summary, run.path)
