"""The training loop, for teacher and student alike.

What is rare stands with the collaborators, each of which does nothing unless asked for: several processes and a batch
in parts (parallel.py), half precision (precision.py), numbers that are not finite (nonfinite.py), saving and resuming
(checkpoints.py), signals (stop.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from lasnn import processes
from lasnn.callback import Callback
from lasnn.data import Augmentation, Batches, BatchFailed, Images, Streamed
from lasnn.recipe.schema import Training
from lasnn.run import RunFolder
from lasnn.training.checkpoints import Checkpoints, TrainingState
from lasnn.training.nonfinite import (
    NonFiniteMonitor,
    check_weights,
    failure,
    first_nonfinite_layers,
    name_anomaly,
)
from lasnn.training.objective import Objective
from lasnn.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from lasnn.training.parallel import Batch, Parallel
from lasnn.training.precision import Precision
from lasnn.training.stop import Stopped, StopRequest

# Steps between two reports of progress within an epoch.
REPORT_EVERY = 20


@dataclass(frozen=True)
class Phase:
    """What is trained, on what, and how.

    Args:
        name: "teacher" or "student".
        model: what is trained.
        objective: what it minimises.
        networks: all that run in the objective, by name.
        config: epochs, optimiser and schedule.
        images: the training images, on the device or streamed to it.
        batch_size: images a step, over all processes.
        augmentation: of the images.
        parallel: says which of a batch's images are this process's.
        evaluate: the model's accuracy on the test images.
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
    evaluate: Callable[[], float]

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return ceil(len(self.images) / self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """An epoch's batches, from number `start` on."""
        options = {"seed": self.objective.seed, "epoch": epoch, "augment": self.augmentation, "start": start}
        batches = Batches(self.images, self.batch_size, share=self.parallel.local_images, **options)
        for step, (images, targets) in enumerate(batches, start=start):
            yield Batch(epoch, step, images, targets, batches.images_in(step))


class Trainer:
    """Trains a phase's model, from the beginning or from where a saved state says.

    Args:
        precision, parallel, monitor, checkpoints, stop: the collaborators.
        run: gets the metrics.
        callbacks: are told of the progress.
    """

    def __init__(
        self,
        *,
        precision: Precision,
        parallel: Parallel,
        monitor: NonFiniteMonitor,
        checkpoints: Checkpoints,
        stop: StopRequest,
        run: RunFolder,
        callbacks: Callback,
    ):
        self.precision = precision
        self.parallel = parallel
        self.monitor = monitor
        self.checkpoints = checkpoints
        self.stop = stop
        self.run = run
        self.callbacks = callbacks

    def fit(self, phase: Phase) -> dict[str, float]:
        """Train; returns the last accuracy, the seconds and the throughput."""
        # A fused optimiser can leave a step out on the device, as a scaler does itself; PyTorch's fused SGD must not go
        # on after that, for its momentum would begin with what lies in unused memory.
        optimizer = make_optimizer(phase.model, phase.config, fused=not self.precision.scales)
        forward = self.parallel.wrap(phase.model, phase.objective)
        state = TrainingState(phase.name, tuple(phase.objective.weights))
        self.resume(phase, optimizer, state)
        for epoch in range(state.epoch, phase.config.epochs):
            self.fit_epoch(phase, forward, optimizer, state, epoch)
            metrics = state.finish_epoch(
                self.evaluate(phase, epoch), len(phase.images), optimizer.param_groups[0]["lr"]
            )
            self.run.add_metrics(metrics)
            self.save(phase, optimizer, state)
            self.callbacks.end_epoch(metrics)
            self.stop_if_asked()
        return state.result()

    def fit_epoch(
        self,
        phase: Phase,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainingState,
        epoch: int,
    ) -> None:
        """The steps of an epoch that are left."""
        phase.model.train()
        self.monitor.begin_epoch()
        self.callbacks.epoch(phase.name, epoch, phase.config.epochs, phase.steps)
        state.begin_epoch(epoch)
        for batch in self.saving_on_failure(phase.batches(epoch, start=state.step), phase, optimizer, state):
            set_learning_rate(optimizer, learning_rate(phase.config, epoch * phase.steps + batch.step, phase.steps))
            terms = self.train_step(phase, forward, optimizer, batch)
            state.update(terms, batch.step, batch.total)
            if self.monitor.due(batch.step, phase.steps):
                self.check(phase, forward, batch.epoch, batch.step)
            self.report(phase, state, batch.step)
            self.stop_or_save(phase, forward, optimizer, state, batch)

    def train_step(
        self, phase: Phase, forward: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
    ) -> dict[str, Tensor]:
        """One update of the weights; returns the sums of the terms over the batch's images, on the device."""
        optimizer.zero_grad(set_to_none=True)
        terms = self.parallel.sum(self.forward_backward(phase, forward, batch))
        self.monitor.update(batch.step, terms, phase.model)
        self.precision.step(optimizer, phase.model, phase.config.clip_norm, self.monitor.found_inf())
        return terms

    def forward_backward(self, phase: Phase, forward: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The gradients of the batch's mean loss; returns the sums of the terms over this process's images."""
        sums: dict[str, Tensor] = dict.fromkeys([*phase.objective.weights, "loss"], 0.0)
        for part in self.parallel.slices(batch):
            with self.precision.autocast(), self.parallel.gradient_exchange(forward, part):
                terms = forward(part.images, part.targets, part.epoch, part.step, first=part.first, total=part.total)
            sums = {name: sums[name] + term.detach().double() * len(part.targets) for name, term in terms.items()}
            self.before_backward(phase, forward, batch, sums)
            self.precision.backward(terms["loss"] * part.weight)
        return sums

    def before_backward(self, phase: Phase, forward: nn.Module, batch: Batch, sums: dict[str, Tensor]) -> None:
        """Between the passes of a step; see AnomalyTrainer."""

    def resume(self, phase: Phase, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Take up the saved state of this phase, if there is one."""
        epochs, steps = phase.config.epochs, phase.steps
        if self.checkpoints.restore(state, phase.model, optimizer, self.precision, epochs, steps):
            self.callbacks.note(f"resuming the {phase.name} at epoch {state.epoch + 1}, step {state.step + 1}")
        # What a stopped run logged beyond its last save is done again, and logged again.
        done = [line for line in self.run.metrics() if line["phase"] != phase.name or line["epoch"] <= state.epoch]
        self.run.write_metrics(done)

    def evaluate(self, phase: Phase, epoch: int) -> float:
        """The model's accuracy on the test images; of weights that are finite."""
        check_weights(phase.model, phase.name, epoch, phase.steps, self.checkpoints.hint)
        phase.model.eval()
        return phase.evaluate()

    def report(self, phase: Phase, state: TrainingState, step: int) -> None:
        """Tell the callbacks, from time to time."""
        if step % REPORT_EVERY == 0 or step + 1 == phase.steps:
            self.callbacks.step(step, state.images_per_second, state.sums, phase.objective.weights)

    def check(self, phase: Phase, forward: nn.Module, epoch: int, step: int) -> None:
        """Stop a training whose numbers are no longer finite, and name the layer where that began.

        Raises:
            MachineError: they are not. The weights are those from before the first such step.
        """
        found = self.monitor.first_failure()
        if found is None:
            self.precision.check_scale(phase.name, epoch, step, self.checkpoints.hint)
            return
        step, names = found
        phase.model.train()
        batch = next(phase.batches(epoch, start=step))
        with first_nonfinite_layers(phase.networks) as layers, torch.autograd.set_detect_anomaly(False):
            for part in self.parallel.slices(batch):
                with self.precision.autocast():
                    terms = forward(part.images, part.targets, epoch, step, first=part.first, total=part.total)
                broken = "forward" in layers or not terms["loss"].isfinite()
                if processes.all_reduce_max(broken) == [0]:
                    terms["loss"].backward()
        for found_there in processes.all_gather(dict(layers)):
            layers = found_there | layers
        raise failure(phase.name, epoch, step, names, layers, self.checkpoints.hint)

    def save(self, phase: Phase, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Save the full state; of weights that are finite."""
        check_weights(phase.model, phase.name, state.epoch, state.step, self.checkpoints.hint)
        self.checkpoints.save(state, phase.model, optimizer, self.precision)

    def stop_if_asked(self) -> None:
        """Raises Stopped where a signal has come to any process."""
        if signum := self.stop.agree()[0]:
            raise Stopped(signum, self.checkpoints.path)

    def stop_or_save(
        self, phase: Phase, forward: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState, batch: Batch
    ) -> None:
        """Save where it is time to, or where a signal has come: in all processes after the same step."""
        signum, due = self.stop.agree(self.checkpoints.due())
        if signum or due:
            self.check(phase, forward, batch.epoch, batch.step)
            self.save(phase, optimizer, state)
        if signum:
            raise Stopped(signum, self.checkpoints.path)

    def saving_on_failure(
        self, batches: Iterator[Batch], phase: Phase, optimizer: torch.optim.Optimizer, state: TrainingState
    ) -> Iterator[Batch]:
        """The batches; where one cannot be had any more, the state after the step before it is saved."""
        try:
            yield from batches
        except BatchFailed:
            if processes.world_size() == 1:
                self.save(phase, optimizer, state)
                self.stop_if_asked()
            raise


class AnomalyTrainer(Trainer):
    """Looks at every pass of every step, and names the operation whose gradient is the first not to be a number."""

    def train_step(
        self, phase: Phase, forward: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
    ) -> dict[str, Tensor]:
        with name_anomaly(phase.name, batch.epoch, batch.step):
            return super().train_step(phase, forward, optimizer, batch)

    def before_backward(self, phase: Phase, forward: nn.Module, batch: Batch, sums: dict[str, Tensor]) -> None:
        # The gradient is not there yet.
        self.monitor.update(batch.step, self.parallel.sum({**sums, "gradient": torch.zeros_like(sums["loss"])}))
        self.check(phase, forward, batch.epoch, batch.step)


def make_trainer(
    objective: Objective,
    *,
    precision: Precision,
    parallel: Parallel,
    checkpoints: Checkpoints,
    stop: StopRequest,
    run: RunFolder,
    callbacks: Callback,
    detect_anomaly: bool = False,
) -> Trainer:
    """The trainer of one phase, with the monitor that its precision and device allow."""
    # On a GPU looking at what was found waits for it, as fp16's scaler does at each step anyway.
    rarely = precision.device.type == "cuda" and not precision.scales and not detect_anomaly
    monitor = NonFiniteMonitor(
        objective.weights,
        precision.device,
        watches_gradient=not precision.scales,
        every=20 if rarely else 1,
    )
    kind = AnomalyTrainer if detect_anomaly else Trainer
    return kind(
        precision=precision,
        parallel=parallel,
        monitor=monitor,
        checkpoints=checkpoints,
        stop=stop,
        run=run,
        callbacks=callbacks,
    )
