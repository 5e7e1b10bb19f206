"""Pass relevance through operators that no module wraps: `a + b`, `F.relu`, an LSTM's kernel.

The shadow's forward runs inside `FunctionalRules`, which sees each operator as it is executed; so
control flow, nested functions and code that no tracer understands are all covered. There are four
ways through an operator:

    addition   two tensors that both carry relevance: zennit.layer.Sum, under the composite's rule
               for it (Norm)
    pass       activations and normalizations, output shaped as the input: R_x = R_z
    routing    each output entry is a copy of an input entry (reshape, cat, max pooling): plain
               gradient
    epsilon    everything else: R_x = x ⊙ ∂⟨z, R_z / stabilize(z)⟩/∂x. For an operator linear in x
               that is LRP-epsilon; a product shares R_z among its factors, and softmax comes out as
               in AttnLRP (arXiv 2402.05602). For a kernel that is neither (lstm, gru, attention) it
               is gradient times input, which need not conserve relevance: see `approximated`.

A constant takes no relevance where it is added or subtracted: x + c, x - c and c - x pass R_z on to
x.

A weight that is computed from parameters, ŵ = f(w), is no input of the layer that multiplies it, so
it takes no share from the layer's inputs. Its relevance goes on to the parameter of its shape,
entry by entry; what scales or centers it (a mean, a norm, a gain) takes none, since gradient times
input through a standardised weight would sum to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ecqx_onnx.quantization.operators import (
    ADDITIONS,
    AUGMENTED,
    find_tensors,
    list_spellings,
    map_tensors,
)

STABILIZER = 1e-6  # zennit's default epsilon


def stabilize(z: Tensor, epsilon: float = STABILIZER) -> Tensor:
    """Compute z + ε sign z, with sign 0 = +1 and sign -0 = -1: safe to divide by.

    Args:
        z: any shape.
        epsilon: ε, above 0.

    Returns:
        As z.
    """
    return torch.copysign(z.new_tensor(epsilon), z).add_(z)


SUBTRACTIONS = list_spellings("sub", "subtract", "__sub__")
REVERSED_SUBTRACTIONS = list_spellings("rsub", "__rsub__")

PASSED = list_spellings(
    *(
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
    ),
    *(
        "sigmoid",
        "tanh",
        "softplus",
        "softsign",
        "logsigmoid",
        "prelu",
        "rrelu",
        "threshold",
        "clamp",
        "clip",
    ),
    *(
        "layer_norm",
        "group_norm",
        "instance_norm",
        "batch_norm",
        "rms_norm",
        "normalize",
        "local_response_norm",
    ),
    *("exp", "log", "sqrt", "rsqrt", "square", "pow", "__pow__", "abs", "erf", "log_softmax"),
)

ROUTED = list_spellings(
    *(
        "cat",
        "concat",
        "stack",
        "reshape",
        "view",
        "view_as",
        "flatten",
        "unflatten",
        "ravel",
        "transpose",
        "permute",
        "movedim",
    ),
    *(
        "swapaxes",
        "t",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "tile",
        "broadcast_to",
    ),
    *(
        "split",
        "chunk",
        "unbind",
        "tensor_split",
        "narrow",
        "select",
        "index_select",
        "gather",
        "take_along_dim",
    ),
    *(
        "__getitem__",
        "__setitem__",
        "where",
        "masked_fill",
        "pad",
        "roll",
        "flip",
        "unfold",
        "fold",
        "contiguous",
        "clone",
        "to",
    ),
    *(
        "float",
        "double",
        "type",
        "type_as",
        "detach",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
    ),
    *(
        "feature_dropout",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
    ),
    *(
        "adaptive_max_pool3d",
        "max",
        "amax",
        "min",
        "amin",
        "maximum",
        "minimum",
        "topk",
        "sort",
        "pixel_shuffle",
    ),
    *(
        "pixel_unshuffle",
        "channel_shuffle",
        "size",
        "dim",
        "numel",
        "stride",
        "is_floating_point",
        "register_hook",
        "copy_",
    ),
    *(
        "__len__",
        "__iter__",
        "item",
        "tolist",
        "new_zeros",
        "new_ones",
        "zeros_like",
        "ones_like",
        "identity",
        "positive",
    ),
)
ROUTED |= {getattr(Tensor, name).__get__ for name in ("T", "mT")}

PRODUCTS = list_spellings(
    "mul",
    "multiply",
    "__mul__",
    "__rmul__",
    "matmul",
    "__matmul__",
    "bmm",
    "mm",
    "einsum",
    "baddbmm",
)

LINEAR = PRODUCTS | list_spellings(
    *(
        "neg",
        "negative",
        "__neg__",
        "div",
        "divide",
        "__truediv__",
        "true_divide",
        "linear",
        "mean",
        "sum",
        "embedding",
    ),
    *(
        "embedding_bag",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "cumsum",
    ),
    *(
        "adaptive_avg_pool3d",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ),
    *("interpolate", "addmm", "lerp"),
)
LINEAR |= ADDITIONS | SUBTRACTIONS | REVERSED_SUBTRACTIONS


NUMERATOR_ONLY = list_spellings(
    "div", "divide", "__truediv__", "true_divide"
)  # a denominator is taken as a constant

ELEMENTWISE = (
    PASSED
    | SUBTRACTIONS
    | NUMERATOR_ONLY
    | list_spellings("mul", "multiply", "__mul__", "__rmul__", "_weight_norm")
)
ELEMENTWISE |= REVERSED_SUBTRACTIONS
LOOKUPS = list_spellings(
    "__getitem__", "index_select", "gather", "take", "take_along_dim", "embedding", "embedding_bag"
)


class PassRelevance(torch.autograd.Function):
    """(x, function) -> function(x) forward; the relevance of the output to x backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute function(x).

        Args:
            ctx: what backward is given again.
            x: any shape.
            function: one operator, with its other arguments bound.

        Returns:
            The operator's output.
        """
        z = function(x)
        return z.clone() if z.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else z

    @staticmethod
    def backward(ctx: Any, *R: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Hand the relevance of the output to x as it is.

        Args:
            ctx: what backward is given again.
            R: the relevance of the output.

        Returns:
            The relevance of x, and None for the function.
        """
        return R[0], None


class Source(torch.autograd.Function):
    """A parameter w forward; backward R / stabilise(w), so that its gradient times w is its
    relevance."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        """Copy w.

        Args:
            ctx: what backward is given again.
            w: a parameter, or what stands for one.

        Returns:
            The copy.
        """
        ctx.is_parameter = isinstance(w, torch.nn.Parameter)
        ctx.save_for_backward(w)
        return w.detach().clone()

    @staticmethod
    def backward(ctx: Any, *R: Tensor) -> Tensor:  # type: ignore[override]
        """Divide the relevance by the parameter.

        Args:
            ctx: what backward is given again.
            R: the relevance of w.

        Returns:
            R / stabilize(w) for a parameter, R for all else.
        """
        (w,) = ctx.saved_tensors
        return R[0] / stabilize(w) if ctx.is_parameter else R[0]


class ShareByContribution(torch.autograd.Function):
    """a + b forward; R_a = a R / stabilise(a + b), and so for b, backward: zennit's rule Norm for
    its layer Sum."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """Compute a + b.

        Args:
            ctx: what backward is given again.
            a: any shape.
            b: as a.

        Returns:
            The sum.
        """
        ctx.shares = a.clone(), b.clone()  # the model may overwrite its own
        return a + b

    @staticmethod
    def backward(ctx: Any, *R: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Share the relevance of the sum by what each summand contributed.

        Args:
            ctx: what backward is given again.
            R: the relevance of the sum.

        Returns:
            The relevances of a and of b.
        """
        a, b = ctx.shares
        ratio = R[0] / stabilize(a + b)
        return a * ratio, b * ratio


class FunctionalRules(TorchFunctionMode):
    """Within it, the backward pass of every operator propagates relevance instead of gradient.

    add: called for an addition of two tensors that both carry relevance. approximated: names of the
    operators met that have no LRP rule of their own and were passed by gradient times input.
    """

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.add = add
        self.paused = 0  # > 0 inside a module that has a rule of its own
        self.approximated: set[str] = set()

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        carriers = [tensor for tensor in find_tensors((args, kwargs)) if tensor.requires_grad]
        name = getattr(func, "__name__", str(func))
        if (
            self.paused
            or not carriers
            or (name in ("__get__", "__set__", "backward") and func not in ROUTED)
        ):
            return func(*args, **kwargs)
        if name in AUGMENTED:  # Python rebinds the name, so the out-of-place operator says the same
            return self.__torch_function__(AUGMENTED[name], types, args, kwargs)
        if (
            name.endswith("_")
            and not name.endswith("__")
            and func not in ROUTED
            and hasattr(Tensor, name[:-1])
        ):
            return args[0].copy_(
                self.__torch_function__(getattr(Tensor, name[:-1]), types, args, kwargs)
            )
        weights = [tensor for tensor in carriers if isinstance(tensor, torch.nn.Parameter)]
        if func not in LOOKUPS and all(_is_weight(tensor) for tensor in carriers):
            return _as_weight(self._weight(func, name, args, kwargs, carriers, weights))
        return self._propagated(func, name, args, kwargs, carriers, weights)

    def _propagated(
        self,
        func: Callable,
        name: str,
        args: Any,
        kwargs: Any,
        carriers: list[Tensor],
        weights: list,
    ) -> Any:
        if func in ROUTED and not weights:
            return func(*args, **kwargs)
        if func in ADDITIONS and not weights:
            return self._addition(func, args, kwargs, carriers)
        if func in SUBTRACTIONS | REVERSED_SUBTRACTIONS and len(carriers) == 1 and not weights:
            return self._subtraction(func, args, kwargs)
        if func in PASSED and carriers[0] is args[0]:
            kwargs.pop("inplace", None)
            in_place = any(arg is True for arg in args[1:])  # F.relu(x, True)
            x = Source.apply(args[0]) if weights else args[0]
            return PassRelevance.apply(
                x, lambda x: func(x.clone() if in_place else x, *args[1:], **kwargs)
            )
        return self._epsilon(func, name, args, kwargs, carriers)

    def _weight(
        self,
        func: Callable,
        name: str,
        args: Any,
        kwargs: Any,
        carriers: list[Tensor],
        weights: list,
    ) -> Any:
        """An operator all of whose carriers are weights: within f of ŵ = f(w)."""
        if func not in ELEMENTWISE or not isinstance(args[0], Tensor):
            return self._propagated(func, name, args, kwargs, carriers, weights)
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in carriers))
        kept = {id(tensor) for tensor in carriers if tensor.shape == shape}
        if not kept:
            return self._propagated(func, name, args, kwargs, carriers, weights)
        args, kwargs = (
            map_tensors(value, lambda tensor: tensor if id(tensor) in kept else tensor.detach())
            for value in (args, kwargs)
        )
        carriers = [tensor for tensor in find_tensors((args, kwargs)) if tensor.requires_grad]
        weights = [tensor for tensor in carriers if isinstance(tensor, torch.nn.Parameter)]
        if len(carriers) == 1 and (
            func in SUBTRACTIONS | REVERSED_SUBTRACTIONS or name == "_weight_norm"
        ):
            changed = map_tensors(
                args, lambda tensor: Source.apply(tensor) if tensor is carriers[0] else tensor
            )
            (x,) = [tensor for tensor in find_tensors(changed) if tensor.requires_grad]
            return PassRelevance.apply(
                x,
                lambda inner: func(
                    *map_tensors(changed, lambda t: inner if t is x else t), **kwargs
                ),
            )
        return self._propagated(func, name, args, kwargs, carriers, weights)

    def _subtraction(self, func: Callable, args: Any, kwargs: Any) -> Any:
        """Of a constant, or from one: x - c gets the gradient 1, which is R; of c - x only the sign
        is in the way."""
        a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
        if func in REVERSED_SUBTRACTIONS:
            a, b = b, a
        alpha = kwargs.get("alpha", 1)
        if isinstance(b, Tensor) and b.requires_grad:
            return torch.add(PassRelevance.apply(b, lambda b: b * -alpha), a)
        return torch.sub(a, b, alpha=alpha)

    def _addition(self, func: Callable, args: Any, kwargs: Any, carriers: list[Tensor]) -> Any:
        if len(carriers) < 2:
            return func(*args, **kwargs)  # a constant takes no relevance
        other = args[1] if len(args) > 1 else kwargs["other"]
        return self.add(args[0], other * kwargs["alpha"] if "alpha" in kwargs else other)

    def _epsilon(
        self, func: Callable, name: str, args: Any, kwargs: Any, carriers: list[Tensor]
    ) -> Any:
        flowing = {id(tensor) for tensor in carriers if not isinstance(tensor, torch.nn.Parameter)}
        if func in NUMERATOR_ONLY:
            flowing = {id(args[0])} & flowing
            args = (args[0], *(_detach_tensors(arg) for arg in args[1:]))
        taps: list[tuple[Tensor, Tensor]] = []

        def tap(tensor: Tensor) -> Tensor:
            if id(tensor) not in flowing:
                return tensor
            taps.append((tensor, tensor.view_as(tensor)))
            return taps[-1][1]

        result = func(*map_tensors(args, tap), **map_tensors(kwargs, tap))
        outputs = [
            tensor
            for tensor in find_tensors(result)
            if tensor.requires_grad and tensor.is_floating_point()
        ]
        told = name if func not in LINEAR and func not in ROUTED else None
        sharing = [x for x, _ in taps if not _is_weight(x)] or taps
        share = 1 / max(1, len(sharing)) if func in PRODUCTS else 1.0
        # A gradient is None where no relevance arrives.
        for x, copy in taps if outputs else []:
            part = 1.0 if _is_weight(x) and len(sharing) < len(taps) else share
            copy.register_hook(
                lambda g, x=x.detach().clone(), part=part: None if g is None else g * x * part
            )
        for z in outputs:
            z.register_hook(
                lambda R, z=z.detach().clone(): None if R is None else self._divided(R, z, told)
            )
        return result

    def _divided(self, R: Tensor, z: Tensor, told: str | None) -> Tensor:
        if told is not None:
            self.approximated.add(told)
        return R / stabilize(z)


def _detach_tensors(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, or computed from parameters only."""
    return isinstance(tensor, torch.nn.Parameter) or getattr(tensor, "is_computed_weight", False)


def _as_weight(result: Any) -> Any:
    for tensor in find_tensors(result):
        if tensor.requires_grad:
            tensor.is_computed_weight = True  # type: ignore[attr-defined]
    return result
