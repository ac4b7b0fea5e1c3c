"""The training loop, for teacher and student alike.

    fit -> fit_epoch -> train_step -> forward_backward -> the objective

What is rare has its own file, and does nothing in a plain run: several processes and gradient accumulation
(parallel.py), half precision (precision.py), averaged weights (average.py), numbers that are not finite (nonfinite.py,
anomaly.py), saving and resuming (checkpoints.py), signals (stop.py).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from lasnn import processes
from lasnn.callback import Callback
from lasnn.data import Augmentation, Batches, BatchFailed, Images, Streamed
from lasnn.errors import MachineError
from lasnn.recipe.schema import Training
from lasnn.registry import translate_own_errors
from lasnn.run import RunFolder
from lasnn.training.average import Average
from lasnn.training.checkpoints import Buffers, Checkpoints
from lasnn.training.nonfinite import NonFiniteMonitor, check_weights, find_layers, nonfinite_error
from lasnn.training.objective import Objective
from lasnn.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from lasnn.training.parallel import Batch, BatchSlice, Parallel
from lasnn.training.precision import Precision
from lasnn.training.progress import Progress
from lasnn.training.stop import Stopped, StopRequest

# Steps between two reports of progress within an epoch.
REPORT_EVERY = 20


@dataclass(frozen=True)
class Phase:
    """What is trained, on what, and how.

    Args:
        name: "teacher", "start" or "student".
        model: what is trained.
        objective: what it minimises; its own parameters, those of the losses, are trained with the model.
        networks: all that run in the objective, by name: where a number that is not finite is looked for.
        config: epochs, optimiser and schedule.
        images: the training images, on the device or streamed to it.
        batch_size: images a step, over all processes.
        augmentation: of the images.
        parallel: splits each batch.
        evaluate: measures the model after an epoch: its `accuracy` on the test images, and what else there is.
        diagnose: what else is logged after an epoch, given its number; it leaves the training as it was.
    """

    name: str
    model: nn.Module
    objective: Objective
    networks: Mapping[str, nn.Module]
    config: Training
    images: Images | Streamed
    batch_size: int
    augmentation: Augmentation
    parallel: Parallel
    evaluate: Callable[[], dict[str, float]]
    diagnose: Callable[[int], dict[str, Any]] = lambda epoch: {}

    @property
    def steps_per_epoch(self) -> int:
        return ceil(len(self.images) / self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's batches, from number `start` on."""
        options = {"seed": self.objective.seed, "epoch": epoch, "augment": self.augmentation, "start": start}
        batches = Batches(self.images, self.batch_size, share=self.parallel.local_images, **options)
        for step, (images, targets) in enumerate(batches, start=start):
            yield Batch(epoch, step, images, targets, batches.images_in(step))

    def learning_rate(self, batch: Batch) -> float:
        """The schedule's, at a batch's step."""
        return learning_rate(self.config, batch.epoch * self.steps_per_epoch + batch.step, self.steps_per_epoch)


@dataclass(frozen=True)
class TrainingContext:
    """What the phases of a run share.

    Args:
        precision: "fp32", "bf16" or "fp16".
        device: where the training runs.
        checkpoints: saves the state, and has the one to resume from.
        stop: whether a signal asks for the end.
        run: gets the metrics.
        callbacks: see the progress.
    """

    precision: str
    device: torch.device
    checkpoints: Checkpoints
    stop: StopRequest
    run: RunFolder
    callbacks: Callback


class Trainer:
    """Trains one phase's model, from the beginning or from its saved state."""

    checks_every_step = False

    def __init__(self, phase: Phase, context: TrainingContext):
        self.phase = phase
        self.parallel = phase.parallel
        self.checkpoints = context.checkpoints
        self.stop = context.stop
        self.run = context.run
        self.callbacks = context.callbacks
        self.precision = Precision(context.precision, context.device)
        # The losses may have learnt parts.
        self.learnt = nn.ModuleList([phase.model, phase.objective])
        self.monitor = NonFiniteMonitor.of(phase.objective, self.precision, every_step=self.checks_every_step)
        # Where a number is not finite, a fused optimiser skips its step on the device. Not so in fp16: its scaler skips
        # steps too, and goes on, but PyTorch's fused SGD would then read the momentum that its first step never wrote.
        self.optimizer = make_optimizer(self.learnt, phase.config, fused=not self.precision.uses_scaler)
        self.average = Average(phase.model, phase.config.ema)
        self.objective = self.parallel.distribute(phase.model, phase.objective)
        self.progress = Progress(phase.name, tuple(phase.objective.weights))
        self.buffers = Buffers(self.learnt)

    def fit(self) -> dict[str, float]:
        """Train; returns what was measured last, the seconds and the throughput."""
        self.resume()
        for epoch in range(self.progress.epoch, self.phase.config.epochs):
            with self.saved_at_failure():
                self.fit_epoch(epoch)
                measured = self.evaluate() | self.phase.diagnose(epoch)
            metrics = self.progress.finish_epoch(measured, lr=self.optimizer.param_groups[0]["lr"])
            self.run.add_metrics(metrics)
            self.save()
            self.callbacks.end_epoch(metrics)
            self.stop_if_asked()
        self.average.adopt()
        return self.progress.result()

    def fit_epoch(self, epoch: int) -> None:
        """Run the epoch's remaining steps."""
        self.learnt.train()
        self.callbacks.epoch(self.phase.name, epoch, self.phase.config.epochs, self.phase.steps_per_epoch)
        self.monitor.begin_epoch()
        self.progress.begin_epoch(epoch)
        for batch in self.phase.batches(epoch, start=self.progress.step):
            set_learning_rate(self.optimizer, self.phase.learning_rate(batch))
            with translate_own_errors(self.progress.position), self.buffers.restored_at_failure():
                sums = self.train_step(batch)
            self.progress.update(sums, batch.step, batch.total)
            self.after_step(batch)

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the weights; returns the sums of the terms over the batch's images, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.parallel.sum(self.forward_backward(batch))
        self.monitor.update(batch.step, sums, self.learnt)
        self.precision.step(self.optimizer, self.learnt, self.phase.config.clip_norm, self.monitor.found_inf())
        self.average.update()
        return sums

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """The gradients of the batch's mean loss; returns the sums of the terms over this process's images."""
        sums: dict[str, Tensor] = dict.fromkeys([*self.phase.objective.weights, "loss"], 0.0)
        for batch_slice in self.parallel.slices(batch):
            terms = self.forward(batch_slice)
            count = len(batch_slice.targets)
            sums = {name: sums[name] + term.detach().double() * count for name, term in terms.items()}
            self.backward(terms, batch_slice)
        return sums

    def forward(self, batch_slice: BatchSlice) -> dict[str, Tensor]:
        """The terms of the loss, and "loss": means over the slice."""
        with self.precision.autocast(), self.parallel.gradient_exchange(self.objective, batch_slice):
            return self.objective(*batch_slice.inputs, **batch_slice.position)

    def backward(self, terms: dict[str, Tensor], batch_slice: BatchSlice) -> None:
        """Add the slice's gradients to those of the batch."""
        self.precision.backward(terms["loss"] * batch_slice.share)

    def after_step(self, batch: Batch) -> None:
        """Check the numbers, report, save and stop, each where it is due."""
        progress, steps = self.progress, self.phase.steps_per_epoch
        if self.monitor.due(batch.step, steps):
            self.raise_if_nonfinite(batch)
        if batch.step % REPORT_EVERY == 0 or batch.step + 1 == steps:
            self.callbacks.step(batch.step, progress.images_per_second, progress.sums, self.phase.objective.weights)
        # In all processes after the same step.
        signum, save = self.stop.agree(self.checkpoints.due())
        if signum or save:
            self.raise_if_nonfinite(batch)
            self.save()
        if signum:
            raise Stopped(signum, self.checkpoints.path)

    @contextmanager
    def saved_at_failure(self) -> Iterator[None]:
        """If the block fails, by a picture that cannot be read or an error in a user's loss, save the state after the
        last whole step.
        """
        try:
            yield
        except (Stopped, MachineError) as error:
            # Where numbers are not finite, or the disk is full, the last good state stays.
            if isinstance(error, BatchFailed):
                self.save_alone()
            raise
        except Exception:
            self.save_alone()
            raise

    def save_alone(self) -> None:
        """Save after a failure that other processes need not have met: they would not come to the save."""
        if processes.world_size() == 1:
            self.save()
            # A signal to all of a run's processes may have ended those that read its images.
            self.stop_if_asked()

    def resume(self) -> None:
        """Continue from the saved state of this phase, if there is one."""
        progress, steps = self.progress, self.phase.steps_per_epoch
        states = (progress, *self.learnt, self.optimizer, self.precision, self.average)
        if self.checkpoints.restore(*states, epochs=self.phase.config.epochs, steps=steps):
            if progress.epoch == self.phase.config.epochs:
                where = "after its last epoch"
            elif progress.step == steps:
                where = f"at the evaluation of epoch {progress.epoch + 1}"
            else:
                where = f"at epoch {progress.epoch + 1}, step {progress.step + 1}"
            self.callbacks.note(f"resuming the {progress.phase} {where}")
        # Epochs that a stopped run logged after its last save are run and logged again; metrics count them from 1.
        done = [
            line for line in self.run.metrics() if line["phase"] != progress.phase or line["epoch"] <= progress.epoch
        ]
        self.run.write_metrics(done)

    def evaluate(self) -> dict[str, float]:
        """Measure the model."""
        self.check_weights()
        self.phase.model.eval()
        where = f"{self.phase.name} epoch {self.progress.epoch + 1}, evaluation"
        with self.average.applied(), translate_own_errors(lambda: where):
            return self.phase.evaluate()

    def save(self) -> None:
        """Save the full state."""
        self.check_weights()
        self.checkpoints.save(self.progress, *self.learnt, self.optimizer, self.precision, self.average)

    def stop_if_asked(self) -> None:
        """Raises Stopped where a signal has come to any process."""
        if signum := self.stop.agree()[0]:
            raise Stopped(signum, self.checkpoints.path)

    def check_weights(self) -> None:
        """Check that the weights are finite: others are neither saved nor evaluated.

        Raises:
            MachineError: they are not.
        """
        check_weights(self.learnt, self.progress, self.checkpoints.hint)

    def raise_if_nonfinite(self, batch: Batch) -> None:
        """Stop a training whose numbers are no longer finite, and name the layer where that began.

        Raises:
            MachineError: they are not. The weights are those from before the first such step.
        """
        found = self.monitor.first_failure()
        if found is None:
            self.precision.check_scale(self.phase.name, batch.epoch, batch.step, self.checkpoints.hint)
            return
        step, names = found
        self.learnt.train()
        failed = next(self.phase.batches(batch.epoch, start=step))
        layers = find_layers(self.phase.networks, self.forward, self.parallel.slices(failed))
        raise nonfinite_error(self.phase.name, batch.epoch, step, names, layers, self.checkpoints.hint)
