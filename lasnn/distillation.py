"""The story of a distillation, top to bottom: data, teacher, student, objective, result.

images -> teacher (eval, no gradient) -> its logits and stage features
       -> encoder -> student          -> logits of each step and stage features
       -> objective: named terms -> weighted sum -> backward -> optimiser
"""

import ctypes
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lasnn import __version__, checkpoint, distributed, lock
from lasnn.anomaly import Watch, largest, layers_watched
from lasnn.callback import Callback, Together
from lasnn.data import Batches, Images
from lasnn.errors import MachineError, UserError
from lasnn.loss import reading_of
from lasnn.measure import accuracy, measure, teacher_accuracy
from lasnn.network import Student, Teacher, without_activations
from lasnn.plan import Plan, check_batches, load_data, make_augmentation, make_student, make_teacher, read_plan
from lasnn.random import deterministic, generator, globals_kept, keyed, seed_globals
from lasnn.recipe import Recipe, Training
from lasnn.registry import losses
from lasnn.run import RUNS, WRITTEN, RunFolder, environment, load_into, open_run

CACHE = "teachers"
STATE = "last.pt"
# Of <malloc.h>.
M_MMAP_THRESHOLD = -3
# A scaler halves its scale at each overflow: from 65,536 forty in a row come here, and no further one would help.
SMALLEST_SCALE = 2.0**-24


class Stopped(Exception):
    """A signal ended the run after a whole step; its state is saved."""

    def __init__(self, signum: int, run: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; the state is in {run / STATE}")
        self.signum = signum
        self.run = run


def distill(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    resume: bool = False,
    progress: Callback | None = None,
    callbacks: Iterable[Callback | str] = (),
    detect_anomaly: bool = False,
) -> RunFolder:
    """Run a recipe: train or load the teacher, distil it into the student, leave a run folder.

    Args:
        recipe: a TOML file, a shipped recipe's name, or a `Recipe`.
        out: the run folder; None is `runs/<recipe>-<number>`.
        overrides: `key.path=value` settings, as for `Recipe.load`.
        resume: go on with the run in `out`, from its last saved state.
        progress: what is told about the progress; None is nobody.
        callbacks: others that are told, as objects or by the names under which they are registered.
        detect_anomaly: look at every step, and name the operation whose gradient is the first not to be a number; slow.

    Returns:
        The run folder; its `summary.json` holds the result.

    Raises:
        UserError: something in the recipe or the data cannot work; raised before the first batch.
        MachineError: the disk is full, or the loss or its gradient is no longer a finite number.
        Stopped: a signal came; the state is saved.
    """
    distributed.join()
    resume = resume or distributed.restarted()
    plan = read_plan(recipe, list(overrides))
    recipe = plan.recipe
    check_processes(recipe)
    # A plugin's callback is known once the recipe has been read.
    progress = Together([*([progress] if progress else []), *callbacks] if distributed.is_main() else [])
    with distributed.in_turn():
        train, test, placed = load_data(recipe, plan.data, plan.device)
        check_batches(plan)
    opened = open_run(recipe, None if out is None else Path(out), resume, progress.note)
    with closing(progress), distributed.by_main(opened) as run:
        progress.start(plan, run.path)
        progress.note(placed)
        if distributed.from_main(lambda: run.read_json("summary.json")):
            progress.note(f"{run.path} is finished; there is nothing to resume")
            return run
        saved = run / STATE
        state = distributed.from_main(lambda: checkpoint.load_state(saved) if saved.is_file() else None)
        if state is None and resume:
            progress.note(f"nothing to resume in {run.path}; starting from the beginning")
        run.write_json("env.json", {**environment(plan.device), "data": plan.data.source})

        # The caller's random state is as it was when the run is over.
        if recipe.time_chunk and plan.device.type == "cpu":
            return_large_blocks()
        # A gradient that overflows under fp16's scaler is none.
        anomalies = torch.autograd.set_detect_anomaly(detect_anomaly and recipe.precision != "fp16")
        with stop_on_signals() as stop, globals_kept(plan.device), deterministic(recipe.deterministic), anomalies:
            session = Session(plan, run, train, test, progress, stop, detect_anomaly)
            teacher = session.teacher(state if state and state["phase"] == "teacher" else None)
            student = session.student(teacher, state if state and state["phase"] == "student" else None)
            session.finish(student)
    return run


@dataclass(frozen=True)
class Place:
    """Where images stand in a run: from number `first` on in the batch of `total` of a step; all count from 0."""

    epoch: int
    step: int
    first: int
    total: int


@dataclass
class Session:
    """One run: what the phases share."""

    plan: Plan
    run: RunFolder
    train: Images
    test: Images
    progress: Callback
    stop: Callable[[], int | None]
    detect_anomaly: bool = False

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def batch_size(self) -> int:
        return self.recipe.data.batch_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a saved state holds for: the training images, and the teacher once there is one."""
        return {"images": self.train.fingerprint(), "teacher": None}

    def _check_identity(self, state: dict[str, Any]) -> None:
        named = {"images": "the training images", "teacher": f"the weights in {self.run / 'teacher.safetensors'}"}
        changed = [what for key, what in named.items() if state.get(key) != self.identity[key]]
        if changed:
            raise UserError(
                f"{self.run / STATE} cannot be resumed: {' and '.join(changed)} are not those that the run began with"
            )

    @contextmanager
    def _blaming_state(self):
        """Turn what a state that is whole, but not this run's, makes PyTorch raise into a line that names it."""
        try:
            yield
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.run / STATE} does not fit the recipe: {type(error).__name__}: {reason}") from error

    def teacher(self, state: dict[str, Any] | None) -> Teacher | None:
        """The teacher, from a checkpoint, from the cache, or trained now and cached."""
        table = self.recipe.teacher
        if table is None:
            return None
        with keyed(self.recipe.seed, "teacher"):
            teacher = make_teacher(self.recipe, self.plan.data)
        teacher.to(self.plan.device)
        weights = self.run / "teacher.safetensors"
        if distributed.from_main(lambda: weights.is_file() and "accuracy" in self.run.read_json("teacher.json")):
            distributed.from_main(lambda: load_into(teacher.network, weights))
        elif self.plan.teacher_checkpoint:
            distributed.from_main(lambda: load_into(teacher.network, self.plan.teacher_checkpoint))
            distributed.copy_from_main(teacher)
            self.progress.note(f"teacher: {table.architecture} from {self.plan.teacher_checkpoint}")
            measured = teacher_accuracy(teacher.eval(), self.test, batch_size=self.batch_size)
            self._keep_teacher(teacher, {"accuracy": measured, "seconds": 0.0})
        else:
            key = teacher_key(self.recipe, self.plan.device, self.train)
            cache = RunFolder(RUNS / CACHE / f"{table.architecture}-{key}")
            result = distributed.from_main(lambda: self._cached_teacher(cache, teacher))
            if result is None:
                result = self._train_teacher(teacher, state)
                self._keep_teacher(teacher, result)
                distributed.from_main(lambda: self._cache_teacher(cache, teacher, result))
            else:
                self._keep_teacher(teacher, result)
                self.progress.note(f"teacher: {table.architecture} from the cache ({cache.path}), not trained again")
        self.progress.teacher(self.run.read_json("teacher.json"))
        distributed.copy_from_main(teacher)
        self.identity["teacher"] = checkpoint.digest(teacher.network.state_dict())
        return teacher.eval().requires_grad_(False)

    def _train_teacher(self, teacher: Teacher, state: dict[str, Any] | None) -> dict[str, float]:
        smoothing = self.recipe.teacher.label_smoothing

        def objective(images: Tensor, targets: Tensor, _: Place) -> dict[str, Tensor]:
            logits = teacher(images).float()
            if not len(targets):
                return {"cross-entropy": distributed.nothing([logits])}
            return {"cross-entropy": nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)}

        def evaluate() -> float:
            return teacher_accuracy(teacher, self.test, batch_size=self.batch_size)

        weights = {"cross-entropy": 1.0}
        networks = {"teacher": teacher}
        return self._fit("teacher", networks, self.recipe.teacher, objective, weights, evaluate, state)

    def _keep_teacher(self, teacher: Teacher, result: dict[str, float]) -> None:
        self.run.write_json("teacher.json", result)
        description = self._description(self.recipe.teacher.architecture, self.recipe.teacher.options)
        checkpoint.save_weights(self.run / "teacher.safetensors", teacher.network.state_dict(), description)

    def _cached_teacher(self, cache: RunFolder, teacher: Teacher) -> dict[str, float] | None:
        """Load the teacher from the cache; None where it is not there, or damaged."""
        if not (cache / "teacher.safetensors").is_file():
            return None
        try:
            metrics, result = cache.metrics(), cache.read_json("teacher.json")
            if "accuracy" not in result:
                raise UserError(f"{cache / 'teacher.json'} is missing or damaged")
            load_into(teacher.network, cache / "teacher.safetensors")
        except UserError as error:
            self.progress.note(f"the cached teacher cannot be used and is trained again: {error}")
            return None
        self.run.write_metrics(metrics)
        return result

    def _cache_teacher(self, cache: RunFolder, teacher: Teacher, result: dict[str, float]) -> None:
        description = self._description(self.recipe.teacher.architecture, self.recipe.teacher.options)
        try:
            cache.path.mkdir(parents=True, exist_ok=True)
            with lock.locked(cache.path):
                checkpoint.sweep(cache.path, WRITTEN)
                cache.write_metrics(self.run.metrics())
                cache.write_json("teacher.json", result)
                # The weights come last: their presence says that the cached teacher is whole.
                checkpoint.save_weights(cache / "teacher.safetensors", teacher.network.state_dict(), description)
        except (OSError, MachineError, UserError) as error:
            # The run has its teacher; only the next one will have to train it again, if no other run is caching it.
            self.progress.note(f"the teacher is not cached: {error}")

    def student(self, teacher: Teacher | None, state: dict[str, Any] | None) -> Student:
        """The student, distilled from the teacher."""
        recipe = self.recipe
        with keyed(recipe.seed, "student"):
            student = make_student(recipe, self.plan.data)
        if recipe.student.init == "teacher":
            student.network.load_state_dict(without_activations(teacher.network) | _learnt_by_neurons(student.network))
        student.to(self.plan.device)
        terms = [(loss.name, losses[loss.name], loss.options) for loss in recipe.losses]
        asked = {name for _, entry, _ in terms for name in entry.inputs}
        pairs = self.plan.pairs if "student_features" in asked else ()
        # In chunks of time, what has to be computed while the features of single steps are there.
        by_step = [term for term in terms if reading_of(term[1].function, term[2]) == "steps"]

        def objective(images: Tensor, targets: Tensor, place: Place) -> dict[str, Tensor]:
            given: dict[str, Any] = {"targets": targets}
            if asked & {"teacher_logits", "teacher_features"}:
                with torch.no_grad():
                    given["teacher_logits"], features = teacher.taps(images, [pair.teacher for pair in pairs])
                given["teacher_features"] = [features[pair.teacher] for pair in pairs]
            draws = generator(recipe.seed, "encode", place.epoch, place.step, device=images.device)
            part = {"first": place.first, "total": place.total}
            taps = [pair.student for pair in pairs]

            def values(which: list, logits: Tensor, features: dict[str, Tensor]) -> list[Tensor]:
                mine = {"logits": logits, "student_features": [features[tap] for tap in taps]}
                if not len(targets):
                    # Other processes have all the images.
                    used = [[mine[name] for name in entry.inputs if name in mine] for _, entry, _ in which]
                    return [distributed.nothing(tensors) for tensors in used]
                known = {**given, **mine}
                return [
                    entry.function(*(known[name] for name in entry.inputs), **options) for _, entry, options in which
                ]

            if not recipe.time_chunk:
                found = values(terms, *student.steps(images, taps, draws, **part))
                return {name: value for (name, _, _), value in zip(terms, found, strict=True)}
            if by_step:
                part["of_steps"] = lambda logits, features: torch.stack(values(by_step, logits, features))
            logits, features, found = student.in_chunks(images, recipe.time_chunk, taps, draws, **part)
            mine = dict(zip([name for name, _, _ in by_step], found if by_step else (), strict=True))
            rest = [term for term in terms if term not in by_step]
            mine |= zip([name for name, _, _ in rest], values(rest, logits, features), strict=True)
            return {name: mine[name] for name, _, _ in terms}

        def evaluate() -> float:
            return accuracy(student, self.test, batch_size=self.batch_size, seed=recipe.seed)

        weights = {loss.name: loss.weight for loss in recipe.losses}
        networks = {"student": student} | ({"teacher": teacher} if teacher else {})
        self.fitted = self._fit("student", networks, recipe.distill, objective, weights, evaluate, state)
        return student.eval()

    def finish(self, student: Student) -> None:
        """Write the student and the summary."""
        recipe = self.recipe
        options = {"batch_size": self.batch_size, "seed": recipe.seed}
        [result] = measure(student, self.test, [recipe.student.timesteps], **options)
        if not distributed.is_main():
            return
        description = self._description(recipe.student.architecture, recipe.student.options)
        description["recipe"] = (self.run / "recipe.toml").read_text(encoding="utf-8")
        checkpoint.save_weights(self.run / "student.safetensors", student.network.state_dict(), description)
        teacher = self.run.read_json("teacher.json")
        summary = {
            "accuracy": result["accuracy"],
            "teacher_accuracy": teacher.get("accuracy"),
            "timesteps": recipe.student.timesteps,
            "firing_rate": result["firing_rate"],
            "energy_uj": result["energy_uj"],
            "seconds": self.fitted["seconds"],
            "teacher_seconds": teacher.get("seconds"),
            "images_per_second": self.fitted["images_per_second"],
            "epochs": recipe.distill.epochs,
            "images": len(self.test),
            "seed": recipe.seed,
        }
        self.run.write_json("summary.json", summary)
        self.progress.finish(summary, self.run.path)

    def _description(self, architecture: str, options: dict[str, Any]) -> dict[str, Any]:
        data = self.plan.data
        return {
            "architecture": architecture,
            "options": options,
            "in_channels": data.channels,
            "num_classes": len(data.classes),
            "data": self.recipe.data.name,
        }

    def _fit(
        self,
        phase: str,
        networks: dict[str, nn.Module],
        table: Training,
        objective: Callable[[Tensor, Tensor, Place], dict[str, Tensor]],
        weights: dict[str, float],
        evaluate: Callable[[], float],
        state: dict[str, Any] | None,
    ) -> dict[str, float]:
        """Train the phase's network, from `state` if there is one; `networks` are all that run in its objective.

        Returns the last accuracy, the seconds and the throughput.
        """
        module = networks[phase]
        objective = distributed.parallel(module, objective)
        scaler = torch.amp.GradScaler(self.plan.device.type, enabled=self.recipe.precision == "fp16")
        # A fused optimiser can leave a step out on the device (`found_inf`), as a scaler does itself; PyTorch's fused
        # SGD must not go on after that, for its momentum would begin with what lies in unused memory.
        optimizer = make_optimizer(module, table, fused=not scaler.is_enabled())
        # Under a scaler a gradient that overflows is expected: the scaler leaves the step out, and lowers the scale.
        watched = [*weights, "loss"] if scaler.is_enabled() else [*weights, "loss", "gradient"]
        interval = self._interval()
        first_epoch, first_step, spent, sums = 0, 0, 0.0, None
        latest: dict[str, Any] = {}
        trained, epoch_spent = 0, 0.0
        if state:
            self._check_identity(state)
            with self._blaming_state():
                module.load_state_dict(state["module"])
                optimizer.load_state_dict(state["optimizer"])
                scaler.load_state_dict(state["scaler"])
                first_epoch, first_step = state["epoch"], state["step"]
                spent, sums, latest = state["seconds"], state["sums"], state["latest"]
                trained, epoch_spent = state["trained"], state["epoch_seconds"]
                if not (0 <= first_epoch <= table.epochs and 0 <= first_step <= self.plan.steps_per_epoch):
                    raise ValueError(f"there is no epoch {first_epoch + 1}, step {first_step + 1}")
            self.progress.note(f"resuming the {phase} at epoch {first_epoch + 1}, step {first_step + 1}")
        # What a stopped run logged beyond its last save is done again, and logged again.
        done = [epoch for epoch in self.run.metrics() if epoch["phase"] != phase or epoch["epoch"] <= first_epoch]
        self.run.write_metrics(done)
        steps = self.plan.steps_per_epoch
        augmentation = make_augmentation(self.recipe, self.plan.data)
        begin = time.perf_counter() - spent

        def micro_batches(images: Tensor, targets: Tensor, epoch: int, step: int) -> Iterator[tuple[dict, int]]:
            """The terms of each of the parts that a batch is computed in, and the images in it."""
            # For layers that draw of their own accord, as dropout does.
            seed_globals(self.recipe.seed, phase, epoch, step, *distributed.numbered())
            total = self._images_in(step)
            parts = self._parts(total)
            sizes = [len(part) for part in parts]
            for part, some, theirs in zip(parts, images.split(sizes), targets.split(sizes), strict=True):
                place = Place(epoch, step, part[0].item() if len(part) else 0, total)
                with self._autocast(), distributed.last_of(objective, part is parts[-1]):
                    terms = objective(some, theirs, place)
                terms["loss"] = sum(weights[name] * term for name, term in terms.items())
                yield terms, len(theirs)

        def check(watch: Watch, epoch: int, step: int) -> None:
            if (found := watch.found()) is None:
                if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
                    raise MachineError(
                        f"the {phase}'s gradient overflows fp16 at every scale of the loss by epoch {epoch + 1}, step "
                        f'{step + 1}: lower the weights of the losses, or set precision = "bf16".{self._kept()}'
                    )
                return
            step, names = found
            # The weights are those from before that step: the optimiser, or the scaler, left it and those after it out.
            module.train()
            again = next(iter(make_batches(epoch, step)))
            with layers_watched(networks) as layers, torch.autograd.set_detect_anomaly(False):
                for terms, _ in micro_batches(*again, epoch, step):
                    broken = "forward" in layers or not terms["loss"].isfinite()
                    if distributed.highest(broken) == [0]:
                        terms["loss"].backward()
            for found_there in distributed.gathered(dict(layers)):
                layers = found_there | layers
            self._broken(phase, epoch, step, names, layers)

        def make_batches(epoch: int, start: int) -> Batches:
            options = {"seed": self.recipe.seed, "epoch": epoch, "augment": augmentation, "share": self._share}
            return Batches(self.train, self.batch_size, start=start, **options)

        saved = time.monotonic()

        def save(epoch: int, step: int) -> None:
            nonlocal saved
            self._check_weights(module, phase, epoch, step)
            kept = {
                **self.identity,
                "phase": phase,
                "epoch": epoch,
                "step": step,
                "seconds": time.perf_counter() - begin,
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "sums": sums,
                "trained": trained,
                "epoch_seconds": epoch_spent,
                "latest": latest,
            }
            checkpoint.save_state(self.run / STATE, kept)
            # Until it is written no process ends, which would end the others.
            distributed.wait()
            saved = time.monotonic()

        for epoch in range(first_epoch, table.epochs):
            module.train()
            batches, watch = make_batches(epoch, first_step), Watch(watched, self.plan.device)
            self.progress.epoch(phase, epoch, table.epochs, steps)
            if not first_step:
                sums = dict.fromkeys(["loss", *weights], 0.0)
                trained, epoch_spent = 0, 0.0
            epoch_begin = time.perf_counter() - epoch_spent
            for step, (images, targets) in enumerate(batches, start=first_step):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(table, epoch * steps + step, steps)
                optimizer.zero_grad(set_to_none=True)
                total = self._images_in(step)
                # Sums stay on the device: reading one would wait for it.
                batch = dict.fromkeys([*weights, "loss"], 0.0)
                for terms, count in micro_batches(images, targets, epoch, step):
                    for name, term in terms.items():
                        batch[name] = batch[name] + term.detach().double() * count
                    if self.detect_anomaly:
                        watch.see(step, self._totals({**batch, "gradient": terms["loss"]}))
                        check(watch, epoch, step)
                    with anomaly_named(phase, epoch, step):
                        # The gradients' mean over the processes is to be that of the mean over the batch's images.
                        weight = distributed.world_size() * count / total
                        scaler.scale(terms["loss"] * weight).backward()
                batch = self._totals(batch)
                if scaler.is_enabled():
                    watch.see(step, batch)
                else:
                    gradients = [p.grad for p in module.parameters() if p.grad is not None]
                    watch.see(step, {**batch, "gradient": largest(gradients)})
                    # From here on steps are left out, and the weights stay what they were.
                    optimizer.found_inf = watch.broken()
                if table.clip_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(module.parameters(), table.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                for name, value in batch.items():
                    sums[name] = sums[name] + value
                trained += total
                if step % interval == 0 or step + 1 == steps:
                    check(watch, epoch, step)
                if step % 20 == 0 or step + 1 == steps:
                    self.progress.step(step, trained / (time.perf_counter() - epoch_begin), sums, weights)
                epoch_spent = time.perf_counter() - epoch_begin
                # All processes stop, or save, after the same step.
                due = time.monotonic() - saved >= 60 * self.recipe.save_minutes
                signum, due = distributed.highest(self.stop() or 0, due)
                if signum or due:
                    check(watch, epoch, step)
                    save(epoch, step + 1)
                if signum:
                    raise Stopped(signum, self.run.path)
            self._check_weights(module, phase, epoch, steps)
            module.eval()
            latest = {
                "phase": phase,
                "epoch": epoch + 1,
                "loss": float(sums["loss"]) / len(self.train),
                "losses": {name: float(sums[name]) / len(self.train) for name in weights},
                "accuracy": evaluate(),
                "lr": learning_rate(table, (epoch + 1) * steps - 1, steps),
                "seconds": epoch_spent,
                "images_per_second": trained / epoch_spent,
            }
            first_step = 0
            self.run.add_metrics(latest)
            save(epoch + 1, 0)
            self.progress.end_epoch(latest)
            if signum := distributed.highest(self.stop() or 0)[0]:
                raise Stopped(signum, self.run.path)
        return {
            "accuracy": latest["accuracy"],
            "seconds": time.perf_counter() - begin,
            "images_per_second": latest["images_per_second"],
        }

    def _interval(self) -> int:
        """After how many steps the watch is read: it waits for the device, as fp16's scaler does at each step."""
        rarely = self.plan.device.type == "cuda" and self.recipe.precision != "fp16" and not self.detect_anomaly
        return 20 if rarely else 1

    def _images_in(self, step: int) -> int:
        """How many images a step's batch has, those of other processes too."""
        return min(self.batch_size, len(self.train) - step * self.batch_size)

    def _parts(self, total: int) -> list[Tensor]:
        """Which images of a batch of `total` this process has, in each of the parts that the batch is computed in."""
        parts = torch.arange(total).tensor_split(self.plan.micro_batches(total))
        return [part[distributed.share(len(part))] for part in parts]

    def _share(self, total: int) -> Tensor:
        """Which images of a batch of `total` this process has."""
        return torch.cat(self._parts(total))

    def _totals(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over all processes' images, none of which waits for the device."""
        if distributed.world_size() == 1:
            return sums
        own = torch.stack([value.detach().double() for value in sums.values()])
        return dict(zip(sums, distributed.summed(own), strict=True))

    def _autocast(self):
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.recipe.precision]
        return torch.autocast(self.plan.device.type, dtype=kind, enabled=kind != torch.float32)

    def _broken(self, phase: str, epoch: int, step: int, names: list[str], layers: dict[str, str]) -> None:
        """Stop a run: which numbers of a step were not finite, and where that began."""
        terms = [name for name in names if name not in ("loss", "gradient")]
        what = "gradient" if names == ["gradient"] else "loss"
        which = ", ".join(terms) or ("the weighted sum" if what == "loss" else "after a finite loss")
        if "forward" in layers:
            where = f"it began in the layer {layers['forward']}"
        elif what == "gradient" and "backward" in layers:
            where = f"it began in the gradient of what the layer {layers['backward']} gives on"
        elif what == "gradient":
            where = "it began in the gradient of a weight, or did not occur again when the batch was repeated"
        else:
            where = "every layer's values are finite, so that it began in the loss itself"
        raise MachineError(
            f"the {phase}'s {what} is not a finite number in epoch {epoch + 1}, step {step + 1} ({which}); {where}; "
            f"lower the learning rate or set clip_norm; --detect-anomaly finds more.{self._kept()}"
        )

    def _check_weights(self, module: nn.Module, phase: str, epoch: int, step: int) -> None:
        """Stop a run whose weights are not finite numbers: no saved state, and no accuracy, shall come of them."""
        states = module.state_dict().items()
        broken = [name for name, value in states if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise MachineError(
                f"the {phase}'s weights are not finite numbers in epoch {epoch + 1}, after step {step} ({broken[0]}, "
                f"{len(broken)} in all); lower the learning rate or set clip_norm.{self._kept()}"
            )

    def _kept(self) -> str:
        return f" The last good state is in {self.run / STATE}." if (self.run / STATE).is_file() else ""


@contextmanager
def anomaly_named(phase: str, epoch: int, step: int):
    """Turn what autograd's anomaly detection raises into a line: the operation, and the line of code it came from."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
    except RuntimeError as error:
        if "returned nan values" not in str(error):
            raise
        # The warning has the stack of the forward call; its last lines outside of PyTorch are what the reader knows.
        stack = "".join(str(warning.message) for warning in said)
        frames = [f for f in re.findall(r'File "(.+?)", line (\d+), in (\w+)', stack) if "/torch/" not in f[0]]
        where = f", computed in {frames[-1][2]} ({frames[-1][0]}:{frames[-1][1]})" if frames else ""
        reason = str(error).rstrip(".")
        raise MachineError(
            f"the {phase}'s gradient breaks in epoch {epoch + 1}, step {step + 1}: {reason}{where}"
        ) from error


def check_processes(recipe: Recipe) -> None:
    """Check that a recipe can be run by the processes that there are.

    Raises:
        UserError: it cannot.
    """
    count, problems = distributed.world_size(), []
    if (batch := recipe.data.batch_size) < count:
        problems.append(recipe.line("data.batch_size", f"{batch} images cannot be shared by {count} processes"))
    if count > 1 and ":" in recipe.device:
        problems.append(recipe.line("device", f'one GPU for {count} processes; with "cuda" each takes its own'))
    if problems:
        raise UserError(*problems)


def return_large_blocks() -> None:
    """Let glibc give each block of 64 KiB and more back to the system when it is freed (elsewhere: nothing).

    Otherwise it keeps those of up to 32 MiB in its heap, which the voltages between the chunks of time then fragment:
    the process grows several times beyond the tensors that it holds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 64 * 2**10)


def make_optimizer(module: nn.Module, table: Training, fused: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW; one-dimensional parameters (batch norm, biases, tau) do not decay."""
    learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learnt if p.ndim > 1], "weight_decay": table.weight_decay},
        {"params": [p for p in learnt if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if table.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=table.lr, momentum=table.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=table.lr, betas=(table.momentum, 0.999), fused=fused)


def learning_rate(table: Training, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up from 0 to `lr`, then half a cosine down to `min_lr` (Loshchilov & Hutter, ICLR 2017)."""
    total, warm = table.epochs * steps_per_epoch, table.warmup_epochs * steps_per_epoch
    if step < warm:
        return table.lr * min(1.0, (step + 1) / warm)
    share = (step - warm) / max(1.0, total - warm)
    return table.min_lr + (table.lr - table.min_lr) * (1 + math.cos(math.pi * share)) / 2


def teacher_key(recipe: Recipe, device: torch.device, train: Images) -> str:
    """What defines a trained teacher, as twelve hexadecimal digits: the same key, the same weights."""
    data = recipe.data.model_dump(exclude={"root", "residence", "workers"})
    teacher = recipe.teacher.model_dump(exclude={"checkpoint"})
    # Not where the images lie, but what they are.
    images = train.fingerprint()
    plugins = [hashlib.sha256(path.read_bytes()).hexdigest() for path in recipe.plugin_sources()]
    defines = [__version__, recipe.seed, recipe.precision, device.type, data, images, teacher, plugins]
    return hashlib.sha256(json.dumps(defines, sort_keys=True).encode()).hexdigest()[:12]


def _learnt_by_neurons(network: nn.Module) -> dict[str, Tensor]:
    """What a student has to learn beyond its teacher's weights: the neurons' own parameters."""
    return {name: value for name, value in network.state_dict().items() if ".neuron." in name}


@contextmanager
def stop_on_signals():
    """Within the block SIGINT and SIGTERM only ask for a stop after the current step; a second one kills at once.

    Yields a function that returns the signal's number, None while there was none.
    """
    received: list[int] = []

    def handle(signum: int, _: object) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread alone; whoever runs this in another handles them there.
        yield lambda: None
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
