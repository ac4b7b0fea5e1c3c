"""What is told of a run, and who listens: the lines of the command, TensorBoard, or a class of your own.

    from lasnn import Callback, callbacks

    @callbacks.register("my-log")
    class MyLog(Callback):
        '''One line that `lasnn list callbacks` shows.'''

        def end_epoch(self, metrics): ...

A callback is told, it does not steer: whatever it does, the weights are the same.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

from lasnn.errors import UserError
from lasnn.registry import Entry, callbacks, translate_errors


class Callback:
    """Told of a run as it goes; every method does nothing until a subclass says otherwise."""

    def start(self, plan: Any, run: Path) -> None:
        """The run begins, or goes on; `plan` is a `lasnn.plan.Plan`."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def teacher(self, result: Mapping[str, Any]) -> None:
        """The teacher is ready; `result` has its `accuracy`."""

    def epoch(self, phase: str, epoch: int, epochs: int, steps: int) -> None:
        """An epoch of the "teacher", the "start" or the "student" begins, or goes on; `epoch` counts from 0."""

    def step(self, step: int, rate: float, sums: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        """Some steps are done: images/s, and each term's sum over the epoch's images so far.

        The sums may be on a GPU: reading one waits for it.
        """

    def end_epoch(self, metrics: Mapping[str, Any]) -> None:
        """An epoch is done; `metrics` is its line of metrics.jsonl."""

    def finish(self, summary: Mapping[str, Any], run: Path) -> None:
        """The run is done; `summary` is its summary.json."""

    def close(self) -> None:
        """The last call, whatever ended the run."""


class CallbackList(Callback):
    """Tells several, in order; what a user's registered one raises becomes one line that names it."""

    def __init__(self, told: Iterable[Callback | str]):
        self.told: list[tuple[Callback, Entry | None]] = []
        for one in told:
            entry = callbacks[one] if isinstance(one, str) else None
            callback = callbacks.build(one) if isinstance(one, str) else one
            if not isinstance(callback, Callback):
                what = f"callback {one!r} ({entry.where})" if entry else repr(one)
                raise UserError(f"{what} must be a lasnn.Callback")
            self.told.append((callback, entry))

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback, entry in self.told:
            # Each has figures of its own, so that none can change what the run goes on with.
            own = [deepcopy(argument) if isinstance(argument, Mapping) else argument for argument in arguments]
            with translate_errors(entry) if entry else nullcontext():
                getattr(callback, event)(*own)

    def start(self, plan: Any, run: Path) -> None:
        self._tell("start", plan, run)

    def note(self, text: str) -> None:
        self._tell("note", text)

    def teacher(self, result: Mapping[str, Any]) -> None:
        self._tell("teacher", result)

    def epoch(self, phase: str, epoch: int, epochs: int, steps: int) -> None:
        self._tell("epoch", phase, epoch, epochs, steps)

    def step(self, step: int, rate: float, sums: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        self._tell("step", step, rate, sums, weights)

    def end_epoch(self, metrics: Mapping[str, Any]) -> None:
        self._tell("end_epoch", metrics)

    def finish(self, summary: Mapping[str, Any], run: Path) -> None:
        self._tell("finish", summary, run)

    def close(self) -> None:
        self._tell("close")


@callbacks.register("tensorboard")
class TensorBoard(Callback):
    """Loss terms, accuracy, learning rate and speed over the steps, in the run folder's `tensorboard`."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "callback 'tensorboard' needs the package of that name: pip install 'lasnn[tensorboard]'"
            ) from error
        self._make_writer = SummaryWriter
        self._writers: dict[str, Any] = {}

    def start(self, plan: Any, run: Path) -> None:
        self._plan, self._folder = plan, run / "tensorboard"

    def epoch(self, phase: str, epoch: int, epochs: int, steps: int) -> None:
        self._phase, self._before, self._steps = phase, epoch * steps, steps

    def step(self, step: int, rate: float, sums: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        data = self._plan.recipe.data
        seen = min((step + 1) * data.batch_size, self._plan.data.train_size - data.validation)
        means = {f"this epoch so far/{name}": float(sums[name]) / seen for name in ("loss", *weights)}
        self._write(self._before + step, {**means, "images per second": rate})

    def end_epoch(self, metrics: Mapping[str, Any]) -> None:
        terms = {f"epoch/{name}": value for name, value in metrics["losses"].items()}
        values = {"epoch/loss": metrics["loss"], **terms, "accuracy": metrics["accuracy"], "lr": metrics["lr"]}
        values |= {key.replace("_", " "): value for key, value in metrics.items() if key.startswith("validation_")}
        for what, found in metrics.get("diagnostics", {}).items():
            if isinstance(found, Mapping):
                known = {name: value for name, value in found.items() if value is not None}
                values |= {f"{what.replace('_', ' ')}/{name}": value for name, value in known.items()}
        # Beside the epoch's last step: the first step after it is where a resumed run writes anew.
        self._write(metrics["epoch"] * self._steps - 1, values)
        self._writers[self._phase].flush()

    def _write(self, at: int, values: Mapping[str, float]) -> None:
        if self._phase not in self._writers:
            # What a resumed run does again replaces what it wrote before.
            self._writers[self._phase] = self._make_writer(self._folder / self._phase, purge_step=at)
        for name, value in values.items():
            self._writers[self._phase].add_scalar(name, value, at)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
