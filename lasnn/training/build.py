"""A recipe's parts, for a training loop of one's own."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lasnn.callback import Callback
from lasnn.data import Batches, Images, Streamed, hold_out
from lasnn.errors import UserError
from lasnn.factory import load_data, make_augmentation
from lasnn.network.student import Student
from lasnn.network.teacher import Teacher
from lasnn.plan import Plan, check_batches, read_plan
from lasnn.random import deterministic
from lasnn.recipe.schema import Recipe
from lasnn.run import STATE_FILE, RunFolder
from lasnn.training.checkpoints import Checkpoints
from lasnn.training.objective import DistillationObjective
from lasnn.training.start import new_student
from lasnn.training.stop import StopRequest
from lasnn.training.teacher import TeacherSource
from lasnn.training.trainer import Phase, Trainer, TrainingContext


@dataclass(frozen=True)
class Built:
    """What a recipe names, on its device.

    `teacher` is frozen and in evaluation mode (None where the recipe has none), `student` is as it is before the first
    step. `objective(images, targets, epoch=0, step=0)` returns {"<term>": ..., "loss": ...}, scalars, where "loss" is
    the recipe's weighted sum; epoch and step key every random number, and the weights' schedules follow them. Its own
    parameters are those of its losses with learnt parts, which an optimiser must be given beside the student's.
    `validation` has the images that `data.validation` holds out of `train`, None where it holds out none.
    """

    plan: Plan
    teacher: Teacher | None
    student: Student
    objective: DistillationObjective
    train: Images | Streamed
    test: Images | Streamed
    validation: Images | Streamed | None = None

    def batches(self, epoch: int) -> Batches:
        """The augmented batches of an epoch: images [B, C, H, W] in [0, 1] and labels [B] (or probabilities [B, K])."""
        recipe = self.plan.recipe
        augmentation = make_augmentation(recipe, self.plan.data)
        return Batches(self.train, recipe.data.batch_size, seed=recipe.seed, epoch=epoch, augment=augmentation)


def build(recipe: str | Path | Recipe, *, overrides: Iterable[str] = (), train_teacher: bool = False) -> Built:
    """Make a recipe's parts; `distill` trains with the same.

        built = build("quickstart", train_teacher=True)
        learnt = [*built.student.parameters(), *built.objective.parameters()]
        optimizer = torch.optim.SGD(learnt, lr=0.1, momentum=0.9)
        for epoch in range(10):
            for step, (images, targets) in enumerate(built.batches(epoch)):
                optimizer.zero_grad()
                built.objective(images, targets, epoch, step)["loss"].backward()
                optimizer.step()

    Args:
        recipe: a TOML file, a shipped recipe's name, or a `Recipe`.
        overrides: `key.path=value` settings, as for `Recipe.load`.
        train_teacher: train the teacher, and the ANN of `[start]`, where it is neither a checkpoint nor among the
            cached ones, and cache it.

    Raises:
        UserError: something in the recipe or the data cannot work, or the teacher would have to be trained first.
        MachineError: the teacher's training broke.
    """
    plan = read_plan(recipe, overrides)
    whole, test, _ = load_data(plan.recipe, plan.data, plan.device)
    check_batches(plan)
    train, validation = hold_out(whole, plan.recipe.data.validation)
    with TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))

        def train_now(phase: Phase) -> dict[str, float]:
            if not train_teacher:
                raise UserError(
                    f"the {phase.name} of {plan.recipe.name} is not trained yet: build(..., train_teacher=True) trains "
                    f"and caches it; or set {phase.name}.checkpoint"
                )
            checkpoints = Checkpoints(run / STATE_FILE, plan.recipe.save_minutes)
            context = TrainingContext(plan.precision, plan.device, checkpoints, StopRequest(), run, Callback())
            with deterministic(plan.recipe.deterministic):
                return Trainer(phase, context).fit()

        anns = {
            name: TeacherSource(plan, train, test, run, Callback(), name, validation).get(train_now)
            for name in ("teacher", "start")
        }
    student, teacher = new_student(plan, anns, train)[0], anns["teacher"]
    objective = DistillationObjective(student, teacher, plan, len(train))
    return Built(plan, teacher, student, objective, train, test, validation)
