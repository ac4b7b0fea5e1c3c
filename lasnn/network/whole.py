"""Networks from elsewhere that are called as a whole, their stages taken on the way: they can only teach.

Shapes: B batch, C channels, H x W pixels, K classes; an ANN has one time step.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from torch import Tensor, nn

from lasnn.errors import UserError
from lasnn.network.staged import CURRENT, Staged
from lasnn.network.time import TimeContext

# What PyTorch keeps of a module's own; shared with the network, they stay one whatever is moved, loaded or copied.
OWN = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class WholeView(Staged):
    """A network that is called as it is, and gives its stages' features beside its logits; a subclass says how.

    Its state dict is the network's, key by key.

    Args:
        network: any module.
        stages: name of each stage -> the path of the module whose output it is.
        mean, std: what its images were normalised with, per channel, in [0, 1] units; None is the data set's.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Mapping[str, str],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        nn.Module.__init__(self)
        for name in OWN:
            object.__setattr__(self, name, getattr(network, name))
        # Not registered: it would be a module of itself.
        object.__setattr__(self, "network", network)
        self.paths = dict(stages)
        self.stage_names = tuple(stages)
        self.time = TimeContext()
        self.normalisation = None if mean is None or std is None else (tuple(mean), tuple(std))

    def forward(self, x: Tensor, timesteps: int = 1, taps: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [1, B, C, H, W] -> logits [1, B, K] and {stage: feature [1, B, C, H, W]}, as of every `Staged`.

        Raises:
            UserError: a stage, or a current, cannot be taken; it is named.
        """
        taps = tuple(taps)
        self.check_taps(taps)
        for tap in taps:
            if tap.endswith(CURRENT):
                stage = tap.removesuffix(CURRENT)
                raise UserError(f"{stage} is of a network that act() did not build, so that it has no current")
        logits, features = self.outputs(x[0], taps)
        return logits[None], {name: feature[None] for name, feature in features.items()}

    def outputs(self, x: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, C, H, W] -> logits [B, K] and the features [B, C, H, W] of the stages that are asked for."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "WholeView":
        """The network's own mode is set, which its modules share."""
        self.network.train(mode)
        self.training = mode
        return self

    def modules_by_part(self) -> dict[str, dict[str, nn.Module]]:
        """By the order in which the network registers them: what leads to a stage's output is the stage's."""
        known = dict(self.named_modules())
        ends = {known[path]: name for name, path in self.paths.items() if path in known}
        found: dict[str, dict[str, nn.Module]] = {name: {} for name in ("stem", *self.stage_names, "head")}
        waiting: dict[str, nn.Module] = {}
        inside: tuple[str, str] | None = None
        for name, module in known.items():
            if inside is not None and not name.startswith(f"{inside[0]}."):
                found[inside[1]], waiting, inside = waiting, {}, None
            if name:
                waiting[name] = module
            if module in ends:
                inside = name, ends[module]
        found["head" if inside is None else inside[1]] = waiting
        return {part: {f"{part}.{name}": module for name, module in modules.items()} for part, modules in found.items()}


class HookedView(WholeView):
    """Any network, frozen and always in evaluation mode, whose stages are the outputs of its modules.

    The outputs are taken by forward hooks that live only for the call.

    Args:
        network, mean, std: as for `WholeView`.
        stages: name of each stage -> the module's path, as `network.named_modules()` has it: `layer1`, `blocks.5`.

    Raises:
        UserError: a name or a path cannot be a stage's, a line each.
    """

    def __init__(self, network: nn.Module, stages: Mapping[str, str], **normalisation: Sequence[float] | None):
        problems = [problem for name, path in stages.items() for problem in _stage_problems(network, name, path)]
        if problems or not stages:
            raise UserError(*(problems or [f"stages names no module; {children_of(network, '')}"]))
        super().__init__(network, stages, **normalisation)
        network.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "HookedView":
        """It stays in evaluation mode, whatever mode is asked for."""
        return super().train(False)

    def outputs(self, x: Tensor, taps: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, list[tuple[object, int]]] = {name: [] for name in self.stage_names if name in taps}

        def keep(name: str, output: object) -> None:
            seen[name].append((output, version_of(output)))

        hooks = [
            self.network.get_submodule(self.paths[name]).register_forward_hook(
                lambda _, __, output, name=name: keep(name, output)
            )
            for name in seen
        ]
        try:
            logits = self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, {name: self._feature(name, outputs, len(x)) for name, outputs in seen.items()}

    def _feature(self, name: str, outputs: Sequence[tuple[object, int]], images: int) -> Tensor:
        """The one output of a stage in a pass, where it is a map that stays as it is.

        Raises:
            UserError: it is not.
        """
        path = self.paths[name]
        said = f"stages.{name}: {path!r} ({type(self.network.get_submodule(path)).__name__})"
        if not outputs:
            inner = children_of(self.network, path)
            raise UserError(f"{said} is not called in a pass, so that it has no output; name a module that is; {inner}")
        if len(outputs) > 1:
            raise UserError(
                f"{said} runs {len(outputs)} times in a pass; a stage is a module that runs once, as one that holds it"
            )
        [(output, version)] = outputs
        if not isinstance(output, Tensor) or output.ndim != 4 or len(output) != images:
            what = f"{list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise UserError(
                f"{said} returns {what} for {images} images; a stage returns a map [B, C, H, W]. Name another module, "
                "or have the plugin return a lasnn.network.StagedView whose stages reshape it"
            )
        if version_of(output) != version:
            raise UserError(
                f"{said} has its output changed in place by what follows; name the module that changes it, or set its "
                "inplace to False"
            )
        return output


def version_of(x: object) -> int:
    """How often a tensor was changed in place; under inference mode PyTorch does not count."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _stage_problems(network: nn.Module, name: str, path: str) -> Iterable[str]:
    if name in ("stem", "head") or ":" in name or not name.strip():
        yield f"stages: {name!r} cannot be a stage's name; name the stages stage1, stage2, ..."
    known = [module for module, _ in network.named_modules() if module]
    if path in known:
        return
    near = get_close_matches(path, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    parent = path
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    yield f"stages.{name}: {type(network).__name__} has no module {path!r}{hint} {children_of(network, parent)}"


def children_of(network: nn.Module, path: str, most: int = 12) -> str:
    """The modules right in another one, in words."""
    module = network.get_submodule(path)
    names = [repr(f"{path}.{name}" if path else name) for name, _ in module.named_children()]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    who = repr(path) if path else type(network).__name__
    return f"{who} has {', '.join(names[:most])}{more}" if names else f"{who} has no modules in it"
