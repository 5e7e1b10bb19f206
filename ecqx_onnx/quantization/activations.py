"""Round activations to 8 bits in a module's forward, where the int8 file will do so.

The forward runs inside a torch function mode, which sees each operator as it is executed. It
follows the rules of `convert --activations int8` (passes/integer_nodes.py of the converters): what
a convolution, a product or a sum of activations reads is rounded first. Convolution, BatchNorm and
Relu are one kernel with one output, so nothing is rounded between them; the last product's sums
stay float. Inside recurrent layers and attention, whose kernels are one operator here, nothing is
rounded.

    x̂ = s (clip(round(x / s) + z, 0, 255) - z),   s = (high - low) / 255,   z = round(-low / s)

[Jacob et al. 2018, sec. 3.1]

The gradient passes straight through inside [low, high] and is zero outside. Ranges are moving
averages of each batch's extremes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ecqx_onnx.quantization.operators import ADDITIONS, AUGMENTED, list_spellings, map_tensors

LEVELS = 255
MEMORY = 0.99  # share of the old in a range's moving average

CONVOLUTIONS = list_spellings("conv1d", "conv2d", "conv3d")
LINEAR = list_spellings("linear")
MATRIX_PRODUCTS = list_spellings("matmul", "__matmul__", "bmm", "mm")
PAIRS = ADDITIONS | list_spellings("mul", "multiply", "__mul__", "__rmul__")
NORMS = list_spellings("batch_norm")
MEANS = list_spellings("mean")
UNARY = list_spellings(
    *(
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
    ),
    *("leaky_relu", "sigmoid"),
)
JOINS = list_spellings("cat", "concat")
CLIPS = list_spellings("relu", "relu_", "relu6", "hardtanh", "clamp", "clip")
DROPOUTS = list_spellings("dropout", "dropout1d", "dropout2d", "dropout3d")
MOVES = list_spellings(
    *(
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "reshape",
        "view",
        "view_as",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
    ),
    *(
        "transpose",
        "permute",
        "movedim",
        "swapaxes",
        "__getitem__",
        "narrow",
        "select",
        "pad",
        "expand",
        "expand_as",
    ),
    *("contiguous", "clone"),
)
LOOKS = list_spellings(
    *(
        "size",
        "dim",
        "numel",
        "stride",
        "is_floating_point",
        "is_contiguous",
        "register_hook",
        "__len__",
        "item",
        "tolist",
    )
)


@dataclass(frozen=True, eq=False)
class _Made:
    """A tensor that an integer kernel makes. source: the one whose range it shares. sums: a
    product's, which stay float where no kernel reads them. product: nothing has happened to it
    since the product. rounded: it lies on its 256 values already.
    kernel: sums with a constant added, as a kernel reads them, the product rounded before."""

    tensor: Tensor
    source: Tensor
    sums: bool = False
    product: bool = False
    rounded: bool = False
    kernel: Tensor | None = None


class ActivationRounding:
    """Attaches to `module` by hooks. weights: id of a quantised parameter -> its name.

    ranges: place -> float32 [2], lowest and highest value. A place is named by what reads it first.
    """

    def __init__(self, module: nn.Module, weights: Mapping[int, str]) -> None:
        self.module, self.weights = module, weights
        self.ranges: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] | None = None  # while recording: place -> the value there
        self._modes: list[_Mode] = []
        self._hooks: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Round the module's activations from now on."""
        self._hooks = [
            self.module.register_forward_pre_hook(self._before),
            self.module.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """The module's activations are floats again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextmanager
    def on(self, *, attached: bool = True) -> Iterator[None]:
        """Round inside the `with`, or do not; afterwards as before.

        Args:
            attached: whether activations are rounded inside.

        Returns:
            A context manager.
        """
        before = bool(self._hooks)
        self._set(attached)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, attached: bool) -> None:
        if attached and not self._hooks:
            self.attach()
        elif not attached:
            self.detach()

    @torch.no_grad()
    def values(self, *inputs: Any) -> dict[str, Tensor]:
        """Run the module in evaluation mode and keep what is at each place, not rounded.

        Args:
            inputs: of the module's forward.

        Returns:
            Place -> its float value, for the places that have a range.
        """
        modes = [(module, module.training) for module in self.module.modules()]
        seen: dict[str, Tensor] = {}
        self.seen = seen
        try:
            with self.on():
                self.module.eval()(*inputs)
        finally:
            self.seen = None
            for module, training in modes:
                module.training = training
        return {place: value for place, value in seen.items() if place in self.ranges}

    def bounds(self) -> dict[str, tuple[float, float]]:
        """List the ranges.

        Returns:
            Place -> (lowest, highest) value, floats.
        """
        return {place: (float(range[0]), float(range[1])) for place, range in self.ranges.items()}

    def state(self) -> dict[str, Tensor]:
        """Copy the ranges, for a file to resume from.

        Returns:
            Place -> float32 [2], lowest and highest value.
        """
        return {place: range.clone() for place, range in self.ranges.items()}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the ranges of an earlier run.

        Args:
            state: what `state` returned there.
            device: where the module is.
        """
        self.ranges = {place: range.to(device).clone() for place, range in state.items()}

    def _before(self, module: nn.Module, inputs: Any) -> None:
        mode = _Mode(self)
        self._modes.append(mode)
        mode.__enter__()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        mode = self._modes.pop()
        mode.__exit__(None, None, None)
        return map_tensors(output, mode.floats) if output is not None else None

    def observe(self, place: str, value: Tensor) -> None:
        """Take the value's extremes into the place's range, in training mode.

        Args:
            place: named by what reads it first.
            value: any shape, float.
        """
        if self.seen is not None:
            self.seen[place] = value.detach().clone()  # the model may overwrite its own
        elif self.module.training and value.numel():
            now = torch.stack(torch.aminmax(value.detach().float()))
            old = self.ranges.get(place)
            self.ranges[place] = now if old is None else torch.lerp(now, old.to(now.device), MEMORY)

    def rounded(self, place: str, value: Tensor) -> Tensor:
        """Round a value to the 256 levels of its place.

        x̂ = s (clamp(round(x / s) + z, 0, 255) - z)

        Args:
            place: named by what reads it first.
            value: any shape, float.

        Returns:
            The rounded value, of the same dtype; the value itself where the place has no range yet.
        """
        if place not in self.ranges or self.seen is not None:
            return value
        scale, zero_point = _choose_uint8_grid(self.ranges[place].to(value.device))
        return torch.fake_quantize_per_tensor_affine(
            value.float(), scale, zero_point, 0, LEVELS
        ).to(value.dtype)


def _choose_uint8_grid(range: Tensor) -> tuple[Tensor, Tensor]:
    """(scale float32, zero point int32) for values in the range [2], widened to hold zero; as the
    converter computes them."""
    low, high = range[0].double().clamp(max=0), range[1].double().clamp(min=0)
    scale = ((high - low) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny).float()
    scale = torch.where(high > low, scale, torch.ones_like(scale))
    return scale, (-low / scale.double()).round().clamp(0, LEVELS).int()


class _Mode(TorchFunctionMode):
    """One forward pass."""

    def __init__(self, owner: ActivationRounding) -> None:
        super().__init__()
        self.owner = owner
        self.made: dict[int, _Made] = {}
        self.places: dict[
            int, tuple[Tensor, str]
        ] = {}  # id of a source -> itself, so that the id stays its own, and its place
        self.done: dict[int, tuple[Tensor, Tensor]] = {}  # id of a value -> itself and x̂
        self.counts: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if (
            not args
            or not isinstance(args[0], (Tensor, list, tuple))
            or name in ("__get__", "__set__")
            or func in LOOKS
        ):
            return func(*args, **kwargs)
        if name in AUGMENTED:  # Python rebinds the name, so the out-of-place operator says the same
            return self.__torch_function__(AUGMENTED[name], types, args, kwargs)
        if name in ("add_", "mul_"):
            target: Any = args[0]
            return self._in_place(
                target, self.__torch_function__(getattr(Tensor, name[:-1]), types, args, kwargs)
            )
        if func in JOINS:
            return self._join(func, args, kwargs)
        if not isinstance(args[0], Tensor):
            return self._float_operator(func, args, kwargs)
        if func in CONVOLUTIONS | LINEAR and self._weight(args, kwargs) is not None:
            return self._product(func, args, kwargs)
        if func in MATRIX_PRODUCTS:
            return self._matrix_product(func, name, args, kwargs)
        if func in PAIRS:
            return self._pair(func, name, args, kwargs)
        if id(args[0]) in self.made:
            return self._next(self.made[id(args[0])], func, name, args, kwargs)
        return (
            func(*args, **kwargs)
            if func in MOVES | CLIPS | DROPOUTS
            else self._float_operator(func, args, kwargs)
        )

    def _next(
        self, made: _Made, func: Callable, name: str, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """An operator whose first argument is what an integer kernel makes."""
        if func in NORMS and made.product:
            return self._make(func(*args, **kwargs), sums=made.sums)
        if func in UNARY or (func in MEANS and _is_over_pixels(args, kwargs)):
            return self._make(func(self.read(args[0], self._counted(name)), *args[1:], **kwargs))
        if name == "silu":  # x sigmoid(x) in the exported graph
            return self._pair(
                torch.mul,
                "mul",
                (args[0], self._next(made, torch.sigmoid, "sigmoid", args[:1], {})),
                {},
            )
        if func in CLIPS:
            args = (args[0] if made.kernel is None else made.kernel, *args[1:])
            if not _keeps_zero(
                args[1:], kwargs
            ):  # a range always holds zero, so such a clip is no end of one
                args = (self.read(args[0], self._counted(name)), *args[1:])
            return self._make(func(*args, **kwargs))
        if func in DROPOUTS:  # it scales what it keeps, so x̂ comes first
            value = func(self.read(args[0], self._counted(name)), *args[1:], **kwargs)
            return self._make(value, rounded=True)
        if func in MOVES:
            moved = func(*args, **kwargs)
            if moved is args[0]:
                return moved
            kernel = (
                None
                if made.kernel is None
                else self._make(func(made.kernel, *args[1:], **kwargs), source=made.kernel)
            )
            return self._make(
                moved, source=made.source, sums=made.sums, rounded=made.rounded, kernel=kernel
            )
        return self._float_operator(func, args, kwargs)

    def read(self, value: Tensor, place: str) -> Tensor:
        """x̂ of a value that a kernel reads. place: its name, if it is read for the first time."""
        made = self.made.get(id(value))
        if made is not None and made.rounded:
            return value
        if made is not None and made.kernel is not None:
            return self.read(made.kernel, place)
        if id(value) not in self.done:
            source = value if made is None else made.source
            if id(source) not in self.places:
                self.places[id(source)] = source, place
                self.owner.observe(place, source)
            self.done[id(value)] = value, self.owner.rounded(self.places[id(source)][1], value)
        return self.done[id(value)][1]

    def floats(self, value: Any) -> Any:
        """What a float operator reads, or the caller gets: x̂ of what a kernel makes, but a
        product's sums as they are."""
        made = self.made.get(id(value))
        return value if made is None or made.sums else self.read(value, self._counted("output"))

    def _in_place(self, value: Tensor, result: Tensor) -> Tensor:
        """`value` with the result written into it."""
        made = self.made.get(id(result))
        self.made.pop(id(value), None)
        changed = self._renewed(value.copy_(result))
        return changed if made is None else self._make(changed, sums=made.sums)

    def _make(self, value: Tensor, *, source: Tensor | None = None, **facts: Any) -> Tensor:
        self._renewed(value)
        self.made[id(value)] = _Made(value, value if source is None else source, **facts)
        return value

    def _renewed(self, value: Tensor) -> Tensor:
        """What was known of a value that an operator has changed in place is forgotten."""
        self.places.pop(id(value), None)
        self.done.pop(id(value), None)
        return value

    def _counted(self, name: str) -> str:
        self.counts[name] = self.counts.get(name, 0) + 1
        return f"{name} {self.counts[name]}"

    def _weight(self, args: Any, kwargs: Mapping[str, Any]) -> str | None:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        return self.owner.weights.get(id(weight))

    def _product(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Tensor:
        x = self.read(args[0], f"input of {self._weight(args, kwargs)}")
        if func not in LINEAR:
            return self._make(func(x, *args[1:], **kwargs), product=True)
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        if x.ndim == 2 or bias is None:
            return self._make(func(x, weight, bias), sums=True, product=True)
        # With more dimensions it is a MatMul and an Add in the exported graph.
        return self._pair(torch.add, "add", (self._make(func(x, weight), sums=True), bias), {})

    def _matrix_product(self, func: Callable, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if len(args) < 2 or isinstance(args[0], nn.Parameter):
            return self._float_operator(func, args, kwargs)
        if isinstance(args[1], nn.Parameter):
            if id(args[1]) not in self.owner.weights:
                return self._float_operator(func, args, kwargs)
            return self._make(
                func(self.read(args[0], f"input of {self.owner.weights[id(args[1])]}"), args[1]),
                sums=True,
            )
        return self._make(
            func(*(self.read(x, self._counted(name)) for x in args), **kwargs), sums=True
        )

    def _pair(self, func: Callable, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Addition or multiplication: of activations one of which a kernel makes, or of one such
        and a constant."""
        both = args if len(args) > 1 else (*args, kwargs.get("other"))
        made = [self.made[id(x)] for x in both if id(x) in self.made]
        if not made or "alpha" in kwargs:
            return self._float_operator(func, args, kwargs)
        constants = [not isinstance(x, Tensor) or isinstance(x, nn.Parameter) for x in both]
        read = [
            _round_constant(x) if fixed else self.read(x, self._counted(name))
            for x, fixed in zip(both, constants, strict=True)
        ]
        if any(constants) and made[0].sums:
            return self._make(func(*both), sums=True, kernel=self._make(func(*read)))
        return self._make(func(*read))

    def _join(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
        parts = args[0]
        if not any(id(x) in self.made for x in parts):
            return func(*args, **kwargs)
        return self._make(
            func([self.read(x, self._counted("cat")) for x in parts], *args[1:], **kwargs)
        )

    def _float_operator(self, func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*map_tensors(args, self.floats), **map_tensors(kwargs, self.floats))


def _round_constant(value: Any) -> Any:
    """A parameter beside an activation is rounded to 8 bits of its own, by its extremes."""
    if not isinstance(value, Tensor):
        return value
    scale, zero_point = _choose_uint8_grid(torch.stack(torch.aminmax(value.detach().float())))
    return torch.fake_quantize_per_tensor_affine(value.float(), scale, zero_point, 0, LEVELS).to(
        value.dtype
    )


def _keeps_zero(bounds: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a clip leaves zero as it is. bounds: a clamp's or hardtanh's positional ones; True
    where they are tensors."""
    named = dict(zip(("min", "max"), bounds, strict=False)) | {
        key[:3]: value for key, value in kwargs.items()
    }
    low, high = named.get("min"), named.get("max")
    return not (isinstance(low, float | int) and not isinstance(low, bool) and low > 0) and not (
        isinstance(high, float | int) and not isinstance(high, bool) and high < 0
    )


def _is_over_pixels(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a mean is over all dimensions behind the channels."""
    rank, axes = args[0].ndim, args[1] if len(args) > 1 else kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    return (
        rank > 2
        and isinstance(axes, (tuple, list))
        and sorted(axis % rank for axis in axes) == list(range(2, rank))
    )
