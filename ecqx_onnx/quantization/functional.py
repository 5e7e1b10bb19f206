"""Operators that no module wraps (`a + b`, `F.relu`, `x.mean(-1)`, an LSTM's kernel) -> how relevance passes through them.

The shadow's forward runs inside `FunctionalRules`, which sees each operator as it is executed; so control flow, nested functions
and code that no tracer understands are all covered. There are four ways through an operator:

    addition   two tensors that both carry relevance: zennit.layer.Sum, under the composite's rule for it (Norm)
    pass       activations and normalisations, output shaped as the input: R_x = R_z
    routing    each output entry is a copy of an input entry (reshape, cat, max pooling): plain gradient
    epsilon    everything else: R_x = x ⊙ ∂⟨z, R_z / stabilise(z)⟩/∂x. For an operator linear in x that is LRP-epsilon; a product
               shares R_z among its factors, and softmax comes out as in AttnLRP (arXiv 2402.05602). For a kernel that is
               neither (lstm, gru, attention) it is gradient times input, which need not conserve relevance: see `approximated`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

STABILIZER = 1e-6  # zennit's default epsilon


def stabilize(z: Tensor, epsilon: float = STABILIZER) -> Tensor:
    """z + ε sign z, with sign 0 = +1 and sign -0 = -1: safe to divide by."""
    return torch.copysign(z.new_tensor(epsilon), z).add_(z)


def spellings(*names: str) -> frozenset[Callable]:
    """Every spelling of these operators: torch.x, torch.nn.functional.x and Tensor.x."""
    homes = (torch, F, Tensor)
    return frozenset(getattr(home, name) for home in homes for name in names if hasattr(home, name))


ADDITIONS = spellings("add", "__add__", "__radd__")

PASSED = spellings(
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardtanh", "hardswish", "hardsigmoid"),
    *("sigmoid", "tanh", "softplus", "softsign", "logsigmoid", "prelu", "rrelu", "threshold", "clamp", "clip"),
    *("layer_norm", "group_norm", "instance_norm", "batch_norm", "rms_norm", "normalize", "local_response_norm"),
    *("exp", "log", "sqrt", "rsqrt", "square", "pow", "__pow__", "abs", "erf", "log_softmax"),
)

ROUTED = spellings(
    *("cat", "concat", "stack", "reshape", "view", "view_as", "flatten", "unflatten", "ravel", "transpose", "permute", "movedim"),
    *("swapaxes", "t", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "tile", "broadcast_to"),
    *("split", "chunk", "unbind", "tensor_split", "narrow", "select", "index_select", "gather", "take_along_dim"),
    *("__getitem__", "__setitem__", "where", "masked_fill", "pad", "roll", "flip", "unfold", "fold", "contiguous", "clone", "to"),
    *("float", "double", "type", "type_as", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
    *("feature_dropout", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
    *("adaptive_max_pool3d", "max", "amax", "min", "amin", "maximum", "minimum", "topk", "sort", "pixel_shuffle"),
    *("pixel_unshuffle", "channel_shuffle", "size", "dim", "numel", "stride", "is_floating_point", "register_hook", "copy_"),
    *("__len__", "__iter__", "item", "tolist", "new_zeros", "new_ones", "zeros_like", "ones_like", "identity", "positive"),
)

PRODUCTS = spellings("mul", "multiply", "__mul__", "__rmul__", "matmul", "__matmul__", "bmm", "mm", "einsum", "baddbmm")

LINEAR = PRODUCTS | spellings(
    *("sub", "__sub__", "__rsub__", "neg", "__neg__", "div", "__truediv__", "true_divide", "linear", "mean", "sum", "embedding"),
    *("embedding_bag", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "cumsum"),
    *("adaptive_avg_pool3d", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("interpolate", "softmax", "addmm", "lerp"),
)

NUMERATOR_ONLY = spellings("div", "__truediv__", "true_divide")  # a denominator is taken as a constant

AUGMENTED = {f"__i{name}__": getattr(Tensor, f"__{name}__") for name in ("add", "sub", "mul", "truediv")}


class PassRelevance(torch.autograd.Function):
    """(x, function) -> function(x) forward; the relevance of the output to x backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        z = function(x)
        return z.clone() if z.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else z

    @staticmethod
    def backward(ctx: Any, *R: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return R[0], None


class ShareByContribution(torch.autograd.Function):
    """a + b forward; R_a = a R / stabilise(a + b), and so for b, backward: zennit's rule Norm for its layer Sum."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.shares = a.clone(), b.clone()  # the model may overwrite its own
        return a + b

    @staticmethod
    def backward(ctx: Any, *R: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.shares
        ratio = R[0] / stabilize(a + b)
        return a * ratio, b * ratio


class FunctionalRules(TorchFunctionMode):
    """Within it, the backward pass of every operator propagates relevance instead of gradient.

    add: called for an addition of two tensors that both carry relevance. approximated: names of the operators met that have no
    LRP rule of their own and were passed by gradient times input.
    """

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.add = add
        self.paused = 0  # > 0 inside a module that has a rule of its own
        self.approximated: set[str] = set()

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        carriers = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        name = getattr(func, "__name__", str(func))
        if self.paused or not carriers or name in ("__get__", "__set__", "backward"):
            return func(*args, **kwargs)
        if name in AUGMENTED:  # Python rebinds the name, so the out-of-place operator says the same
            return self.__torch_function__(AUGMENTED[name], types, args, kwargs)
        if name.endswith("_") and not name.endswith("__") and func not in ROUTED and hasattr(Tensor, name[:-1]):
            return args[0].copy_(self.__torch_function__(getattr(Tensor, name[:-1]), types, args, kwargs))
        weights = [tensor for tensor in carriers if isinstance(tensor, torch.nn.Parameter)]
        if func in ROUTED and not weights:
            return func(*args, **kwargs)
        if func in ADDITIONS and not weights:
            return self._addition(func, args, kwargs, carriers)
        if func in PASSED and carriers[0] is args[0]:
            kwargs.pop("inplace", None)
            in_place = any(arg is True for arg in args[1:])  # F.relu(x, True)
            return PassRelevance.apply(args[0], lambda x: func(x.clone() if in_place else x, *args[1:], **kwargs))
        return self._epsilon(func, name, args, kwargs, carriers)

    def _addition(self, func: Callable, args: Any, kwargs: Any, carriers: list[Tensor]) -> Any:
        if len(carriers) < 2:
            return func(*args, **kwargs)  # a constant takes no relevance
        other = args[1] if len(args) > 1 else kwargs["other"]
        return self.add(args[0], other * kwargs["alpha"] if "alpha" in kwargs else other)

    def _epsilon(self, func: Callable, name: str, args: Any, kwargs: Any, carriers: list[Tensor]) -> Any:
        flowing = {id(tensor) for tensor in carriers if not isinstance(tensor, torch.nn.Parameter)}
        if func in NUMERATOR_ONLY:
            flowing = {id(args[0])} & flowing
            args = (args[0], *(_detached(arg) for arg in args[1:]))
        taps: list[tuple[Tensor, Tensor]] = []

        def tap(tensor: Tensor) -> Tensor:
            if id(tensor) not in flowing:
                return tensor
            taps.append((tensor, tensor.view_as(tensor)))
            return taps[-1][1]

        result = func(*mapped(args, tap), **mapped(kwargs, tap))
        outputs = [tensor for tensor in tensors_in(result) if tensor.requires_grad and tensor.is_floating_point()]
        if outputs and func not in LINEAR:
            self.approximated.add(name)
        share = 1 / max(1, len(taps)) if func in PRODUCTS else 1.0
        for x, copy in taps if outputs else []:
            copy.register_hook(lambda gradient, x=x.detach().clone(): gradient * x * share)
        for z in outputs:
            z.register_hook(lambda R, z=z.detach().clone(): R / stabilize(z))
        return result


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(item, function) for item in value)
    return value


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
