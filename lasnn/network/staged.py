"""Networks as ordered, named stages, written once and built as an ANN teacher or as a spiking student.

Shapes: T time steps, B batch, C channels, H x W pixels, K classes. Inside a network time is folded into the leading
dimension, T-major, so that convolution, pooling and linear layers are plain `torch.nn`; only the neuron unfolds it.
"""

from collections.abc import Iterable, Mapping, Sequence

from einops import rearrange
from torch import Tensor, nn

from lasnn.errors import UserError, unknown
from lasnn.network.time import TimeContext
from lasnn.network.units import Act, NormSpike, run_with_current
from lasnn.registry import architectures

# What makes a stage's name the tap of its current.
CURRENT = ".current"


class Staged(nn.Module):
    """Ordered, named stages and a head.

    Args:
        stages: name -> module, in order, named `stage1`, `stage2`, ...; each output can be tapped.
        head: module from the last stage's output to logits [N, K].
        stem: what comes before the first stage; it cannot be tapped.

    The state dict's keys are `stem.*`, `<stage>.*` and `head.*`: the same for a teacher and its student.
    """

    def __init__(self, stages: Mapping[str, nn.Module], head: nn.Module, stem: nn.Module | None = None):
        super().__init__()
        self.stem = nn.Identity() if stem is None else stem
        self.stage_names = tuple(stages)
        for name, stage in stages.items():
            if name in ("stem", "head"):
                raise ValueError(f"a stage cannot be named {name!r}; name the stages stage1, stage2, ...")
            self.add_module(name, stage)
        self.head = head
        units = {}
        for name, unit in self.named_modules(remove_duplicate=False):
            if not isinstance(unit, NormSpike):
                continue
            if unit in units:
                raise ValueError(
                    f"one spiking unit stands at {units[unit]} and at {name}, where it would share one voltage; "
                    "call act() once for each place"
                )
            units[unit] = unit.name = name
        contexts = {id(unit.time): unit.time for unit in units}
        if len(contexts) > 1:
            raise ValueError("the units of one network must come from one `act` factory")
        self.time = next(iter(contexts.values()), TimeContext())

    def forward(self, x: Tensor, timesteps: int = 1, taps: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the network from rest.

        Args:
            x: [T, B, C, H, W], or [1, B, C, H, W] where the input is constant in time.
            timesteps: T.
            taps: names of stages whose outputs are wanted; "<stage>.current" is the mean over time of what enters
                the activation of the unit that ends the stage: its norm plus the residual.

        Returns:
            Logits of each step [T, B, K] and {tap: feature [T, B, C, H, W]}; T is 1 for an ANN. A current is
            [1, B, C, H, W].

        Raises:
            ValueError: `x` has other dimensions, or its leading one is neither 1 nor T.
            UserError: there is no such stage, or a current is wanted of one that does not end in a unit.
        """
        taps = tuple(taps)
        self.check_taps(taps)
        if x.ndim != 5:
            raise ValueError(
                f"the input is {list(x.shape)}; it must be [T, B, C, H, W], or [1, B, C, H, W] where it is constant in "
                "time: of images [B, C, H, W] give images[None], with timesteps=T"
            )
        if x.shape[0] not in (1, timesteps):
            raise ValueError(f"the input has {x.shape[0]} time steps; expected {timesteps}, or 1 if constant in time")
        self.time.steps, self.time.batch = timesteps, x.shape[1]
        x = self.stem(rearrange(x, "t b c h w -> (t b) c h w"))
        features = {}
        for name in self.stage_names:
            if name + CURRENT in taps:
                x, current = run_with_current(getattr(self, name), x)
                if current is None:
                    raise UserError(f"{name} does not end in a unit that act() made, so that it has no current")
                features[name + CURRENT] = current[None]
            else:
                x = getattr(self, name)(x)
            if name in taps:
                features[name] = self.time.unfold(x)
        return self.time.unfold(self.head(x)), features

    def check_taps(self, taps: Iterable[str]) -> None:
        """Raises a UserError for a tap of a stage that is not there."""
        for tap in taps:
            if tap.removesuffix(CURRENT) not in self.stage_names:
                raise UserError(unknown("stage", tap.removesuffix(CURRENT), self.stage_names))

    def modules_by_part(self) -> dict[str, dict[str, nn.Module]]:
        """The modules of stem, stages and head, each under the name of its part: {"stage1": {"stage1.0": ...}}."""
        names = ("stem", *self.stage_names, "head")
        return {name: dict(getattr(self, name).named_modules(prefix=name)) for name in names}


class StagedView(Staged):
    """A network from elsewhere, seen as stages: it can only teach, and its state dict keeps its own keys.

    Args:
        network: any module; its parts are used in `stem`, `stages` and `head`, it is not called itself.
        stages, head, stem: as for `Staged`, made of parts of `network` and of modules without parameters.
        mean, std: what its images were normalised with, per channel, in [0, 1] units; None is the data set's.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Mapping[str, nn.Module],
        head: nn.Module,
        stem: nn.Module | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        nn.Module.__init__(self)
        # The parts are registered where `network` has them, which keeps the keys; the stages are only views of them.
        self._modules.update(network._modules)
        self._parameters.update(network._parameters)
        self._buffers.update(network._buffers)
        for name, view in {"stem": stem or nn.Identity(), **stages, "head": head}.items():
            object.__setattr__(self, name, view)
        self.stage_names = tuple(stages)
        self.time = TimeContext()
        self.normalisation = None if mean is None or std is None else (tuple(mean), tuple(std))


def build(architecture: str, act: Act, *, in_channels: int, num_classes: int, **options) -> Staged:
    """Build a registered architecture with the units that `act` makes.

    Raises:
        UserError: the architecture is not known or did not return a `Staged` network.
    """
    network = architectures.build(architecture, act, in_channels=in_channels, num_classes=num_classes, **options)
    if not isinstance(network, Staged):
        where = architectures[architecture].where
        raise UserError(
            f"architecture {architecture!r} ({where}) returned {type(network).__name__}, not lasnn.Staged; "
            'return Staged({"stage1": module, ...}, head), whose modules run one after the other'
        )
    return network
