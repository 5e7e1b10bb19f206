"""A training never ends because of its relevances: what fails in them falls back to plain ECQ, and
the report says why."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.quantization import Quantizer, selection
from ecqx_onnx.quantization.parametrizations import (
    compute_effective_weight,
    copy_module,
    find_parametrized,
    merge_parametrizations,
)
from ecqx_onnx.quantization.relevance.functional import FunctionalRules
from ecqx_onnx.quantization.relevance.relevance import Relevances, _Rule

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

ALL = "all weights"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(F.relu(self.hidden(F.relu(self.first(x)))))


def train_steps(model, steps, *, shape=(16,), quantizer=None, **options):
    """(the quantizer after a few steps of training with its default relevances, or others)."""
    quantizer = quantizer or Quantizer(model, entropy_weight=0.05, refresh_every=1, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(6, *shape, generator=generator),
            torch.randint(0, 3, (6,), generator=generator),
        )
        optimizer.zero_grad()
        output = model(x)
        F.cross_entropy(output["logits"] if isinstance(output, dict) else output, y).backward()
        optimizer.step()
        quantizer.step(x, y)
    return quantizer


def levels_of(quantizer):
    return {tensor.name: tensor.levels.tolist() for tensor in quantizer.tensors()}


def plain_levels(model, steps, **options):
    return levels_of(train_steps(model, steps, relevance=None, **options))


def fail(*args, **kwargs):
    raise ZeroDivisionError("injected")


@pytest.mark.parametrize(
    "home", ["__init__", "__call__", "_attach_rules", "_share_values", "_set_input_bounds"]
)
@pytest.mark.parametrize("after", [0, 2])
def test_any_fault_in_the_relevances_falls_back_to_plain_ecq_and_is_told(monkeypatch, home, after):
    torch.manual_seed(0)
    model, quantizer = Net(), None
    if after and home not in ("__init__", "_attach_rules"):  # these two run once, at the start
        quantizer = train_steps(model, after)
        assert quantizer.relevances()
    monkeypatch.setattr(Relevances, home, fail)
    quantizer = train_steps(model, 3, quantizer=quantizer)
    report = quantizer.report()
    assert report.relevance_failures == ((ALL, "ZeroDivisionError: injected"),)
    assert any("ZeroDivisionError: injected" in warning for warning in report.warnings)
    assert {entry.rule for entry in report.tensors} == {"none (plain ECQ)"}
    assert quantizer.relevances() == {}


def test_a_training_whose_relevances_fail_at_once_gives_the_bytes_of_plain_ecq(monkeypatch):
    torch.manual_seed(0)
    model = Net()
    expected = plain_levels(copy.deepcopy(model), 3)
    monkeypatch.setattr(Relevances, "__call__", fail)
    assert levels_of(train_steps(model, 3)) == expected


@pytest.mark.parametrize("part", ["before", "after", "backward"])
def test_a_fault_in_one_layers_rule_costs_that_layers_weight_its_relevance_only(monkeypatch, part):
    torch.manual_seed(0)
    model = Net()
    whole = getattr(_Rule, part)

    def broken(self, *args):
        if self.name == "hidden":
            fail()
        return whole(self, *args)

    monkeypatch.setattr(_Rule, part, broken)
    quantizer = train_steps(model, 3)
    report = quantizer.report()
    assert set(quantizer.relevances()) == {"first.weight", "last.weight"}
    assert dict(report.relevance_failures).keys() == {"hidden.weight"}
    assert "injected" in dict(report.relevance_failures)["hidden.weight"]
    assert any(
        warning.startswith("hidden.weight: its layer's rule failed") for warning in report.warnings
    )


def test_a_fault_in_an_operators_rule_falls_back(monkeypatch):
    torch.manual_seed(0)
    model = Net()
    monkeypatch.setattr(FunctionalRules, "__torch_function__", fail)
    assert train_steps(model, 2).report().relevance_failures[0][0] == ALL


def test_a_fault_in_the_users_start_function_falls_back_and_is_told():
    report = train_steps(Net(), 2, start=fail).report()
    assert report.relevance_failures == ((ALL, "ZeroDivisionError: injected"),)


def test_a_resumed_run_remembers_that_relevances_failed(monkeypatch):
    torch.manual_seed(0)
    model = Net()
    monkeypatch.setattr(Relevances, "__call__", fail)
    state = copy.deepcopy(train_steps(model, 2).state_dict())
    monkeypatch.undo()
    again = Quantizer(model, entropy_weight=0.05, refresh_every=1)
    again.load_state_dict(state)
    assert train_steps(model, 2, quantizer=again).report().relevance_failures == (
        (ALL, "ZeroDivisionError: injected"),
    )


def test_a_failure_in_another_process_ends_the_relevances_here_too(monkeypatch):
    from ecqx_onnx.quantization import quantizer as room

    monkeypatch.setattr(room, "sum_numbers", lambda values, device: [1.0])
    assert train_steps(Net(), 1).report().relevance_failures == (
        (ALL, "they failed in another process"),
    )


def test_wrong_options_are_refused_and_so_are_targets_of_the_first_batch_but_not_of_a_later_one():
    with pytest.raises(OptionError, match="names no zennit composite"):
        Quantizer(Net(), relevance="epsilon_minus")
    model, x = Net(), torch.randn(4, 16)
    quantizer = Quantizer(model, refresh_every=1)
    ignored = torch.tensor([0, 1, 255, 2])
    with pytest.raises(DataError, match="targets run from 0 to 255"):
        quantizer.step(x, ignored)
    quantizer.step(x, ignored.clamp(max=2))
    before = quantizer.relevances()
    quantizer.step(x, ignored)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.relevances().items())
    assert any("targets run from 0 to 255" in warning for warning in quantizer.report().warnings)


# Models as people write them


class InputNormalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last((x - 0.5) / 0.25)


class ScaledInput(InputNormalized):
    def forward(self, x):
        return self.last(x.float() / 255)


class FromOne(InputNormalized):
    def forward(self, x):
        return self.last(torch.softmax(1 - x * 2, 1))


class Interpolated(InputNormalized):
    def forward(self, x):
        return self.last(F.interpolate(x[:, None], size=16, mode="linear")[:, 0])


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(
            torch.cond(x.sum() > 0, lambda x: self.a(x).relu(), lambda x: self.b(x).tanh(), (x,))
        )


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 3)
        self.inner = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


class ReturnsPair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class TupleInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = ReturnsPair(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x)[0])


class NamedOutput(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


class CachesItsFeatures(Net):
    def forward(self, x):
        self.features = F.relu(self.first(x))
        return self.last(F.relu(self.hidden(self.features)))


def normed(kind):
    old = nn.utils.weight_norm
    wrap = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old": old,
    }[kind]
    return nn.Sequential(nn.Linear(16, 8), wrap(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))


WRITTEN = [
    InputNormalized,
    ScaledInput,
    FromOne,
    Interpolated,
    TupleInside,
    NamedOutput,
    CachesItsFeatures,
]


@pytest.mark.parametrize("make", WRITTEN)
def test_a_model_as_people_write_it_trains_with_the_defaults_and_every_weight_has_a_relevance(make):
    torch.manual_seed(0)
    model = make()
    quantizer = train_steps(model, 10)
    assert quantizer.report().relevance_failures == ()
    assert set(quantizer.relevances()) == {tensor.name for tensor in quantizer.tensors()}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("make", [Conditional, Scripted])
def test_a_model_that_relevances_cannot_look_into_trains_with_plain_ecq(make):
    torch.manual_seed(0)
    model = make()
    report = train_steps(model, 10).report()
    assert [what for what, _ in report.relevance_failures] == [ALL]
    assert {entry.rule for entry in report.tensors} == {"none (plain ECQ)"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "old"])
def test_a_parametrized_layer_that_stays_float_is_crossed_by_relevance_and_told_what_to_do(
    kind, monkeypatch
):
    torch.manual_seed(0)
    model = normed(kind)
    # As for layers whose kernel has its weights by heart.
    monkeypatch.setattr(selection, "CACHING", (nn.Linear,))
    quantizer = train_steps(model, 10)
    report = quantizer.report()
    assert [tensor.name for tensor in quantizer.tensors()] == ["0.weight", "3.weight"]
    assert set(quantizer.relevances()) == {"0.weight", "3.weight"}
    assert report.relevance_failures == ()
    (sentence,) = report.warnings
    assert "'1.weight'" in sentence
    assert "remove_parametrizations" in sentence


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "kind", ["weight_norm", "spectral_norm", "old", "old_spectral", "pruned", "orthogonal"]
)
def test_a_merged_parametrization_computes_the_same_and_the_original_does_not_change(kind):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    if kind == "old_spectral":
        nn.utils.spectral_norm(layer)
    elif kind == "pruned":
        nn.utils.prune.random_unstructured(layer, "weight", 0.5)
    elif kind == "orthogonal":
        parametrizations.orthogonal(layer)
    else:
        layer = normed(kind)[1]
    model, x = nn.Sequential(layer), torch.randn(4, 8)
    model.train()(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.eval()(x)
    merged = copy_module(model)
    (entry,) = merge_parametrizations(merged)
    torch.testing.assert_close(merged(x), expected)
    assert entry.name == "0.weight"
    assert isinstance(merged[0].weight, nn.Parameter)
    assert find_parametrized(merged) == ()
    assert list(merged.state_dict()) == ["0.bias", "0.weight"] or list(merged.state_dict()) == [
        "0.weight",
        "0.bias",
    ]
    torch.testing.assert_close(
        compute_effective_weight(model.train(), find_parametrized(model)[0]),
        merged[0].weight.detach(),
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model.eval()(x), expected)


def test_the_shadow_follows_a_parametrized_weight_through_the_training():
    torch.manual_seed(0)
    model = normed("weight_norm")
    quantizer = train_steps(model, 4)
    shadow = quantizer._relevances._inner.shadow
    quantizer.observe(torch.randn(4, 16), torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(shadow[1].weight.detach(), quantizer.background()["1.weight"])
    assert type(shadow[1]) is nn.Linear
