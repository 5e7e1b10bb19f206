"""Relevances against LRP by hand, against zennit's own hooks, and conserved on models as people
write them."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from ecqx_onnx.errors import DataError, ModelError, OptionError
from ecqx_onnx.quantization.relevance.relevance import Relevances, start_relevance
from ecqx_onnx.quantization.relevance.zennit_import import import_zennit
from ecqx_onnx.quantization.relevance.zplus import PositiveContributions
from tests.oracles import lrp as oracle

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

zennit = import_zennit()


def relevances_of(model, x, y, *, composite="epsilon_plus_flat", start="ones", names=None):
    model.eval()
    background = {
        n: p.detach()
        for n, p in model.named_parameters()
        if p.ndim >= 2 and (names is None or n in names)
    }
    relevances = Relevances(model, list(background), composite=composite, start=start)
    return relevances(x, y, background), relevances


class KeywordNet(nn.Module):
    """Conv without padding, strided conv, two dense layers: everything that the hand oracle
    covers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 3, 3)
        self.second = nn.Conv1d(3, 4, 2, stride=2)
        self.hidden = nn.Linear(12, 6)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.second(torch.relu(self.first(x))))
        return self.last(F.relu(self.hidden(torch.flatten(x, 1))))


@pytest.mark.parametrize("start", ["logit", "ones", "probability"])
def test_weight_relevances_equal_lrp_by_hand(start):
    torch.manual_seed(0)
    model = KeywordNet().double()
    x, y = torch.randn(3, 2, 8, dtype=torch.float64), torch.tensor([4, 0, 2])
    found, _ = relevances_of(model, x, y, start=start)

    value = {name: p.detach().numpy().reshape(-1) for name, p in model.named_parameters()}
    first, p1 = oracle.conv_connections(2, 3, 8, 3, 1)
    second, p2 = oracle.conv_connections(3, 4, p1, 2, 2)
    hidden, last = oracle.dense_connections(12, 6), oracle.dense_connections(6, 5)
    biases = {
        "first": np.repeat(value["first.bias"], p1),
        "second": np.repeat(value["second.bias"], p2),
        "hidden": value["hidden.bias"],
        "last": value["last.bias"],
    }
    layers = [("first", first), ("second", second), ("hidden", hidden), ("last", last)]
    expected = {f"{name}.weight": 0.0 for name, _ in layers}
    for sample, target in zip(x.numpy().reshape(3, -1), y.tolist(), strict=True):
        inputs, outputs = {}, {}
        a = sample
        for name, connections in layers:
            inputs[name] = a
            outputs[name] = oracle.forward(a, connections, biases[name], value[f"{name}.weight"])
            a = np.maximum(outputs[name], 0)
        logits = outputs["last"]
        R = np.zeros(5)
        R[target] = {
            "ones": 1.0,
            "logit": logits[target],
            "probability": (np.exp(logits) / np.exp(logits).sum())[target],
        }[start]
        for name, connections in reversed(layers):
            weights = value[f"{name}.weight"]
            r = oracle.weight_relevance(
                inputs[name], connections, biases[name], outputs[name], R, weights
            )
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + r
            rule = oracle.z_plus_rule if name == "second" else oracle.epsilon_rule
            if name != "first":
                R = rule(inputs[name], connections, biases[name], weights, R)
    for name, r in expected.items():
        np.testing.assert_allclose(
            found[name].numpy().reshape(-1), r, rtol=1e-9, atol=1e-12, err_msg=name
        )


def test_input_relevance_equals_zennits_own_attribution():
    """The same rules, attached by zennit's Composite.register, give the same relevance at the input
    of a residual net."""
    torch.manual_seed(1)

    class Residual(nn.Module):
        def __init__(self, add):
            super().__init__()
            self.stem, self.inner, self.last = (
                nn.Conv2d(1, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Linear(4, 3),
            )
            self.pool, self.relu = nn.AdaptiveAvgPool2d(1), nn.ReLU()
            self.sum = zennit.layer.Sum()
            self.add = add

        def forward(self, x):
            x = self.relu(self.stem(x))
            y = self.inner(x)
            y = self.sum(torch.stack([y, x], dim=-1)) if self.add == "Sum" else y + x
            return self.last(self.pool(self.relu(y)).flatten(1))

    model = Residual("Sum").double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 2])
    with zennit.composites.EpsilonPlusFlat().context(model) as hooked:
        output = hooked(x)
        (expected,) = torch.autograd.grad(output, x, F.one_hot(y, 3).double())

    model.add = "+"
    captured = {}
    relevances = Relevances(model, ["stem.weight"], composite="epsilon_plus_flat", start="ones")
    relevances.to_inputs = True
    relevances.shadow.register_forward_pre_hook(
        lambda module, args: args[0].register_hook(lambda R: captured.setdefault("R", R)) and None
    )
    relevances(x, y, {"stem.weight": model.stem.weight.detach()})
    torch.testing.assert_close(captured["R"], expected, rtol=1e-10, atol=1e-13)


class Functional(nn.Module):
    """No module for any addition, activation, pooling or concatenation."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8)
        self.depthwise, self.last = (
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.Linear(16, 5, bias=False),
        )
        self.layer_norm = nn.LayerNorm(16)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        y = self.norm(x)
        x = F.relu(self.depthwise(x)) + x
        x += y
        x.mul_(0.5)
        x = torch.cat([F.avg_pool2d(x, 2), F.max_pool2d(x, 2)], dim=1)
        return self.last(self.layer_norm(x.mean((2, 3))))


class Gated(nn.Module):
    """Squeeze and excitation: a product of two tensors that both depend on the input."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = (
            nn.Linear(6, 8, bias=False),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 3, bias=False),
        )

    def forward(self, x):
        x = F.silu(self.first(x))
        return self.last(x * torch.sigmoid(self.gate(x)))


class Reused(nn.Module):
    """One module called three times, and a tied weight: relevance adds up over the calls."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (
            nn.Linear(6, 6, bias=False),
            nn.Linear(6, 6, bias=False),
            nn.Linear(6, 3, bias=False),
        )

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = F.relu(self.again(x))
        return self.last(x)


def whole_model(name):
    """(model, input shape): no bias, BatchNorm without a shift (which is a bias), with statistics
    that keep every depth alive."""
    torch.manual_seed(3)
    if name in SMALL:
        return SMALL[name][0](), SMALL[name][1]
    if name.endswith(".py"):
        module = importlib.import_module(f"models.{name.removesuffix('.py')}")
        model, shape = getattr(module, module.__name__.rpartition(".")[2])(), module.INPUT_SHAPE
    else:
        import torchvision.models

        model, shape = getattr(torchvision.models, name)(num_classes=10), (3, 64, 64)
    if name == "vgg11_bn":  # its 25088 x 4096 dense layer says nothing more than a small one
        model.avgpool, model.classifier[0] = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 4096)
    norms = [
        module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
    ]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()
        model.train()(torch.randn(8, *shape))
        for norm in norms:
            norm.running_mean.zero_()
    return model, shape


SMALL = {"Functional": (Functional, (3, 8, 8)), "Gated": (Gated, (6,)), "Reused": (Reused, (6,))}
OURS = sorted(path.name for path in (Path(__file__).parents[1] / "models").glob("*.py"))
OURS.remove("mobilenet_v3.py")  # torchvision's, and no network of ours


@pytest.mark.parametrize("name", [*SMALL, *OURS, "resnet18", "mobilenet_v2", "vgg11_bn"])
def test_relevance_is_conserved_from_the_output_to_the_first_layer(name):
    model, shape = whole_model(name)
    found, relevances = relevances_of(model, torch.randn(2, *shape), torch.tensor([1, 2]))
    total = [float(r.sum()) for r in found.values()]
    assert total[0] == pytest.approx(2.0, rel=0.01)
    assert total[-1] == pytest.approx(2.0, rel=0.01)
    assert relevances.approximated == ()


def test_a_module_called_three_times_carries_the_relevance_three_times():
    torch.manual_seed(4)
    found, _ = relevances_of(Reused(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert float(found["again.weight"].sum()) == pytest.approx(
        3 * float(found["first.weight"].sum()), rel=1e-3
    )


def test_without_the_sum_rule_relevance_would_double_at_a_residual_addition():
    """The planted error: the same net with additions left to the gradient."""
    torch.manual_seed(5)
    model = Functional()
    names = [n for n, p in model.named_parameters() if p.ndim >= 2]
    relevances = Relevances(model.eval(), names, composite="epsilon_plus_flat", start="ones")
    relevances._functional.add = torch.add
    found = relevances(
        torch.randn(2, 3, 8, 8),
        torch.tensor([0, 1]),
        {n: dict(model.named_parameters())[n].detach() for n in names},
    )
    assert float(found["first.weight"].sum()) > 2.5


class Standardized(nn.Conv2d):
    """Its weight is standardised in each forward pass: gradient times input through that sums to
    zero."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias)


class WeightStandardized(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (
            Standardized(3, 8, 3),
            Standardized(8, 8, 3),
            nn.Linear(8, 4),
        )

    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


class OwnMatrix(nn.Module):
    """A bare matrix between two layers; `use` says how it is multiplied."""

    def __init__(self, use):
        super().__init__()
        self.first, self.matrix, self.last = (
            nn.Linear(6, 8),
            nn.Parameter(0.3 * torch.randn(8, 8)),
            nn.Linear(8, 3),
        )
        self.use = use

    def forward(self, x):
        return self.last(F.relu(self.use(F.relu(self.first(x)), self.matrix)))


WAYS = {
    "transposed": lambda x, w: x @ w.t(),
    "scaled": lambda x, w: F.linear(x, w * 0.125),
    "centered": lambda x, w: x @ (w - w.mean(0, keepdim=True)),
    "normalized": lambda x, w: 10 * x @ F.normalize(w, dim=0),
    "divided by its norm": lambda x, w: x @ (w / w.norm(dim=1, keepdim=True)).T,
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "grouped": lambda x, w: (x.reshape(-1, 2, 1, 4) @ w.reshape(2, 2, 4, 4).sum(1)).reshape(-1, 8),
    "addmm": lambda x, w: torch.addmm(torch.zeros(8), x, w),
    "functional weight_norm": lambda x, w: F.linear(
        x, torch._weight_norm(w, w.detach().norm(dim=1, keepdim=True), 0)
    ),
}


class Difference(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(6, n) for n in (6, 6, 6, 3))

    def forward(self, x):
        x = F.relu(self.first(1 - (x - 0.5) / 0.25))
        a, b = self.a(x), self.b(x)
        return self.last((a - b) * (a - b) + (1 - torch.sigmoid(a)) * b)


class ConvLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gates, self.last = nn.Conv2d(2 + 4, 16, 3, padding=1), nn.Linear(4, 3)
        self.gates.weight.data *= 4  # far from the stabiliser

    def forward(self, x):
        h = c = x.new_zeros(len(x), 4, *x.shape[3:])
        for step in x.unbind(1):
            i, f, o, g = self.gates(torch.cat([step, h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.last(h.mean((2, 3)))


WRITTEN = {
    "WeightStandardized": (WeightStandardized, (3, 9, 9)),
    "Difference": (Difference, (6,)),
    "ConvLstm": (ConvLstm, (3, 2, 5, 5)),
    **{name: (lambda use=use: OwnMatrix(use), (6,)) for name, use in WAYS.items()},
}


@pytest.mark.parametrize("name", list(WRITTEN))
def test_relevance_is_conserved_down_to_the_input_of_models_that_compute_with_their_weights(name):
    torch.manual_seed(3)
    make, shape = WRITTEN[name]
    model = make()
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    for bias in biases:
        bias.data.zero_()
    # Flat, the first layer's rule, hands a convolution's share on to inputs that are zero, which
    # the first state is
    captured, composite = [], "epsilon_plus" if name == "ConvLstm" else "epsilon_plus_flat"
    background = {n: p.detach() for n, p in model.named_parameters() if p.ndim >= 2}
    relevances = Relevances(model, list(background), composite=composite, start="ones")
    relevances.to_inputs = True
    relevances.shadow.register_forward_pre_hook(
        lambda module, args: args[0].register_hook(captured.append) and None
    )
    found = relevances(torch.randn(2, *shape), torch.tensor([1, 2]), background)
    assert relevances.approximated == ()
    assert float(captured[0].sum()) == pytest.approx(2.0, rel=0.01)
    assert float(found["last.weight"].sum()) == pytest.approx(2.0, rel=0.01)
    for weight in ("matrix", "first.weight", "second.weight"):
        if weight in found:
            assert float(found[weight].sum()) == pytest.approx(2.0, rel=0.01), weight


def test_softmax_and_a_constant_divided_by_a_layer_are_told_as_relevance_is_not_conserved_there():
    class Dividing(Gated):
        def forward(self, x):
            x = F.silu(self.first(x))
            return self.last(2 / (1 + torch.softmax(self.gate(x), 1)))

    torch.manual_seed(3)
    _, relevances = relevances_of(Dividing(), torch.randn(2, 6), torch.tensor([1, 2]))
    assert relevances.approximated == ("__rdiv__", "softmax")


def test_a_layer_whose_own_forward_is_additive_in_its_weight_keeps_its_rule():
    class Doubling(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 2, self.bias)

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Doubling(6, 3))
    _, relevances = relevances_of(model, torch.randn(2, 6), torch.tensor([1, 2]))
    assert relevances.rules == {"0.weight": "Flat", "2.weight": "Epsilon"}


@pytest.mark.parametrize("negative_inputs", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_our_z_plus_is_zennits(negative_inputs, bias):
    torch.manual_seed(12)
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias).double()
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    x = x if negative_inputs else x.relu()
    R = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    stock = zennit.rules.ZPlus()
    stock.forward(layer, (x,), None)
    torch.testing.assert_close(
        PositiveContributions().backward(layer, (x,), (R,)), stock.backward(layer, (x,), (R,))
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.last = (
            nn.Embedding(10, 8),
            nn.LSTM(8, 6, batch_first=True),
            nn.Linear(6, 5),
        )

    def forward(self, tokens):
        return self.last(self.lstm(self.embedding(tokens))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.last = nn.Linear(8, 10, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, tokens):
        return self.last(self.block(self.embedding(tokens)).mean(1))


@pytest.mark.parametrize(
    ("model", "kernel"), [(Recurrent, "lstm"), (Attention, "multi_head_attention_forward")]
)
def test_recurrent_and_attention_weights_get_relevance_and_the_report_names_the_approximation(
    model, kernel
):
    torch.manual_seed(6)
    found, relevances = relevances_of(
        model(), torch.randint(0, 10, (3, 7)), torch.tensor([0, 1, 2])
    )
    assert relevances.approximated == (kernel,)
    assert set(found) == set(relevances.names)
    assert all(bool(r.isfinite().all()) and float(r.abs().max()) > 0 for r in found.values())


def test_gradient_times_input_of_a_kernel_is_its_formula():
    """LSTM weights: r_w = w ⊙ ∂⟨z, R_z / stabilise(z)⟩/∂w, computed here without any of the
    machinery."""
    torch.manual_seed(7)
    model = Recurrent().double().eval()
    tokens, y = torch.randint(0, 10, (3, 7)), torch.tensor([0, 1, 2])
    found, _ = relevances_of(model, tokens, y)
    z = model.lstm(model.embedding(tokens))[0]
    hidden = z[:, -1].detach()
    logits = model.last(hidden)
    share = F.one_hot(y, 5).double() / (logits + 1e-6 * logits.sign())
    R_hidden = hidden * (share @ model.last.weight)
    (gradient,) = torch.autograd.grad(
        z[:, -1], model.lstm.weight_ih_l0, R_hidden.detach() / (hidden + 1e-6 * hidden.sign())
    )
    torch.testing.assert_close(
        found["lstm.weight_ih_l0"], model.lstm.weight_ih_l0.detach() * gradient
    )


@pytest.mark.parametrize(
    "name", ["epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box"]
)
def test_composites_go_by_name_or_as_objects(name):
    torch.manual_seed(8)
    model, x, y = Functional(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    found, _ = relevances_of(model, x, y, composite=name)
    assert all(float(r.abs().sum()) > 0 for r in found.values())
    if name == "epsilon_plus":
        again, _ = relevances_of(model, x, y, composite=zennit.composites.EpsilonPlus())
        assert all(torch.equal(found[key], again[key]) for key in found)


def test_the_users_model_is_untouched():
    torch.manual_seed(9)
    model = Functional()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    relevances_of(model, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_relevance_is_taken_on_the_background_weights():
    torch.manual_seed(10)
    model = Functional().eval()
    names = ["last.weight"]
    background = {"last.weight": model.last.weight.detach().clone()}
    with torch.no_grad():
        model.last.weight.zero_()
    found = Relevances(model, names, composite="epsilon_plus_flat", start="ones")(
        torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), background
    )
    assert (
        float(found["last.weight"][:2].abs().min()) > 0
    )  # the rows of the two classes in the batch


def test_start_value_may_be_a_function_for_models_that_are_no_classifiers():
    torch.manual_seed(11)
    x, wanted = torch.randn(4, 6), torch.randn(4, 3)

    def error_of(output, target):
        return (output - target).abs()

    found, _ = relevances_of(Gated(), x, wanted, start=error_of)
    assert set(found) == {"first.weight", "gate.weight", "last.weight"}


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.box, self.label = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x, scale):
        x = F.relu(self.body(x)) * scale
        return {"box": self.box(x), "label": self.label(x)}


def test_models_with_several_inputs_and_outputs_name_the_output_that_relevance_starts_at():
    inputs = {"x": torch.randn(4, 6), "scale": torch.ones(4, 1)}
    found, _ = relevances_of(
        TwoOutputs(),
        inputs,
        None,
        start=lambda output, target: (output["label"], output["label"].detach()),
    )
    assert set(found) == {"body.weight", "label.weight"}
    with pytest.raises(ModelError, match="returns a dict"):
        relevances_of(TwoOutputs(), inputs, torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.tensor([0, 1, 2]), "one class index per sample"),
        (torch.tensor([0.0, 1.0]), "one class index per sample"),
        (torch.tensor([0, 5]), "targets run from 0 to 5"),
        (torch.tensor([-1, 1]), "targets run from -1"),
        (None, "NoneType"),
    ],
)
def test_targets_that_do_not_fit_are_refused(target, words):
    with pytest.raises(DataError, match=words):
        start_relevance(torch.zeros(2, 5), target, "logit")


def test_composites_with_canonizers_unknown_names_and_composites_without_a_match_are_refused():
    model, x, y = Functional(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    merging = zennit.composites.EpsilonPlusFlat(canonizers=[zennit.torchvision.ResNetCanonizer()])
    with pytest.raises(OptionError, match="canonizers"):
        relevances_of(model, x, y, composite=merging)
    with pytest.raises(OptionError, match="names no zennit composite"):
        relevances_of(model, x, y, composite="epsilon_minus")
    with pytest.raises(OptionError, match="no rule for any"):
        relevances_of(
            model,
            x,
            y,
            composite=zennit.composites.NameMapComposite([(["nothing"], zennit.rules.Epsilon())]),
        )
    with pytest.raises(OptionError, match="start 'loss' is unknown"):
        relevances_of(model, x, y, start="loss")
