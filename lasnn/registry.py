"""Named parts that a recipe can choose: architectures, teachers, encoders, neurons, losses, data sets, augmentations;
and the formats of `lasnn export`.

    from lasnn import architectures

    @architectures.register("my-net")
    def my_net(act, *, in_channels: int, num_classes: int, width: int = 32) -> Staged:
        '''One line that `lasnn list` shows.'''

What is registered is a function or a class. Its positional parameters are what lasnn hands it; its keyword-only
parameters are the options that a recipe may set, with their annotations as types and their defaults as defaults. A
subclass whose constructor hands `**options` on to the class above it has that one's options too.
"""

import inspect
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeVar

from lasnn.errors import MachineError, UserError, out_of_memory, unknown
from lasnn.option_types import describe_type

Part = TypeVar("Part", bound=Callable[..., Any])
REQUIRED = inspect.Parameter.empty
# A plugin that is a file is imported as a module of this name, its stem, and a digest of its content.
PLUGIN = "lasnn_plugin_"

log = logging.getLogger("lasnn")


@dataclass(frozen=True)
class Option:
    """A keyword of a registered part: its type and its default (`REQUIRED` where there is none)."""

    annotation: Any
    default: Any

    @property
    def type_name(self) -> str:
        return describe_type(self.annotation)


@dataclass(frozen=True)
class Entry:
    """One registered part.

    Args:
        inputs: what lasnn hands it, by name; of a loss that is a class, to its `forward`.
        options: what a recipe may set.
        sizes: what lasnn hands to the constructor of a loss that is a class, by name.
    """

    kind: str
    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    options: dict[str, Option]
    sizes: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def where(self) -> str:
        """File and line of the definition, for error messages."""
        try:
            return f"{inspect.getsourcefile(self.function)}:{inspect.getsourcelines(self.function)[1]}"
        except (OSError, TypeError):
            return self._module

    @property
    def own(self) -> bool:
        """Whether it is a user's, not lasnn's."""
        return not self._module.startswith("lasnn.")

    @property
    def _module(self) -> str:
        # Code that exec() ran without a __name__ has none.
        return self.function.__module__ or "no module"

    @property
    def said(self) -> str:
        """Kind and name for messages; of a user's part with the place of its code."""
        return f"{self.kind} {self.name!r}" + (f" ({self.where})" if self.own else "")

    @property
    def qualified_name(self) -> tuple[str, str] | None:
        """Module and name of the definition, the same for every version of a plugin's file; None where it has none."""
        name = getattr(self.function, "__qualname__", None)
        module = self._module
        module = module.rpartition("_")[0] if module.startswith(PLUGIN) else module
        return None if name is None else (module, name)

    def problems(self, given: dict[str, Any], supplied: tuple[str, ...] = ()) -> list[tuple[str, str]]:
        """What is wrong with the options `given` in a recipe, as (option, message) pairs.

        `supplied` names the keywords that lasnn passes itself; a recipe may not set them.
        """
        from pydantic import PydanticUserError, TypeAdapter, ValidationError

        found = []
        for name, value in given.items():
            option = None if name in supplied else self.options.get(name)
            if option is None:
                found.append((name, unknown(f"option of {self.name!r}", name, set(self.options) - set(supplied))))
                continue
            try:
                # JSON mode makes strict checking agree with what TOML can say (an integer is a valid float).
                TypeAdapter(option.annotation).validate_json(json.dumps(value, default=str), strict=True)
            except ValidationError:
                found.append((name, f"{value!r} is not valid; it takes {option.type_name}"))
            except PydanticUserError:
                found.append((name, f"a recipe cannot give it: it takes {option.type_name}; leave it out"))
        return found + self.missing({*given, *supplied})

    def missing(self, given: Iterable[str]) -> list[tuple[str, str]]:
        """The options that have no default and are not among the names `given`, as (option, message) pairs."""
        return [
            (name, f"missing; {self.name!r} needs it ({option.type_name})")
            for name, option in self.options.items()
            if option.default is REQUIRED and name not in given
        ]


class Registry:
    """The parts of one kind, by name.

    `home` is the module that registers the built-in ones; it is imported when the registry is first used, so that
    importing lasnn stays light. `check` is given a new part's entry, and returns the one that is kept.
    """

    def __init__(self, kind: str, home: str, check: Callable[[Entry], Entry] = lambda entry: entry):
        self.kind = kind
        self._home = home
        self._check = check
        self._entries: dict[str, Entry] = {}
        self._loaded = False
        self._chosen_beside: Registry | None = None

    def register(self, name: str) -> Callable[[Part], Part]:
        """Decorator that adds a function or class under `name`.

        A newer definition of the same qualified name (a notebook's cell run again, an edited plugin) takes the place of
        the older one, with a line on lasnn's log.

        Raises:
            ValueError: the name is another part's (architectures and teachers share theirs) or has a slash, or the
                signature is not one that this kind of part can have.
        """
        if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
            # Names become parts of file names, as those of cached teachers.
            raise ValueError(f"{name!r} cannot be a name: it needs letters, no slash, and no dot in front")
        # Built-in parts come first, so that it is the newcomer who is told that a name is taken.
        self._load()

        def add(function: Part) -> Part:
            entry = self._check(_entry(self.kind, name, function))
            replaces = self._replaced_by(entry)
            if replaces:
                log.warning("%s %r: the newer definition (%s) replaces the older", self.kind, name, entry.where)
            self.put(entry)
            return function

        return add

    def put(self, entry: Entry) -> None:
        """Let a part that was registered before count under its name again, as its plugin's version is used.

        Raises:
            ValueError: the name is another part's.
        """
        self._replaced_by(entry)
        self._entries[entry.name] = entry
        for record in _records:
            record.append((self, entry))

    def _replaced_by(self, entry: Entry) -> bool:
        """Whether there is an older version of a part."""
        older = self._entries.get(entry.name)
        if older and (older.qualified_name is None or older.qualified_name != entry.qualified_name):
            raise ValueError(f"{self.kind} {entry.name!r} is already registered ({older.where}); choose another name")
        beside = self._chosen_beside
        # lasnn's own names differ, and its homes are still being imported.
        if beside is not None and entry.own and entry.name in beside:
            place = beside[entry.name].where
            raise ValueError(
                f"{self.kind} {entry.name!r}: there is {beside.kind} {entry.name!r} ({place}), and a recipe's "
                "teacher.architecture could mean either; choose another name"
            )
        return older is not None

    def choose_beside(self, other: "Registry") -> None:
        """Let no name stand for a part of both, since a recipe's key takes either."""
        self._chosen_beside, other._chosen_beside = other, self

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def build(self, name: str, *inputs: Any, **options: Any) -> Any:
        """Call the part registered under `name`.

        Raises:
            UserError: the name is not known, an option that it needs is missing, or a part that is not lasnn's own
                fails.
        """
        entry = self[name]
        if missing := entry.missing(options):
            raise UserError(*(f"{option}: {message}" for option, message in missing))
        with translate_errors(entry):
            return entry.function(*inputs, **options)

    def __getitem__(self, name: str) -> Entry:
        self._load()
        if name not in self._entries:
            raise UserError(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        return f"<{self.kind} registry: {', '.join(self.names())}>"

    def unregister(self, name: str) -> None:
        """Remove a part, so that its name is free.

        Raises:
            UserError: there is none of that name.
        """
        del self._entries[self[name].name]

    def _load(self) -> None:
        if not self._loaded:
            # Set first: the home module registers its parts while it is being imported.
            self._loaded = True
            try:
                import_module(self._home)
            except BaseException:
                self._loaded = False
                raise


# The open records of `recorded`.
_records: list[list[tuple[Registry, Entry]]] = []


@contextmanager
def recorded() -> Iterator[list[tuple[Registry, Entry]]]:
    """Within the block, what is registered is noted down in the list as well."""
    _records.append([])
    record = _records[-1]
    try:
        yield record
    finally:
        # By identity: two empty lists are equal.
        _records[:] = [other for other in _records if other is not record]


@contextmanager
def translate_errors(entry: Entry) -> Iterator[None]:
    """Turn what a user's own part raises into one line that names it, with the line of its code; a built-in part's
    error is a bug, and shown.
    """
    try:
        yield
    except (UserError, MachineError):
        raise
    except Exception as error:
        if not entry.own or not of_the_code(error):
            raise
        raise UserError(f"{entry.said} failed: {reason(error)}{raised_at(error)}") from error


@contextmanager
def translate_own_errors(where: Callable[[], str]) -> Iterator[None]:
    """The same for a block in which any of a user's own parts may run.

    Args:
        where: says what was being done.
    """
    try:
        yield
    except (UserError, MachineError):
        raise
    except Exception as error:
        if not (place := raised_at(error)) or not of_the_code(error):
            raise
        raise UserError(f"{where()}: {reason(error)}{place}") from error


def of_the_code(error: Exception) -> bool:
    """Whether the code is at fault, and not a memory that is too small or an operation that cannot repeat."""
    return not out_of_memory(error) and "determinis" not in str(error)


def reason(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def raised_at(error: BaseException) -> str:
    """` (file:line)` of the user's own code that raised an error; nothing where there is none on the way."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        module = frame.f_globals.get("__name__", "")
        standard = module.partition(".")[0] in sys.stdlib_module_names
        installed = "site-packages" in file or "dist-packages" in file
        if not installed and not standard and not module.startswith("lasnn."):
            place = f" ({file}:{line})"
    return place


def _entry(kind: str, name: str, function: Callable[..., Any]) -> Entry:
    try:
        parameters = _parameters(function)
    except NameError as error:
        raise ValueError(f"the annotations of {name!r} cannot be read: {error}") from error
    inputs, options = [], {}
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY:
            annotation = Any if parameter.annotation is REQUIRED else parameter.annotation
            options[parameter.name] = Option(annotation, parameter.default)
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            inputs.append(parameter.name)
        else:
            # *args or **kwargs would swallow a recipe's typing errors.
            raise ValueError(f"{name!r} takes *{parameter.name}; name every option, so that recipes can be checked")
    return Entry(kind, name, function, tuple(inputs), options)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a function or of a class; `**options` of a subclass stand for those of the class above it."""
    if not inspect.isclass(function):
        return list(inspect.signature(function, eval_str=True).parameters.values())
    own = next(one for one in function.__mro__ if "__init__" in vars(one))
    if _is_nn_module(own):
        # It says *args, to refuse them in words of its own.
        return []
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        above = function.__mro__[function.__mro__.index(own) + 1]
        if above is not object:
            known = {parameter.name for parameter in parameters}
            parameters[-1:] = [parameter for parameter in _parameters(above) if parameter.name not in known]
    return parameters


def _is_nn_module(one: type) -> bool:
    """Whether a class is torch.nn.Module itself; PyTorch is not imported for the question."""
    return (one.__module__, one.__name__) == ("torch.nn.modules.module", "Module")


# What a loss may ask for, by the names of its positional parameters; `lasnn.loss` says what each is.
LOSS_INPUTS = (
    "logits",
    "targets",
    "teacher_logits",
    "teacher_classifier",
    "student_features",
    "teacher_features",
    "student_currents",
    "teacher_currents",
)
# What the constructor of a loss that is a class may ask for, in the same way.
LOSS_SIZES = ("student_shapes", "teacher_shapes", "num_classes")
# What a training logs beside its losses.
RESERVED = ("loss", "gradient")


def _loss_entry(entry: Entry) -> Entry:
    if entry.name in RESERVED:
        raise ValueError(f"a loss cannot be called {entry.name!r}: the metrics have that name already; rename it")
    if inspect.isclass(entry.function):
        entry = replace(entry, inputs=_forward_inputs(entry, entry.function), sizes=entry.inputs)
    if strange := [name for name in entry.sizes if name not in LOSS_SIZES]:
        raise ValueError(
            f"the constructor of loss {entry.name!r} asks for {', '.join(strange)}; its positional parameters are "
            f"chosen from {', '.join(LOSS_SIZES)}, its options are keyword-only"
        )
    strange = [name for name in entry.inputs if name not in LOSS_INPUTS]
    if strange or not entry.inputs:
        raise ValueError(
            f"loss {entry.name!r} asks for {', '.join(strange) or 'nothing'}; "
            f"its positional parameters are chosen from {', '.join(LOSS_INPUTS)}, its options are keyword-only"
        )
    return entry


def _forward_inputs(entry: Entry, loss: Any) -> tuple[str, ...]:
    """The positional parameters of the `forward` of a loss that is a class."""
    if not any(map(_is_nn_module, loss.__mro__)):
        raise ValueError(f"loss {entry.name!r} is a class, but no nn.Module; what has no learnt parts is a function")
    _, *parameters = inspect.signature(loss.forward).parameters.values()
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            raise ValueError(
                f"forward() of loss {entry.name!r} takes {parameter.name}, which is not positional; options are "
                "keyword-only parameters of the constructor"
            )
    return tuple(parameter.name for parameter in parameters)


# What an augmentation may ask for, in the same way.
AUGMENTATION_INPUTS = ("images", "targets", "mean", "generator")


def _checked_augmentation(entry: Entry) -> Entry:
    strange = [name for name in entry.inputs if name not in AUGMENTATION_INPUTS]
    if strange or "images" not in entry.inputs:
        raise ValueError(
            f"augmentation {entry.name!r} asks for {', '.join(strange) or 'no images'}; its positional parameters are "
            f"images and others of {', '.join(AUGMENTATION_INPUTS)}, its options are keyword-only"
        )
    return entry


architectures = Registry("architecture", "lasnn.architecture")
# Networks that can only teach: they are not built from `act` units.
teachers = Registry("teacher", "lasnn.architecture.foreign")
architectures.choose_beside(teachers)
encoders = Registry("encoder", "lasnn.encoder")
neurons = Registry("neuron", "lasnn.neuron")
losses = Registry("loss", "lasnn.loss", check=_loss_entry)
datasets = Registry("data set", "lasnn.data")
augmentations = Registry("augmentation", "lasnn.data.augment", check=_checked_augmentation)
exporters = Registry("format", "lasnn.export")
callbacks = Registry("callback", "lasnn.callback")
REGISTRIES = {
    "architectures": architectures,
    "teachers": teachers,
    "encoders": encoders,
    "neurons": neurons,
    "losses": losses,
    "datasets": datasets,
    "augmentations": augmentations,
    "exporters": exporters,
    "callbacks": callbacks,
}
