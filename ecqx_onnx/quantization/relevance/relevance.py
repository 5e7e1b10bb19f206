"""Relevances: how much each weight mattered to the output, by LRP with zennit's rules.

Layer-wise relevance propagation (LRP) starts with a relevance at the output and hands it down layer
by layer; which share goes where is the composite's business (zennit). What a weight carried on the
way is its relevance, in epsilon form for every layer:

    r_w = Σ w·x·R_z / (z + ε sign z) = w ⊙ ∂⟨z, R_z / stabilize(z)⟩/∂w            [ECQx, sec. 4]

It is taken on a shadow of the model that holds the background weights: r_w is proportional to w, so
a weight that is quantized to zero would have no relevance and could never regrow. The user's
modules are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ecqx_onnx.errors import DataError, InputError, ModelError, OptionError
from ecqx_onnx.quantization.objectives.losses import IGNORED
from ecqx_onnx.quantization.objectives.values import find_scores, list_tensors
from ecqx_onnx.quantization.parametrizations import (
    compute_effective_weight,
    copy_module,
    find_parametrized,
    merge_parametrizations,
)
from ecqx_onnx.quantization.relevance.functional import (
    FunctionalRules,
    ShareByContribution,
    stabilize,
)
from ecqx_onnx.quantization.relevance.zennit_import import import_zennit
from ecqx_onnx.quantization.relevance.zplus import PositiveContributions, run_with

Start = str | Callable[[Any, Any], Any]
STARTS = ("logit", "probability", "ones", "output")
RULED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
STOCK_FORWARDS = frozenset(kind.forward for kind in RULED)
UNRULED = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)  # their kernels are in functional.py


def _find_composite(name: str, low: Tensor, high: Tensor) -> Any:
    """The zennit composite of this name; low and high bound the inputs, for those with a box
    rule."""
    import_zennit()
    from zennit.composites import COMPOSITES

    if name not in COMPOSITES:
        raise OptionError(
            f"relevance '{name}' names no zennit composite: use one of "
            f"{', '.join(sorted(COMPOSITES))}, or none"
        )
    try:
        return COMPOSITES[name]()
    except TypeError:
        return COMPOSITES[name](low=low, high=high)


class Relevances:
    """LRP on a shadow of the model. `self(inputs, target)` gives r_w for each background weight,
    summed over the batch.

    composite: a name, or a zennit Composite without canonizers. start: the relevance at the output:
    "logit", "probability" or "ones" of the true class, "output" for each value of the first output
    as relevant as it is large, or a function (output, target) -> relevance, shaped as the output
    (or -> (tensor, its relevance) for models that return several). After a call, `rules` says for
    each weight which rule its layer used, `approximated` names the operators that were passed by
    gradient times input, and `failures` says for each weight whose layer's rule failed why it has
    no relevance.
    """

    def __init__(
        self, model: nn.Module, names: list[str], *, composite: Any, start: Start = "logit"
    ) -> None:
        if isinstance(start, str) and start not in STARTS:
            raise OptionError(
                f"start '{start}' is unknown: use one of {', '.join(STARTS)}, or a function of "
                "(output, target)"
            )
        import_zennit()
        from zennit.layer import Sum

        self.model, self.names, self.start = model, names, start
        self.rules: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.shadow = _make_shadow(model)
        self._failed: tuple[_Rule, Exception] | None = None  # the rule that has just failed
        for name, parameter in self.shadow.named_parameters():
            parameter.requires_grad_(name in names)
        self._sum = Sum()
        self._shares = False  # whether the composite's rule for sums is Norm
        self.to_inputs = (
            False  # whether relevance goes on to the model's inputs, where no weight waits for it
        )
        self._functional = FunctionalRules(add=self._add)
        self._low, self._high = torch.zeros(()), torch.zeros(())
        if isinstance(composite, str):
            composite = _find_composite(composite, self._low, self._high)
        if composite.canonizers:
            raise OptionError(
                f"composite {type(composite).__name__} has canonizers, which rewrite the very "
                "weights whose relevance is wanted: "
                "construct it without; residual additions and BatchNorm are taken care of"
            )
        self._composite: Any = composite

    @property
    def approximated(self) -> tuple[str, ...]:
        """Names of the operators met that have no LRP rule of their own, sorted."""
        return tuple(sorted(self._functional.approximated))

    def __call__(
        self, inputs: Any, target: Any, background: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """r_w per name: the weight's shape and dtype; None-free: a weight that no relevance reached
        is left out.

        inputs: the model's input, or a tuple / mapping of its arguments. background: name ->
        weights W.
        """
        while True:
            self._share_values(background)
            try:
                return self._propagate(inputs, target, background)
            except Exception:
                if self._failed is None:
                    raise
                rule, error = self._failed
                self._drop(rule, f"its layer's rule failed ({take_first_line(error)})")
            finally:
                for parameter in self.shadow.parameters():
                    parameter.grad = None

    def _propagate(
        self, inputs: Any, target: Any, background: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        dtype = next(iter(background.values())).dtype
        args, kwargs = _make_arguments(inputs, dtype)
        device = next(self.shadow.parameters()).device
        self._functional.paused, self._failed = 0, None
        self._set_input_bounds(args or tuple(kwargs.values()))
        with (
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(
                enabled=torch.backends.cudnn.enabled and not self._recurrent
            ),
        ):
            plain = self._attach_rules(args, kwargs) if self._composite is not None else None
            with self._functional:
                output = self.shadow(*args, **kwargs)
            if isinstance(plain, Tensor):
                _check_same(plain, output)
            output, R = start_relevance(output, target, self.start)
            torch.autograd.backward(output, R)
        found = {}
        for name, parameter in self.shadow.named_parameters():
            if name in background and parameter.grad is not None:
                gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                found[name] = background[name].detach() * gradient
        return found

    def _drop(self, rule: _Rule, reason: str) -> None:
        """Without this layer's rule: its weights get no relevance, and what crosses it goes by its
        operators' own."""
        rule.detach()
        names = {id(parameter): name for name, parameter in self.shadow.named_parameters()}
        if not rule.weights:
            self.failures[rule.name] = reason
        for weight in rule.weights:
            weight.requires_grad_(False)
            self.rules.pop(names[id(weight)], None)
            self.failures[names[id(weight)]] = reason

    @property
    def _recurrent(self) -> bool:
        return any(
            isinstance(module, nn.RNNBase) for module in self.shadow.modules()
        )  # cuDNN's backward wants train mode

    def _share_values(self, background: Mapping[str, Tensor]) -> None:
        """The shadow's parameters and buffers become views of the background's and the model's:
        nothing is copied."""
        values: dict[str, Tensor] = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
            **background,
        }
        computed = {entry.name: entry for entry in find_parametrized(self.model)}
        for name, tensor in (*self.shadow.named_parameters(), *self.shadow.named_buffers()):
            if name in computed and name not in background:
                tensor.data = compute_effective_weight(self.model, computed[name])
            else:
                tensor.data = values[name].data

    def _set_input_bounds(self, inputs: tuple) -> None:
        x = next(
            (x for x in inputs if isinstance(x, Tensor) and x.is_floating_point() and x.numel()),
            None,
        )
        if x is not None:  # the box rule's composite holds these two tensors
            self._low.data, self._high.data = x.detach().amin(), x.detach().amax()

    def _add(self, a: Tensor, b: Tensor) -> Tensor:
        if self._shares:
            return ShareByContribution.apply(*torch.broadcast_tensors(a, b))
        return self._sum(torch.stack(torch.broadcast_tensors(a, b), dim=-1))

    def _attach_rules(self, args: tuple, kwargs: dict) -> Any:
        """Ask the composite for each module's rule, in the order in which they run; returns the
        model's plain output.

        The order matters to composites with a special first layer: it is the first that runs, and
        there is none behind an embedding or a recurrent layer.
        """
        from zennit.composites import SpecialFirstLayerMapComposite
        from zennit.rules import Norm, ZPlus

        composite, self._composite = self._composite, None
        order, unlike, plain = _record_running_order(self.shadow, args, kwargs)
        names = {id(parameter): name for name, parameter in self.shadow.named_parameters()}
        context: dict = {}
        matched = False
        for name, module in (*order, ("", self._sum)):
            if isinstance(module, UNRULED):
                if isinstance(composite, SpecialFirstLayerMapComposite):
                    context["first_layer_visited"] = True
                continue
            if module in unlike:  # its operators carry the relevance
                matched = True
                continue
            template = composite.module_map(context, name, module)
            if template is None:
                continue
            if module is self._sum and type(template) is Norm:
                self._shares = True
                continue
            weights = [
                parameter
                for parameter in module.parameters(recurse=False)
                if parameter.requires_grad
            ]
            for weight in weights:
                self.rules[names[id(weight)]] = type(template).__name__
            matched = matched or bool(weights)
            template = PositiveContributions() if type(template) is ZPlus else template
            _Rule(self, name, module, template, weights)
        if not matched and any(isinstance(module, RULED) for _, module in order):
            raise OptionError(
                f"composite {type(composite).__name__} has no rule for any of the "
                f"{len(self.names)} quantised layers: "
                "use epsilon_plus_flat, or relevance none"
            )
        return plain


def _record_running_order(
    shadow: nn.Module, args: tuple, kwargs: dict
) -> tuple[list[tuple[str, nn.Module]], set[nn.Module], Any]:
    """(modules by name, those that ran first in the order they ran; those that are no layer a rule
    can be for; the output)."""
    ran: dict[nn.Module, None] = {}
    unlike: set[nn.Module] = set()

    def compare(module: nn.Module, inputs: tuple, output: Any) -> None:
        if module not in unlike and not _is_additive(module, inputs, output):
            unlike.add(module)

    own = [
        module
        for module in shadow.modules()
        if isinstance(module, RULED) and not _has_stock_forward(module)
    ]
    handles = [
        module.register_forward_pre_hook(lambda module, _: ran.setdefault(module))
        for module in shadow.modules()
    ]
    handles += [module.register_forward_hook(compare) for module in own]
    with torch.no_grad():
        output = shadow(*args, **kwargs)
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in shadow.named_modules()}
    others = [module for module in names if module not in ran]
    order = [(names[module], module) for module in (*ran, *others)]
    return order, unlike, output


def _has_stock_forward(module: nn.Module) -> bool:
    kind: Any = type(module)
    kernels = {getattr(stock, "_conv_forward", None) for stock in RULED}
    return kind.forward in STOCK_FORWARDS and getattr(kind, "_conv_forward", None) in kernels


def _is_additive(module: nn.Module, inputs: tuple, output: Any) -> bool:
    """Whether a forward of the user's own is that of its layer in its weight, z(w+) + z(w-) = z(w):
    what every rule builds on.

    A standardised weight is not: gradient times input would then sum to zero.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(output, Tensor) or len(inputs) != 1 or not isinstance(weight, Tensor):
        return False
    try:
        parts = run_with(module, weight.clamp(min=0), bias, *inputs) + run_with(
            module, weight.clamp(max=0), None, *inputs
        )
    except Exception:  # the user's own code, which may want anything of its weight
        return False
    return torch.allclose(
        parts, output, rtol=1e-3, atol=1e-3 * float(output.abs().amax()) if output.numel() else 0.0
    )


def _check_same(plain: Tensor, output: Any) -> None:
    """Out-of-place rules must not change what the model computes; looked at once, on the first
    batch."""
    if not isinstance(output, Tensor) or not torch.allclose(
        plain, output, rtol=1e-3, atol=1e-4, equal_nan=True
    ):
        raise ModelError(
            f"the model computes something else under relevance propagation (outputs differ by "
            f"{float((plain - output).abs().max()):.3g}): it probably relies on an in-place "
            "operation whose result it does "
            "not assign; write `x = op(x)`, or use relevance=None"
        )


class _Rule:
    """Runs one module of the shadow under one zennit rule, with a fresh copy of the rule for each
    call of the module."""

    def __init__(
        self,
        owner: Relevances,
        name: str,
        module: nn.Module,
        template: Any,
        weights: list[nn.Parameter],
    ) -> None:
        self.owner, self.name, self.template, self.weights = (
            owner,
            name or "additions",
            template,
            weights,
        )
        self.calls: list[Tensor] = []
        self.handles = (
            module.register_forward_pre_hook(self._noting(self.before), with_kwargs=True),
            module.register_forward_hook(self._noting(self.after)),
        )

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _noting(self, function: Callable) -> Callable:
        """The function; where it fails, the owner is told which rule it was."""

        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                self.owner._failed = self, error
                raise

        return call

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if not args:
            args, kwargs = (
                (kwargs["input"],),
                {key: value for key, value in kwargs.items() if key != "input"},
            )
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        self.calls.append(x)
        self.owner._functional.paused += 1
        # Cut off from the graph: only the weights' part of it is recorded, the input's is the
        # rule's business.
        return (
            x.detach().clone() if getattr(module, "inplace", False) else x.detach(),
            *args[1:],
        ), kwargs

    def after(self, module: nn.Module, args: tuple, z: Tensor) -> Any:
        self.owner._functional.paused -= 1
        rule = self.template.copy()
        rule.forward(module, (args[0],), z)
        x = self.calls.pop()
        goes_on = self.owner.to_inputs or _has_weights_before(x)
        if not goes_on:  # nothing before x is called, which would be handed None
            x = x.detach().requires_grad_()
        # What is needed again must survive the model's in-place operations on it.
        again = (
            self.weights or z.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        )
        output = [z.detach().clone() if again else z.detach()]
        backward = self._noting(lambda R: self.backward(rule, module, args[0], z, R, goes_on))
        return _Propagate.apply(x, output, backward)

    def backward(
        self, rule: Any, module: nn.Module, x: Tensor, z: Tensor, R: Tensor, goes_on: bool
    ) -> Tensor | None:
        weights = [weight for weight in self.weights if weight.requires_grad]
        if z.requires_grad and weights:
            # r_w = w ⊙ ∂⟨z, R / stabilise(z)⟩/∂w: the gradient gathers in w.grad over calls and
            # ties, w comes last
            torch.autograd.backward(z, R / stabilize(z.detach()), inputs=weights)
        return rule.backward(module, (x,), (R,))[0] if goes_on else None


def _has_weights_before(x: Tensor) -> bool:
    """Whether relevance at x has a weight, or a module under a rule, to go to; else it would only
    end at the model's inputs."""
    seen, ahead = set(), [x.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "_PropagateBackward" or isinstance(
            getattr(node, "variable", None), nn.Parameter
        ):
            return True
        ahead += [before for before, _ in node.next_functions]
    return False


class _Propagate(torch.autograd.Function):
    """(x, [z], rule) -> z forward; R_x = rule(R_z) backward. In its list, z is no input of this
    function, and may be returned."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: list[Tensor], rule: Callable[[Tensor], Tensor | None]
    ) -> Tensor:
        ctx.rule = rule
        return z.pop()

    @staticmethod
    def backward(ctx: Any, *R: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        rule, ctx.rule = ctx.rule, None
        return rule(R[0]), None, None


def start_relevance(output: Any, target: Any, start: Start) -> tuple[Tensor, Tensor]:
    """Start the relevance at the output.

    Args:
        output: what the model returned: float [N, classes, ...], or what `start` takes.
        target: int64 [N, ...], the classes, or what `start` takes.
        start: "logit", "probability", "ones", "output", or a function (output, target).

    Returns:
        The output tensor, and its relevance of the same shape.

    Raises:
        DataError: the targets do not fit the output.
        ModelError: the output is no tensor, and `start` no function.
    """
    if callable(start):
        answer = start(output, target)
        output, R = answer if isinstance(answer, tuple) else (output, answer)
        if not isinstance(R, Tensor) or not isinstance(output, Tensor) or R.shape != output.shape:
            raise DataError(
                f"the start function gave a relevance of shape {tuple(getattr(R, 'shape', ()))} "
                "for an output of shape "
                f"{tuple(getattr(output, 'shape', ()))}: they must be equal"
            )
        return output, R.detach().to(output.dtype)
    if start == "output":
        scores = find_scores(output)
        return scores, scores.detach()
    found = list_tensors(output)
    if "logits" in found or len(found) == 1:  # as Hugging Face's models call them; the only one
        output = find_scores(output)
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the model returns a {type(output).__name__}: give start=function(output, target) -> "
            "(tensor, its relevance)"
        )
    R = _choose_true_class(output, target, start)
    if start == "logit":
        return output, output.detach() * R
    if start == "probability":
        return output, F.softmax(output.detach(), dim=_find_class_axis(output, target)) * R
    return output, R


def _find_class_axis(output: Tensor, target: Tensor) -> int | None:
    """Where the classes lie: [N, C, ...], or [N, ..., C] as language models have them; or None."""
    if output.ndim >= 2 and target.shape == (output.shape[0], *output.shape[2:]):
        return 1
    if output.ndim >= 3 and target.shape == output.shape[:-1]:
        return -1
    return None


def _choose_true_class(output: Tensor, target: Any, start: str) -> Tensor:
    """One at each true class, of the output's shape; nothing where the target is -100 (padding)."""
    is_class = isinstance(target, Tensor) and not target.is_floating_point()
    axis = _find_class_axis(output, target) if is_class else None
    if axis is None:
        raise DataError(
            f"start '{start}' needs one class index per sample, shape "
            f"{(output.shape[0], *output.shape[2:])}, and got "
            f"{_describe_target(target)}: for other tasks give start='output', or "
            "start=function(output, target)"
        )
    counted = target != IGNORED
    classes = target.long() * counted
    low = int(classes.min()) if target.numel() else 0
    high = int(classes.max()) if target.numel() else 0
    if low < 0 or high >= output.shape[axis]:
        raise DataError(
            f"targets run from {low} to {high}, the output has {output.shape[axis]} classes"
        )
    mark = counted.to(output.dtype).unsqueeze(axis)
    return torch.zeros_like(output).scatter_(axis, classes.unsqueeze(axis), mark)


def take_first_line(error: Exception) -> str:
    """Tell what failed in one line of at most some 300 characters.

    Args:
        error: a sentence of ours is told as it is, else its type comes first.

    Returns:
        The line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines or [""])[0][:300]
    if isinstance(error, InputError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _describe_target(target: Any) -> str:
    if isinstance(target, Tensor):
        return f"{target.dtype} of shape {tuple(target.shape)}"
    return f"a {type(target).__name__}"


def _make_shadow(model: nn.Module) -> nn.Module:
    scripted = [
        name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)
    ]
    if scripted:
        raise ModelError(
            f"'{scripted[0] or type(model).__name__}' is TorchScript, which relevances cannot look "
            "into: give the module that it"
            " was made from, or use relevance=None"
        )
    try:
        shadow = copy_module(model).eval()
    except Exception as error:  # a copy runs any module's own code
        raise ModelError(
            f"the model cannot be copied, which relevances need ({error}): use relevance=None"
        ) from error
    merge_parametrizations(shadow)  # rules are for layers that hold their weight
    return shadow


def _make_arguments(inputs: Any, dtype: torch.dtype) -> tuple[tuple, dict]:
    """Positional and keyword arguments, floating tensors as fresh leaves that carry relevance."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_()

    if isinstance(inputs, Mapping):
        return (), {key: leaf(value) for key, value in inputs.items()}
    return tuple(
        leaf(value) for value in (inputs if isinstance(inputs, (tuple, list)) else (inputs,))
    ), {}
