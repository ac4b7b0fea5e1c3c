"""Signals that ask a run to stop after a whole step."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lasnn import processes
from lasnn.errors import Said


class Stopped(Said):
    """A signal ended the run after a whole step; its state is saved in `state`."""

    def __init__(self, signum: int, state: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name}; the state is in {state}")
        self.signum = signum
        self.run = state.parent
        # Python and notebooks show it behind the message; the command says it in its own words.
        self.add_note(f"go on with: distill({str(self.run / 'recipe.toml')!r}, {str(self.run)!r}, resume=True)")


class StopRequest:
    """Whether a signal has asked for the end of the run."""

    def __init__(self) -> None:
        self.signum = 0

    def agree(self, save_due: bool = False) -> tuple[int, bool]:
        """The signal that came to any process (0: none), and whether a save is due in any: the same in all of them."""
        signum, save = processes.all_reduce_max(self.signum, save_due)
        return signum, bool(save)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM only ask for a stop after the current step; a second one kills at once.

    In a notebook's kernel a second one interrupts the step, and what else the notebook holds stays: the last save is as
    good as ever. One that came after the last step is delivered again behind the block, so that it also ends what would
    come next.
    """
    request = StopRequest()

    def handle(signum: int, _: object) -> None:
        if request.signum and "ipykernel" in sys.modules:
            raise KeyboardInterrupt
        if request.signum:
            os._exit(128 + signum)
        request.signum = signum

    if threading.current_thread() is not threading.main_thread():
        # Python delivers signals to the main thread alone; whoever runs this in another handles them there.
        yield request
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if request.signum:
        signal.raise_signal(request.signum)
