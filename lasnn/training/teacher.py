"""The teacher: from the run itself, from a weights file, as its own code loads it, from the cache of trained teachers,
or trained now.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lasnn import __version__, lock, processes
from lasnn.callback import Callback
from lasnn.data import Images, Streamed
from lasnn.description import describe_teacher
from lasnn.errors import MachineError, UserError
from lasnn.evaluation.measure import evaluation
from lasnn.factory import make_augmentation, make_teacher, pick_precision
from lasnn.files import remove_partial
from lasnn.network.teacher import Teacher
from lasnn.plan import Plan
from lasnn.random import keyed
from lasnn.recipe.schema import Recipe, TeacherTable
from lasnn.run import RUNS, WRITTEN, RunFolder, load_into
from lasnn.training.objective import TeacherObjective
from lasnn.training.parallel import Parallel
from lasnn.training.trainer import Phase
from lasnn.weights import save_weights

CACHE = RUNS / "teachers"


@dataclass(frozen=True)
class TeacherSource:
    """Where a run's teacher comes from, or the ANN twin of its student that `[start]` names.

    Args:
        plan: the run's.
        train, test: its images.
        run: its folder, which keeps the teacher's weights, result and metrics.
        callbacks: are told of what was found.
        name: "teacher" or "start", of the recipe's table, the phase and the files.
        validation: the images that are held out, if any.
    """

    plan: Plan
    train: Images | Streamed
    test: Images | Streamed
    run: RunFolder
    callbacks: Callback
    name: str = "teacher"
    validation: Images | Streamed | None = None

    @property
    def table(self) -> TeacherTable | None:
        """The recipe's."""
        return getattr(self.plan.recipe, self.name)

    def get(self, train_teacher: Callable[[Phase], dict[str, float]]) -> Teacher | None:
        """The teacher, frozen and in evaluation mode; None where the recipe has none.

        Args:
            train_teacher: trains it where it is nowhere to be found.
        """
        if self.table is None:
            return None
        teacher = self._untrained()
        if not processes.broadcast_from_main(lambda: self._from_run(teacher)):
            planned = self.plan.anns[self.name]
            if planned.checkpoint:
                result = self._from_checkpoint(teacher, planned.checkpoint)
            else:
                result = self._as_built(teacher) if planned.frozen else self._from_cache(teacher)
            if result is None:
                result = train_teacher(self.phase(teacher))
                processes.broadcast_from_main(lambda: self._store(teacher, result))
            self._keep(teacher, result)
        result = processes.broadcast_from_main(lambda: self.run.read_json(f"{self.name}.json"))
        if self.name == "teacher":
            self.callbacks.teacher(result)
        else:
            self.callbacks.note(f"{self.name}: test accuracy {result['accuracy']:.4f}")
        self._judge(result["accuracy"])
        processes.broadcast_parameters(teacher)
        # What is left of its training would take memory for nothing.
        teacher.zero_grad(set_to_none=True)
        return teacher.eval().requires_grad_(False)

    def phase(self, teacher: Teacher) -> Phase:
        """The teacher's training."""
        recipe = self.plan.recipe
        return Phase(
            name=self.name,
            model=teacher,
            objective=TeacherObjective(teacher, recipe.seed, self.table.label_smoothing),
            networks={self.name: teacher},
            config=self.table,
            images=self.train,
            batch_size=recipe.data.batch_size,
            augmentation=make_augmentation(recipe, self.plan.data),
            parallel=Parallel(recipe),
            evaluate=partial(self._evaluate, teacher),
        )

    def _evaluate(self, teacher: Teacher) -> dict[str, float]:
        recipe = self.plan.recipe
        return evaluation(teacher, self.test, self.validation, batch_size=recipe.data.batch_size, seed=recipe.seed)

    def _untrained(self) -> Teacher:
        recipe = self.plan.recipe
        # A twin draws what a teacher of the same table draws: one is the other, and the cache knows it again.
        with keyed(recipe.seed, "teacher"):
            teacher = make_teacher(recipe, self.plan.data, self.name)
        return teacher.to(self.plan.device)

    def _from_run(self, teacher: Teacher) -> bool:
        """Load what this run has used before it was interrupted."""
        weights = self.run / f"{self.name}.safetensors"
        if not weights.is_file() or "accuracy" not in self.run.read_json(f"{self.name}.json"):
            return False
        load_into(teacher.network, weights, self._description(teacher))
        return True

    def _from_checkpoint(self, teacher: Teacher, path: Path) -> dict[str, float]:
        expected = self._description(teacher)
        notes = processes.broadcast_from_main(lambda: load_into(teacher.network, path, expected))
        processes.broadcast_parameters(teacher)
        self.callbacks.note(f"{self.name}: {self.table.architecture} from {path}")
        for note in notes:
            self.callbacks.note(f"{self.name}: {note}")
        return self._measured(teacher)

    def _as_built(self, teacher: Teacher) -> dict[str, float]:
        """Take it with the weights that its own code loaded."""
        self.callbacks.note(
            f"{self.name}: {self.table.architecture} with the weights that its own code gives it; all of them "
            "are frozen, so that it is not trained"
        )
        processes.broadcast_parameters(teacher)
        return self._measured(teacher)

    def _measured(self, teacher: Teacher) -> dict[str, float]:
        """The result of a teacher that is not trained."""
        return {**self._evaluate(teacher.eval()), "seconds": 0.0}

    def _judge(self, accuracy: float) -> None:
        """Say that a teacher cannot be told from chance, and refuse one that is worse than the recipe asks for.

        Chance is one class in K; near it is less than three standard errors of so many images above.

        Raises:
            UserError: its accuracy is below its `min_accuracy`.
        """
        key, images = f"{self.name}.min_accuracy", len(self.test)
        if accuracy < (least := self.table.min_accuracy):
            fix = f"train it longer, give another, or lower {key}"
            message = f"the {self.name}'s accuracy is {accuracy:.4f} on {images} test images, below {least:g}: {fix}"
            raise UserError(self.plan.recipe.line(key, message))
        if near_chance(accuracy, len(self.plan.data.classes), images):
            self.callbacks.note(
                f"{self.name}: its accuracy, {accuracy:.4f} on {images} test images, is near chance "
                f"(1/{len(self.plan.data.classes)}): it teaches next to nothing. Was it trained on these classes, in "
                f"this order, and with this mean and std? Set {key} to refuse such a network"
            )

    @cached_property
    def cache(self) -> RunFolder:
        """The folder of this teacher among the trained ones."""
        key = teacher_key(self.plan.recipe, self.plan.device, self.train, self.name)
        return RunFolder(CACHE / f"{self.table.architecture}-{key}")

    def _from_cache(self, teacher: Teacher) -> dict[str, float] | None:
        """Load it from the cache; None where it is not there, or damaged."""
        result = processes.broadcast_from_main(lambda: self._read_cache(teacher))
        if result is None:
            return None
        found = f"{self.table.architecture} from the cache ({self.cache.path})"
        self.callbacks.note(f"{self.name}: {found}, not trained again")
        if result.pop("test", None) != self.test.fingerprint():
            self.callbacks.note(
                f"{self.name}: its accuracy in the cache is of other test images, and is measured again"
            )
            processes.broadcast_parameters(teacher)
            result = {**self._measured(teacher), "seconds": result["seconds"]}
        return result

    def _read_cache(self, teacher: Teacher) -> dict[str, float] | None:
        cache = self.cache
        if not (cache / "teacher.safetensors").is_file():
            return None
        try:
            metrics, result = cache.metrics(), cache.read_json("teacher.json")
            if "accuracy" not in result:
                raise UserError(f"{cache / 'teacher.json'} is missing or damaged")
            load_into(teacher.network, cache / "teacher.safetensors", self._description(teacher))
        except UserError as error:
            self.callbacks.note(f"the cached {self.name} cannot be used and is trained again: {error}")
            return None
        if result.get("test") == self.test.fingerprint():
            others = [epoch for epoch in self.run.metrics() if epoch["phase"] != self.name]
            self.run.write_metrics([*others, *({**epoch, "phase": self.name} for epoch in metrics)])
        return result

    def _store(self, teacher: Teacher, result: dict[str, float]) -> None:
        """Put a trained teacher into the cache."""
        cache = self.cache
        try:
            cache.path.mkdir(parents=True, exist_ok=True)
            with lock.locked(cache.path):
                remove_partial(cache.path, WRITTEN)
                mine = [epoch for epoch in self.run.metrics() if epoch["phase"] == self.name]
                cache.write_metrics([{**epoch, "phase": "teacher"} for epoch in mine])
                # Its accuracy is on these test images, which do not define it.
                cache.write_json("teacher.json", {**result, "test": self.test.fingerprint()})
                # The weights come last: their presence says that the cached teacher is whole.
                save_weights(cache / "teacher.safetensors", teacher.network.state_dict(), self._description(teacher))
        except (OSError, MachineError, UserError) as error:
            # The run has its teacher; only the next one will have to train it again, if no other run is caching it.
            self.callbacks.note(f"the {self.name} is not cached: {error}")

    def _keep(self, teacher: Teacher, result: dict[str, float]) -> None:
        """Put it into the run folder."""
        self.run.write_json(f"{self.name}.json", result)
        save_weights(self.run / f"{self.name}.safetensors", teacher.network.state_dict(), self._description(teacher))

    def _description(self, teacher: Teacher) -> dict[str, Any]:
        return describe_teacher(self.plan.recipe, self.plan.data, teacher.network, self.name)


def near_chance(accuracy: float, classes: int, images: int) -> bool:
    """Whether an accuracy is less than three standard errors above guessing one of so many classes; never 1.0."""
    chance = 1 / classes
    return accuracy < min(1.0, chance + 3 * math.sqrt(chance * (1 - chance) / images))


def teacher_key(recipe: Recipe, device: torch.device, train: Images | Streamed, name: str = "teacher") -> str:
    """What defines a trained teacher, as twelve hexadecimal digits: the same key, the same weights."""
    data = recipe.data.model_dump(exclude={"root", "download", "residence", "workers"})
    teacher = getattr(recipe, name).model_dump(exclude={"checkpoint", "min_accuracy", "stages"})
    # Not where the images lie, but what they are.
    images = train.fingerprint()
    machine = [device.type, pick_precision(recipe, device), recipe.deterministic]
    defines = [__version__, recipe.seed, machine, data, images, teacher, recipe.plugin_versions()]
    return hashlib.sha256(json.dumps(defines, sort_keys=True).encode()).hexdigest()[:12]
