"""The quantizer in any training loop: it attaches, keeps the parameters on their levels, and lets
go again."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from ecqx_onnx.errors import DataError, ModelError, OptionError
from ecqx_onnx.quantization import Quantizer

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.hidden, self.last = nn.Linear(64, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.last(F.relu(self.hidden(x.flatten(1))))


def small_net(seed=0):
    torch.manual_seed(seed)
    return SmallNet()


def batch(seed=0, size=12):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (size,), generator=generator)
    return torch.randn(size, 1, 8, 8, generator=generator) + y.reshape(-1, 1, 1, 1), y


def assert_on_levels(model, quantizer):
    """The parameters equal QuantTensor.dequantize() bit for bit."""
    state = model.state_dict()
    for tensor in quantizer.tensors():
        assert tensor.levels.dtype == np.int8
        assert np.array_equal(
            state[tensor.name].cpu().numpy().view(np.uint32), tensor.dequantize().view(np.uint32)
        ), tensor.name


def loop(model, quantizer, optimizer, steps=5, forward=None):
    forward = model if forward is None else forward
    losses = []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        quantizer.step(x, y)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("levels", ["symmetric", "asymmetric"])
def test_parameters_equal_the_dequantised_levels_bit_for_bit_after_every_step(
    granularity, bits, levels
):
    model = small_net()
    quantizer = Quantizer(model, bits=bits, granularity=granularity, levels=levels)
    assert_on_levels(model, quantizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        loop(model, quantizer, optimizer, steps=1)
        assert_on_levels(model, quantizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=5e-3, weight_decay=0.01),
        lambda p: torch.optim.RMSprop(p, lr=3e-3),
    ],
)
def test_any_optimizer_lowers_the_loss(make):
    model = small_net()
    quantizer = Quantizer(model, bits=4, entropy_weight=0.05)
    losses = loop(model, quantizer, make(model.parameters()), steps=30)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_optimizers_update_at_the_quantised_point_is_applied_to_the_background():
    model = small_net()
    quantizer = Quantizer(model, bits=3, relevance=None)
    before = {name: value.clone() for name, value in quantizer.background().items()}
    at = {name: value.clone() for name, value in model.named_parameters()}
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    quantizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, background in quantizer.background().items():
        torch.testing.assert_close(
            background, before[name] - 0.1 * gradients[name], rtol=1e-5, atol=1e-7
        )
        assert not torch.equal(at[name], before[name])


def test_background_weights_are_not_the_models():
    model = small_net()
    quantizer = Quantizer(model, relevance=None)
    assert all(
        value.data_ptr() != dict(model.named_parameters())[name].data_ptr()
        for name, value in quantizer.background().items()
    )


def test_gradient_accumulation_and_clipping():
    model = small_net()
    quantizer, optimizer = Quantizer(model), torch.optim.Adam(model.parameters(), lr=1e-2)
    for start in (0, 2, 4):
        optimizer.zero_grad()
        for part in (start, start + 1):
            x, y = batch(part)
            (F.cross_entropy(model(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        quantizer.step(x, y)
        assert_on_levels(model, quantizer)


def test_autocast_trains_and_keeps_the_levels_exact():
    model = small_net()
    quantizer, optimizer = Quantizer(model), torch.optim.Adam(model.parameters(), lr=1e-2)

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float()

    loop(model, quantizer, optimizer, forward=forward)
    assert_on_levels(model, quantizer)


def test_size_exponent_zero_spares_small_tensors_no_longer():
    def zeros(exponent):
        quantizer = Quantizer(
            small_net(), relevance=None, entropy_weight=0.5, size_exponent=exponent
        )
        return {tensor.name: tensor.zeros for tensor in quantizer.report().tensors}

    spared, alike = zeros(1.0), zeros(0.0)
    assert spared["hidden.weight"] == alike["hidden.weight"]  # the largest: δ = 1
    assert spared["conv.weight"] < alike["conv.weight"] - 0.2


def test_entropy_scale_is_kept_in_the_state():
    quantizer, other = (
        Quantizer(small_net(), relevance=None, entropy_weight=0.5) for _ in range(2)
    )
    quantizer.entropy_scale = 0.1
    quantizer.assign()
    other.load_state_dict(quantizer.state_dict())
    assert [tensor.levels.tolist() for tensor in other.tensors()] == [
        tensor.levels.tolist() for tensor in quantizer.tensors()
    ]


def test_a_gradient_scaler_that_skips_a_step_leaves_the_levels_alone():
    """torch.amp's scaler multiplies the loss, divides the gradients, and takes no step where they
    overflow."""
    model = small_net()
    quantizer, optimizer = (
        Quantizer(model, relevance=None),
        torch.optim.SGD(model.parameters(), lr=0.1),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain = small_net()
    for factor in (1.0, float("inf")):
        before = [tensor.levels.copy() for tensor in quantizer.tensors()]
        x, y = batch()
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        quantizer.step()
        assert_on_levels(model, quantizer)
        changed = any(
            (a != b.levels).any() for a, b in zip(before, quantizer.tensors(), strict=True)
        )
        assert changed == (factor == 1.0)
    unscaled, by_hand = (
        Quantizer(plain, relevance=None),
        torch.optim.SGD(plain.parameters(), lr=0.1),
    )
    F.cross_entropy(plain(x), y).backward()
    by_hand.step()
    unscaled.step()
    for name, value in unscaled.background().items():
        torch.testing.assert_close(quantizer.background()[name], value, rtol=1e-4, atol=1e-6)


def test_the_absolute_gradient_is_scaled_by_the_size_of_the_level_and_plain_for_zeros():
    plain, scaled = small_net(), small_net()
    quantizers = [
        Quantizer(plain, relevance=None),
        Quantizer(scaled, relevance=None, gradient="absolute"),
    ]
    x, y = batch()
    for model in (plain, scaled):
        F.cross_entropy(model(x), y).backward()
    for tensor in quantizers[1].tensors():
        value = torch.from_numpy(tensor.dequantize())
        factor = torch.where(value == 0, 1.0, value.abs())
        grad = dict(plain.named_parameters())[tensor.name].grad
        torch.testing.assert_close(dict(scaled.named_parameters())[tensor.name].grad, grad * factor)
    quantizers[1].detach()
    scaled.zero_grad()
    F.cross_entropy(scaled(x), y).backward()
    for tensor in quantizers[0].tensors():  # detached: nothing is scaled any more
        expected = dict(plain.named_parameters())[tensor.name].grad
        torch.testing.assert_close(dict(scaled.named_parameters())[tensor.name].grad, expected)


def test_a_learned_step_follows_the_gradient_at_the_level_whatever_the_background_sees():
    found = []
    for form in ("plain", "absolute"):
        model = small_net()
        quantizer = Quantizer(model, relevance=None, step="learned", gradient=form)
        x, y = batch()
        F.cross_entropy(model(x), y).backward()
        quantizer.step()
        found.append([tensor.meaning.step for tensor in quantizer.tensors()])
    for plain, absolute in zip(*found, strict=True):
        np.testing.assert_allclose(plain, absolute, rtol=1e-5)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # the latter calls g++
def test_a_compiled_forward_sees_the_new_levels(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs g++")
    model = small_net()
    compiled = torch.compile(model, backend=backend)
    quantizer = Quantizer(compiled, relevance="epsilon_plus_flat")
    assert [tensor.name for tensor in quantizer.tensors()] == [
        "conv.weight",
        "hidden.weight",
        "last.weight",
    ]
    loop(model, quantizer, torch.optim.Adam(model.parameters(), lr=1e-2), forward=compiled, steps=3)
    model.eval(), compiled.eval()
    x, _ = batch()
    torch.testing.assert_close(compiled(x), model(x))


class Zoo(nn.Module):
    """Every kind of layer whose weights are quantised by default."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.conv1, self.up, self.conv3 = (
            nn.Conv1d(8, 8, 3, padding=1),
            nn.ConvTranspose1d(8, 8, 2, stride=2),
            nn.Conv3d(1, 1, 1),
        )
        self.lstm, self.gru = nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.cell, self.last = nn.GRUCell(8, 8), nn.Linear(8, 20)
        self.last.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens).transpose(1, 2)
        x = self.up(F.relu(self.conv1(x))).transpose(1, 2)
        x = self.gru(self.lstm(x)[0])[0]
        x = self.norm(x + self.attention(x, x, x)[0])
        x = self.conv3(x[:, None, None])[:, 0, 0]
        return self.last(self.cell(x.mean(1)))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_kind_of_layer_is_quantised_tied_weights_once_and_each_gets_a_stated_relevance(
    granularity,
):
    torch.manual_seed(1)
    model = Zoo()
    quantizer = Quantizer(model, granularity=granularity, refresh_every=1)
    names = [tensor.name for tensor in quantizer.tensors()]
    assert names == [
        *(
            "embedding.weight",
            "conv1.weight",
            "up.weight",
            "conv3.weight",
            "lstm.weight_ih_l0",
            "lstm.weight_hh_l0",
        ),
        *(
            "gru.weight_ih_l0",
            "gru.weight_hh_l0",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
        ),
        *("cell.weight_ih", "cell.weight_hh"),
    ]
    tokens, y = torch.randint(0, 20, (6, 5)), torch.randint(0, 20, (6,))
    F.cross_entropy(model(tokens), y).backward()
    torch.optim.Adam(model.parameters(), lr=1e-2).step()
    quantizer.step(tokens, y)
    assert_on_levels(model, quantizer)
    report = quantizer.report()
    assert report.approximated == ("gru", "gru_cell", "lstm", "multi_head_attention_forward")
    # its hidden state starts at zero and is used once, so nothing ever flows through this weight
    assert report.warnings == (
        "cell.weight_hh: its relevance was zero throughout a batch, which was left out",
    )
    assert {name for name, reason in report.left_float if reason == "bias, norm or scalar"} >= {
        "norm.weight",
        "conv1.bias",
    }
    if granularity == "channel":
        axes = {tensor.name: tensor.meaning.axis for tensor in quantizer.tensors()}
        assert axes["up.weight"] == 1
        assert axes["conv1.weight"] == 0


def test_layers_are_excluded_and_given_bits_by_pattern():
    quantizer = Quantizer(
        small_net(), bits={"*": 4, "hidden.*": 2}, exclude=["conv.*"], relevance=None
    )
    assert {entry.name: entry.bits for entry in quantizer.report().tensors} == {
        "hidden.weight": 2,
        "last.weight": 4,
    }
    assert ("conv.weight", "excluded by 'conv.*'") in quantizer.report().left_float


def test_a_pattern_that_matches_nothing_is_a_warning():
    quantizer = Quantizer(
        small_net(), bits={"*": 4, "hiden.*": 2}, exclude=["conv.*", "fc9.*"], relevance=None
    )
    assert quantizer.report().warnings == (
        "exclude 'fc9.*' matches no parameter",
        "bits 'hiden.*' matches no parameter",
    )


def test_detach_keeps_the_levels_or_restores_the_background_and_leaves_no_trace():
    for restore in (False, True):
        model = small_net()
        structure = [(name, type(module)) for name, module in model.named_modules()]
        original = {name: value.clone() for name, value in model.state_dict().items()}
        quantizer = Quantizer(model)
        quantized = {name: value.clone() for name, value in model.state_dict().items()}
        assert quantizer.detach(restore=restore) is model
        assert [(name, type(module)) for name, module in model.named_modules()] == structure
        expected = original if restore else quantized
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        with pytest.raises(OptionError, match="detached"):
            quantizer.step(*batch())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relevance": None},
        {"granularity": "channel", "step": "learned", "bits": 2},
        {"step": "learned", "gradient": "absolute", "refresh_every": 1, "relevance_samples": 5},
    ],
)
@pytest.mark.parametrize(
    "make",
    [torch.optim.Adam, torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)],
)
def test_resuming_in_the_middle_gives_the_same_bits_as_not_stopping(options, make):
    def start():
        model = small_net()
        return (
            model,
            Quantizer(model, **{"refresh_every": 2, **options}),
            make(model.parameters(), lr=1e-2),
        )

    model, quantizer, optimizer = start()
    loop(model, quantizer, optimizer, steps=3)
    saved = copy.deepcopy((model.state_dict(), quantizer.state_dict(), optimizer.state_dict()))
    loop(model, quantizer, optimizer, steps=3)

    again, quantizer_again, optimizer_again = start()
    again.load_state_dict(saved[0])
    quantizer_again.load_state_dict(saved[1])
    optimizer_again.load_state_dict(saved[2])
    loop(again, quantizer_again, optimizer_again, steps=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name, value in quantizer.background().items():
        assert torch.equal(value, quantizer_again.background()[name]), name


def test_relevances_move_zeros_only_within_the_band():
    model = small_net()
    quantizer = Quantizer(model, bits=4, entropy_weight=0.3, keep=0.02, prune=0.03, refresh_every=1)
    quantizer.step(*batch())
    for entry in quantizer.report().tensors:
        assert not entry.warnings
        slack = 1 / np.prod(entry.shape)
        assert entry.ecq_zeros - 0.02 - slack <= entry.zeros <= entry.ecq_zeros + 0.03 + slack
        assert entry.beta is not None


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_learned_step_follows_the_gradient_of_lsq(granularity):
    model = small_net()
    quantizer = Quantizer(
        model, bits=2, relevance=None, step="learned", step_rate=0.01, granularity=granularity
    )
    before = {tensor.name: tensor for tensor in quantizer.tensors()}
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    quantizer.step()  # no optimizer step: W stays, only the steps move
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for tensor in quantizer.tensors():
        old, W = before[tensor.name], quantizer.background()[tensor.name]
        ratio = W / torch.from_numpy(old.meaning.step)
        k = torch.from_numpy(old.levels)
        slope = gradients[tensor.name] * torch.where(ratio.abs() >= 1, k, k - ratio)
        slope = slope.sum_to_size(old.meaning.step.shape)
        # Adam's first update has the size of its rate
        expected = torch.from_numpy(old.meaning.step) * torch.exp(-0.01 * slope.sign())
        torch.testing.assert_close(
            torch.from_numpy(tensor.meaning.step), expected, rtol=1e-4, atol=0
        )
    loop(model, quantizer, torch.optim.Adam(model.parameters(), lr=1e-2), steps=2)
    assert_on_levels(model, quantizer)


def test_a_learned_step_needs_the_gradients_and_resumes_with_its_moments():
    model = small_net()
    quantizer = Quantizer(model, relevance=None, step="learned")
    with pytest.raises(OptionError, match=r"before optimizer\.zero_grad"):
        quantizer.step()
    loop(model, quantizer, torch.optim.Adam(model.parameters(), lr=1e-2), steps=2)
    again = Quantizer(small_net(), relevance=None, step="learned")
    again.load_state_dict(quantizer.state_dict())
    assert all(
        torch.equal(a.learner.second, b.learner.second)
        for a, b in zip(again._weights, quantizer._weights, strict=True)
    )


def test_relevances_of_fewer_samples_are_those_of_the_first():
    model, (x, y) = small_net(), batch()
    some, first = Quantizer(model, relevance_samples=4), Quantizer(copy.deepcopy(small_net()))
    some.step(x, y)
    first.step(x[:4], y[:4])
    for name, R in first.relevances().items():
        torch.testing.assert_close(some.relevances()[name], R)


def test_models_that_cannot_be_quantised_are_refused():
    with pytest.raises(ModelError, match="no weight that can be quantised"):
        Quantizer(nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match="excluded by"):
        Quantizer(nn.Linear(3, 3), exclude="*")
    with pytest.raises(ModelError, match=r"'weight' is torch\.bfloat16"):
        Quantizer(nn.Linear(3, 3).bfloat16())
    broken = nn.Linear(3, 3)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="'weight' holds NaN"):
        Quantizer(broken)


def test_a_diverging_training_is_named():
    model = small_net()
    quantizer = Quantizer(model, relevance=None)
    with torch.no_grad():
        model.hidden.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"'hidden\.weight' became NaN or infinite"):
        quantizer.step()


def test_a_batch_that_is_missing_or_does_not_fit_is_refused_and_a_non_finite_one_left_out():
    quantizer = Quantizer(small_net())
    with pytest.raises(OptionError, match="needs the batch"):
        quantizer.step()
    x, y = batch()
    with pytest.raises(DataError, match="targets run from 3"):
        quantizer.step(x, torch.full_like(y, 3))
    x[0] = torch.nan
    quantizer.step(x, y)
    warnings = quantizer.report().warnings
    assert any(
        warning.startswith("last.weight: its relevance was nan on a batch") for warning in warnings
    )
    assert all(weight.relevance is None for weight in quantizer._weights)


def test_a_relevance_that_is_zero_or_reaches_nothing_is_a_warning_in_the_report():
    class Unused(SmallNet):
        def __init__(self):
            super().__init__()
            self.never = nn.Linear(4, 4)

    torch.manual_seed(0)
    quantizer = Quantizer(Unused())
    quantizer.step(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
    warnings = quantizer.report().warnings
    assert any(warning.startswith("never.weight: no relevance reaches it") for warning in warnings)
    assert any(warning.startswith("conv.weight: its relevance was zero") for warning in warnings)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1},
        {"bits": {"*": 9}},
        {"entropy_weight": -0.1},
        {"entropy_weight": float("nan")},
        {"keep": 2.0},
        {"rho": 1.0},
        {"refresh_every": 0},
        {"relevance_memory": 1.0},
        {"levels": "odd"},
        {"step": "guess"},
        {"step": "learned", "step_rate": 0.0},
        {"relevance_samples": 0},
        {"granularity": "row"},
        {"gradient": "signed"},
        {"relevance": "epsilon_minus"},
        {"start": "loss"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError):
        Quantizer(small_net(), **options)


def test_float64_models_hold_the_float32_products():
    model = small_net().double()
    quantizer = Quantizer(model, relevance=None)
    weight = dict(model.named_parameters())["hidden.weight"].detach()
    tensor = {tensor.name: tensor for tensor in quantizer.tensors()}["hidden.weight"]
    assert np.array_equal(weight.numpy(), tensor.dequantize().astype(np.float64))


def test_relevances_are_a_moving_average():
    model = small_net()
    quantizer = Quantizer(model, relevance_memory=0.75)
    alone = []
    for seed in (0, 1):
        one = Quantizer(small_net())
        one.observe(*batch(seed))
        alone.append(one.relevances()["hidden.weight"])
        quantizer.observe(*batch(seed))
    expected = 0.75 * alone[0] + 0.25 * alone[1]
    torch.testing.assert_close(quantizer.relevances()["hidden.weight"], expected / expected.amax())
