"""DecorConv2d, DecorLinear and their timm forms: the plain layers, able to report the second moment of their inputs.

They compute exactly what their base classes compute, with the same parameters under the same names, at the same cost;
in a step that is followed by a refresh they also add their input's statistics to `moments`. Nothing else is here: R
belongs to the optimizer (see attach.py), so a checkpoint of these layers is a checkpoint of the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from timm.layers import Linear as TimmLinear
from timm.layers.conv2d_same import conv2d_same
from timm.models import register_notrace_module
from torch import Tensor, nn

from timm_decor import moments
from timm_decor.moments import MEAN, ConvShape
from timm_decor.shape import LayerShape

RECORDER_STATE = (  # attributes of a layer that records
    "recording", "sample", "max_rows", "wanted", "moments", "rows", "unrecorded", "passes", "glimpse", "moves",
    "stored", "on_outside",
)  # fmt: skip

REPLICAS = "nn.DataParallel runs on copies, whose inputs are not seen: use DistributedDataParallel, or one GPU"
_LOOKED_AT = 64  # elements of a weight


Outside = Callable[[], Callable[[], None] | None]  # weak, so that a layer does not keep its optimizer alive


class DecorMixin:
    """What both layers share. The class attributes are the state of a layer that nothing is attached to."""

    recording: bool = False  # set for the forward passes of a step that is followed by a refresh
    sample: float = 1.0  # share of the batch's images to record
    max_rows: int = 1  # whole images are recorded up to about this many rows, unless the share is 1.0
    wanted: tuple[str, ...] = ()  # names of the moments to record
    moments: dict[str, Tensor]  # sums over rows
    rows: Tensor  # how many, one number; a tensor, because torch.compile would specialise on an int

    unrecorded: int = 0  # training forward passes whose input could not be recorded
    without_grad: bool = False  # record while gradients are off, too
    passes: int = 0  # training forward passes since the recording began
    glimpse: Tensor  # some elements of the weight, as they were when last looked at
    moves: int = 0  # how often they were others
    stored: tuple[Tensor, ...] = ()  # the share that the optimizer steps on, where that is not the weight
    on_outside: Outside | None = None

    unbatched_dim: int  # dimensions of an input without a batch axis

    # TorchScript compiles a class's properties, whether they are used or not.
    __jit_unused_properties__ = ["decor_shape"]

    if TYPE_CHECKING:
        weight: Tensor
        training: bool

    @property
    def decor_shape(self) -> LayerShape:
        """Groups, channels and kernel positions that R acts on, and outputs."""
        raise NotImplementedError

    def grouped(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the weight as (g, O, C, S): a view, but for rare memory formats."""
        raise NotImplementedError

    def ungrouped(self, rows: Tensor) -> Tensor:
        """(g, O, C, S) in the weight's shape, a view where that is possible."""
        return rows.reshape(self.weight.shape)

    def start_recording(
        self,
        wanted: tuple[str, ...],
        sample: float,
        max_rows: int = 2**63 - 1,
        on_outside: Outside | None = None,
        stored: Tensor | None = None,
    ) -> None:
        """Forget earlier statistics and record from the next training forward on.

        Args:
            wanted: names of the moments.
            sample: share of the images.
            max_rows: whole images are recorded up to about this many rows, unless the share is 1.0.
            on_outside: a weak reference to what is called when the weight is moved by somebody again and again while
                the recording waits for the optimizer's step.
            stored: what the optimizer steps on, if that is not the weight: a share, of which fully_shard makes the
                weight for each forward anew.
        """
        # Made here and added to in place: what a compiled forward makes itself lies, with CUDA graphs, in memory that
        # the next one writes over.
        device, dtype = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        shapes = {name: moments.moment_shape(name, self.decor_shape) for name in wanted}
        self.moments = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        self.rows = torch.zeros(1, dtype=torch.float32, device=device)
        self.stored = () if stored is None else (stored,)
        self.unrecorded, self.passes, self.moves, self.on_outside = 0, 0, 0, on_outside
        self.wanted, self.sample, self.max_rows, self.recording = wanted, sample, max_rows, True

    def stop_recording(self) -> None:
        """Record no more and let go of the sums."""
        for name in RECORDER_STATE:
            self.__dict__.pop(name, None)

    def recorded(self) -> dict[str, Tensor]:
        """The sums and "rows" so far; empty where there are none. `restore_recorded` takes them back."""
        if not (self.recording and bool(self.rows)):
            return {}
        return {name: value.clone() for name, value in (*self.moments.items(), ("rows", self.rows))}

    def restore_recorded(self, sums: dict[str, Tensor]) -> None:
        """Go on from what `recorded` returned."""
        if self.recording and sums:
            here = {name: value.to(self.weight.device, copy=True) for name, value in sums.items()}
            self.rows = here.pop("rows")
            self.moments.update(here)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the layer (EMA, a saved model) is attached to nothing and must not go on recording.
        return {name: value for name, value in self.__dict__.items() if name not in (*RECORDER_STATE, "without_grad")}

    def _record(self, x: Tensor) -> None:
        # Validation inside the step and activation checkpointing's first, gradient-free pass are not training inputs.
        if not (self.training and (torch.is_grad_enabled() or self.without_grad)):
            return
        if not torch.compiler.is_compiling():
            if hasattr(self, "_is_replica"):
                raise ValueError(REPLICAS)
            if not _is_plain(x):
                self.unrecorded += 1
                return
            if not self.without_grad:  # weight perturbation moves the weights between its forward passes
                self._notice_writes()
        if x.numel() == 0:
            return
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach() if x.dim() > self.unbatched_dim else x.detach()[None]
            each = self._row_count(self._rows_seen(x[:1]))
            if each < 1:  # smaller than the kernel: the layer says so itself
                return
            most = self.max_rows // each
            x = moments.sample_images(x, self.sample, most)
            if self.wanted:
                x = moments.at_least_float32(x)
            x = self._rows_seen(x)
            count, totals = self._row_count(x), {name: self._moment(name, x) for name in self.wanted}
            # A batch that overflowed (the gradient scaler will skip its step) must not spoil the others' sums.
            finite = torch.stack([torch.isfinite(total).all() for total in totals.values() or (x,)]).all()
            for name, total in totals.items():
                total = torch.where(finite, total, torch.zeros_like(total))
                # an offloaded weight is on another device than its inputs, and what is restored is on the weight's
                if self.moments[name].device != total.device:
                    self.moments[name] = self.moments[name].to(total.device)
                self.moments[name] += total
            if self.rows.device != x.device:
                self.rows = self.rows.to(x.device)
            self.rows += finite * count

    def _notice_writes(self) -> None:
        """Tell when the weight moves a second time: a step of the optimizer would have ended this recording.

        It is looked at as the recording begins and after 2, 4, 8... forward passes, because a look makes a GPU wait.
        Its version would be cheaper, but fused optimizers do not count what they write.
        """
        self.passes += 1
        if self.passes & (self.passes - 1):
            return
        (stored,) = self.stored or (self.weight,)
        weight = getattr(stored, "_local_tensor", stored).detach().flatten()
        now = weight[:: max(1, len(weight) // _LOOKED_AT)].clone()
        is_there = self.passes > 1 and (now.device, now.dtype) == (self.glimpse.device, self.glimpse.dtype)
        if is_there and not torch.equal(now, self.glimpse):
            self.moves += 1
            tell = self.on_outside() if self.moves == 2 and self.on_outside is not None else None
            if tell is not None:
                tell()
        self.glimpse = now

    def _rows_seen(self, x: Tensor) -> Tensor:
        """The input as the weight meets it, padding included."""
        return x

    def _row_count(self, x: Tensor) -> int:
        """Rows in what `_rows_seen` gave."""
        raise NotImplementedError

    def _moment(self, name: str, x: Tensor) -> Tensor:
        """Sum over those rows of the moment with that name; see `moments.moment_shape`."""
        raise NotImplementedError


def _is_plain(x: Tensor) -> bool:
    """Whether an input's moments can be taken: not under vmap, grad or jvp, not nested, sparse, complex, meta."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return x.layout == torch.strided and not x.is_nested and x.is_floating_point() and not x.is_meta


if torch.__version__ < (2, 6):  # type: ignore[operator]
    # torch.compile of torch 2.3 guards on the statistics, which come and go; there recording breaks the graph instead.
    DecorMixin._record = torch.compiler.disable(DecorMixin._record)  # type: ignore[method-assign]


@register_notrace_module  # one node of an fx graph, as the plain layer is
class DecorConv2d(DecorMixin, nn.Conv2d):
    """`nn.Conv2d` (any stride, padding, padding mode, dilation and groups) that can report its input moments."""

    unbatched_dim = 3

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W'), as `nn.Conv2d`."""
        if not torch.jit.is_scripting():  # noqa: SIM102  # TorchScript leaves out what stands under this very test
            if self.recording:
                self._record(x)
        return self._conv_forward(x, self.weight, self.bias)

    @property
    def decor_shape(self) -> LayerShape:
        positions = self.kernel_size[0] * self.kernel_size[1]
        return LayerShape(self.groups, self.in_channels // self.groups, positions, self.out_channels // self.groups)

    def grouped(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, -1, tensor.shape[1], tensor.shape[2] * tensor.shape[3])

    def _rows_seen(self, x: Tensor) -> Tensor:
        return self._padded(x)

    def _row_count(self, x: Tensor) -> int:
        return moments.conv_rows(x, self._patch_shape())

    def _moment(self, name: str, x: Tensor) -> Tensor:
        shape = self._patch_shape()
        if name == "channel":
            return moments.channel_moment(x, shape)
        if name == "space":
            return moments.space_moment(x, shape)
        if name == "shared_space":
            return moments.space_moment(x, shape).mean(0, keepdim=True)
        if name == MEAN:
            return moments.patch_sum(x, shape)
        return moments.patch_moment(x, shape)

    def _patch_shape(self) -> ConvShape:
        return ConvShape(self.kernel_size, self.stride, self.dilation, self.groups)  # type: ignore[arg-type]

    def _padded(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode)


@register_notrace_module
class DecorConv2dSame(DecorConv2d, Conv2dSame):
    """timm's `Conv2dSame` (TensorFlow's padding, which depends on the input's size) that can report its moments."""

    # TorchScript reads annotations as they stand here, and knows Optional on every Python and torch.
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP007, UP045
        return conv2d_same(  # timm's types say pairs, torch's say tuples of any length
            input,
            weight,
            bias,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
        )

    def _padded(self, x: Tensor) -> Tensor:
        return pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]


@register_notrace_module
class DecorLinear(DecorMixin, nn.Linear):
    """`nn.Linear` on inputs of any number of dimensions that can report its input moments."""

    unbatched_dim = 1

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) to (..., C_out), as `nn.Linear`."""
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.recording:
                self._record(x)
        return F.linear(x, self.weight, self.bias)

    @property
    def decor_shape(self) -> LayerShape:
        return LayerShape(1, self.in_features, 1, self.out_features)

    def grouped(self, tensor: Tensor) -> Tensor:
        return tensor[None, :, :, None]

    def _row_count(self, x: Tensor) -> int:
        return x.numel() // x.shape[-1]

    def _moment(self, name: str, x: Tensor) -> Tensor:
        if name == "space":  # one position: its factor is the number 1, so that Sigma_c (x) Sigma_s is Sigma_c itself
            return x.new_full((1, 1, 1), self._row_count(x))
        if name == MEAN:
            return x.flatten(0, -2).sum(0)[None, None]
        return moments.vector_moment(x)


@register_notrace_module
class DecorTimmLinear(DecorLinear, TimmLinear):
    """`timm.layers.Linear` that can report its input moments."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C_in) to (..., C_out), as `timm.layers.Linear`."""
        if torch.jit.is_scripting():  # what timm has this class for: TorchScript's addmm does not cast under AMP
            bias = self.bias.to(dtype=x.dtype) if self.bias is not None else None
            return F.linear(x, self.weight.to(dtype=x.dtype), bias)
        if self.recording:
            self._record(x)
        return F.linear(x, self.weight, self.bias)


DecorLayer = DecorConv2d | DecorLinear
DECOR_TYPES: dict[type[nn.Module], type[DecorConv2d] | type[DecorLinear]] = {
    nn.Conv2d: DecorConv2d,
    nn.Linear: DecorLinear,
    Conv2dSame: DecorConv2dSame,
    TimmLinear: DecorTimmLinear,
}
PLAIN_TYPES: dict[type[nn.Module], type[nn.Module]] = {decor: plain for plain, decor in DECOR_TYPES.items()}

_SHARDED = "FSDPModule"  # of torch.distributed.fsdp, which takes a while to import


def is_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was called on this very module: it then has a class of its own."""
    return any(kind.__name__ == _SHARDED for kind in type(module).__mro__)


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class, without what fully_shard put before it."""
    kinds = type(module).__mro__
    place = next((i + 1 for i, kind in enumerate(kinds) if kind.__name__ == _SHARDED), 0)
    return kinds[place]


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class; what fully_shard put before it stays."""
    before, own = type(module), class_of(module)
    if own is not before:
        bases = tuple(kind if base is own else base for base in before.__bases__)
        kind = type(before.__name__, bases, {"__deepcopy__": vars(before).get("__deepcopy__")})
    module.__class__ = kind  # type: ignore[assignment]
