"""The two kinds of failure that end a command in one line instead of a traceback, and how names are suggested."""

from collections.abc import Iterable
from difflib import get_close_matches


class Said(Exception):
    """A failure that its own words explain: a notebook shows them, not the way to the line that raised it."""

    def _render_traceback_(self) -> list[str]:
        # IPython asks for it.
        return [f"{type(self).__name__}: {self}", *getattr(self, "__notes__", ())]


class UserError(Said):
    """What the user gave cannot work (exit code 2). `problems` holds one line each; all are shown."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class MachineError(Said):
    """The input is right but the work failed: a full or read-only disk, a training that diverged (exit code 1)."""


# How PyTorch says it where it has no exception for it: its allocator on a CPU (on Windows too), libraries on a GPU.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> str | None:
    """The line for a machine whose memory is too small, with what helps; None where the error is another."""
    reason = str(error).partition("\n")[0]
    # torch.OutOfMemoryError is known by its name, so that torch need not be imported.
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(said in reason for said in OUT_OF_MEMORY))
    ):
        return None
    return (
        f"out of memory ({reason or 'of the machine'}). What helps: data.accumulate = 2 computes the batch in parts "
        '(or a lower data.batch_size); distill.time_chunk = 4 computes few steps at once; precision = "bf16" takes '
        "half the space. lasnn distill --dry-run says what a recipe needs"
    )


def not_read(path: object, error: OSError) -> UserError | MachineError:
    """The error for a file that cannot be read: the user's where it is not there, no file, or not theirs; otherwise
    the machine's.
    """
    users = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError)
    return (UserError if users else MachineError)(f"{path}: cannot be read ({error.strerror})")


def not_finite(what: str) -> MachineError:
    """The error for activations, or spikes, of a training that diverged."""
    return MachineError(f"{what} are not finite numbers: its training diverged; train it again at a lower lr")


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The line for a name that is not known: the nearest right one and all the choices."""
    known = sorted(known)
    near = get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {kind} {name!r}{hint} known: {', '.join(known) or 'none'}"


def printable(text: str, longest: int = 1500) -> str:
    """Text from outside as part of a line: what does not print is escaped, the middle of what is too long left out."""
    text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return text if len(text) <= longest else f"{text[: longest * 2 // 3]} [...] {text[-longest // 3 :]}"
