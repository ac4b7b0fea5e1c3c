"""The progress of a run in a notebook: one table that grows, by IPython's own display."""

import html
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lasnn.callback import Callback
from lasnn.console import ConsoleProgress, RunProgress, to_stdout

# Seconds between two redrawings within an epoch; a browser has to keep up.
PAUSE = 0.5
HEAD = ("phase", "epoch", "loss", "terms", "accuracy", "images/s")


class Shown(Protocol):
    """A display that can be changed."""

    def update(self, shown: Any) -> None:
        """Show something else in its place."""


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, where IPython is loaded already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and getattr(shell, "kernel", None) is not None


def default_progress() -> Callback:
    """A table in a notebook; elsewhere a bar on a terminal, and plain lines where standard output is piped."""
    if not in_notebook():
        return ConsoleProgress(to_stdout())
    from IPython.display import display

    return NotebookProgress(lambda shown: display(shown, display_id=True))


class NotebookProgress(RunProgress):
    """A bar and a line for the epoch in progress, a table of the epochs, and what else was said.

    Args:
        display: shows an object that has `_repr_html_`, and returns what `update` changes.
    """

    def __init__(self, display: Callable[[Any], Shown]):
        super().__init__()
        self._display = display
        self._shown_at: Shown | None = None
        self._drawn = 0.0
        self.lines: list[str] = []
        self.rows: list[tuple[str, ...]] = []
        self.now: tuple[str, float] | None = None

    def say(self, text: str) -> None:
        self.lines.append(text)
        self._draw()

    def begin_live(self) -> bool:
        return True

    def live(self, text: str, share: float) -> None:
        self.now = (text, share)
        if time.perf_counter() - self._drawn >= PAUSE:
            self._draw()

    def epoch_done(self, metrics: Mapping[str, Any], epochs: int, left: str) -> None:
        terms = "  ".join(f"{name} {value:.4g}" for name, value in metrics["losses"].items())
        self.rows.append(
            (
                metrics["phase"],
                f"{metrics['epoch']}/{epochs}",
                f"{metrics['loss']:.4f}",
                terms,
                f"{metrics['accuracy']:.4f}",
                f"{metrics['images_per_second']:.0f}",
            )
        )
        self.now = (f"{metrics['phase']} epoch {metrics['epoch']}/{epochs}  {left}", metrics["epoch"] / epochs)
        self._draw()

    def close(self) -> None:
        """Leave the table; nothing is in progress any more."""
        self.now = None
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        if self._shown_at is None:
            self._shown_at = self._display(self)
        else:
            self._shown_at.update(self)

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        parts = [f"<div>{html.escape(line)}</div>" for line in self.lines]
        if self.rows:
            body = "".join(row(cells, "td") for cells in self.rows)
            parts.append(f"<table><thead>{row(HEAD, 'th')}</thead><tbody>{body}</tbody></table>")
        if self.now:
            text, share = self.now
            bar = f'<progress value="{share:.4f}" max="1"></progress>'
            parts.append(f"<div>{bar} {html.escape(text)}</div>")
        return "\n".join(parts)

    def __repr__(self) -> str:
        """The same as plain lines, for readers without HTML."""
        rows = ["  ".join(cells) for cells in self.rows]
        return "\n".join([*self.lines, *rows, *([self.now[0]] if self.now else [])])
