"""Standard output and error as they are found: any encoding, closed, or a pipe whose reader leaves early."""

import codecs
import os
import sys

# What lasnn prints beyond ASCII, for consoles that cannot show it.
PLAIN = {"µ": "u", "×": "x", "±": "+-"}


def _replace(error: UnicodeError) -> tuple[str, int]:
    """A plain character, or an escape, for one that an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode() for one in text), error.end


codecs.register_error("lasnn", _replace)


def prepare() -> None:
    """Let whatever is printed be printable, and a stream that is closed take what is written to it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # On the lowest descriptor that is free, which is the closed one: no file of a run may get that.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="lasnn")
    # A shell without a terminal may say 0, which would leave tables no room.
    if not os.environ.get("COLUMNS", "1").strip("0 "):
        del os.environ["COLUMNS"]


def flush() -> None:
    """Write what is still buffered, so that Python has nothing left to fail at when it ends.

    Raises:
        OSError: what a stream leads to is full, or its reader is gone; what was to be written is dropped.
    """
    failed = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            failed = failed or error
            _discard(stream)
    if failed is not None:
        raise failed


def _discard(stream) -> None:
    """Lead a stream that cannot be written to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
