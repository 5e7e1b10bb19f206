"""Sessions of onnxruntime, and the float64 yardstick of the PyTorch side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ecqx_onnx.errors import CheckFailed, DataError, ModelError
from ecqx_onnx.runtime.sessions import (
    count_executed_operators,
    find_fixed_batch,
    fit_inputs,
    make_synthetic_inputs,
    open_session,
    run,
)
from ecqx_onnx.validation.outputs.bounds import Bound, derive_bound
from ecqx_onnx.validation.references.pytorch_outputs import run_reference, run_reference_exactly
from tests.onnx_torch_pairs import make_pair


class HardCoded(torch.nn.Module):
    """All that makes a model hard to raise to float64: an LSTM, attention, a state and a cast of
    fixed dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(2, 4, 3)
        self.norm = torch.nn.BatchNorm1d(4)
        self.lstm = torch.nn.LSTM(4, 8, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).permute(0, 2, 1)
        state = torch.zeros(1, x.shape[0], 8, dtype=torch.float32)
        x, _ = self.lstm(x, (state, state))
        x = self.attention(x, x, x)[0]
        return self.head(x[:, -1].float() + torch.ones(8, dtype=torch.float32))


@pytest.fixture
def hard_coded():
    torch.manual_seed(0)
    return HardCoded().eval()


def inputs_of(count=5):
    return (np.random.default_rng(0).standard_normal((count, 2, 9)).astype(np.float32),)


def test_float64_outputs_reach_through_hard_coded_dtypes(hard_coded):
    exact = run_reference_exactly(hard_coded, inputs_of())
    assert exact is not None
    assert exact[0].dtype == np.float64
    rounding = np.abs(exact[0] - run_reference(hard_coded, inputs_of())[0]).max()
    assert 0 < rounding < 1e-5
    assert hard_coded.head.weight.dtype == torch.float32


def test_float64_outputs_of_an_exported_program_are_those_of_its_module(hard_coded):
    hard_coded = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    program = torch.export.export(hard_coded, (torch.from_numpy(x),))
    ours, theirs = (
        run_reference_exactly(program.module(), (x,)),
        run_reference_exactly(hard_coded, (x,)),
    )
    assert np.abs(ours[0] - theirs[0]).max() < 1e-15


def test_the_float64_result_equals_a_model_made_in_float64():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.GELU(), torch.nn.Linear(40, 2)
    ).eval()
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    exact = run_reference_exactly(model, (x,))[0]
    with torch.no_grad():
        oracle = model.double()(torch.from_numpy(x).double()).numpy()
    assert np.array_equal(exact, oracle)


def test_the_modules_flags_are_given_back():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()).train()
    model[0].eval()
    x = (np.ones((4, 2), np.float32),)
    assert np.array_equal(run_reference(model, x)[0], run_reference(model, x)[0])  # no dropout
    assert [module.training for module in model] == [False, True]


def test_a_model_without_a_float64_form_falls_back_to_the_coarse_bound():
    class OnlyFloat32(torch.nn.Module):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise RuntimeError("no kernel for float64")
            return x * 2

    x = (np.ones((2, 2), np.float32),)
    assert run_reference_exactly(OnlyFloat32(), x) is None
    assert derive_bound(run_reference(OnlyFloat32(), x)[0], None) == Bound(
        None, float(np.spacing(np.float32(2)))
    )


def test_the_bound_is_eight_roundings_and_four_ulps():
    found = derive_bound(np.array([1.0, 2.0], np.float32), np.array([1.0, 2.0 + 3e-7]))
    assert found.rounding == pytest.approx(3e-7)
    assert found.limit == pytest.approx(8 * 3e-7 + 4 * 2**-22)


def test_outputs_that_are_no_floats_must_be_equal():
    assert derive_bound(np.array([1, 2]), None).limit == 0.0


def test_pytorch_refusing_the_data_is_said_in_one_sentence():
    with pytest.raises(ModelError, match=r"cannot run on the data \(inputs of shape \[2, 3\]\)"):
        run_reference(torch.nn.Linear(4, 4), (np.zeros((2, 3), np.float32),))


def test_executed_operators_come_from_the_runtimes_profile(tmp_path):
    path = make_pair(decoding="standard").save(tmp_path)
    operators = count_executed_operators(path, (np.zeros((1, 8), np.float32),))
    assert operators["DequantizeLinear"] == 2
    assert list(tmp_path.iterdir()) == [path]  # the profile is gone


def test_folded_weights_leave_no_decoding_operator(tmp_path):
    operators = count_executed_operators(
        make_pair().save(tmp_path), (np.zeros((1, 8), np.float32),)
    )
    assert not {"Cast", "Mul", "DequantizeLinear"} & set(operators)


def test_both_optimisation_levels_compute_the_same(tmp_path):
    path, x = make_pair().save(tmp_path), (np.ones((3, 8), np.float32),)
    first, second = (run(open_session(path, level=level), x)[0] for level in ("all", "disabled"))
    assert np.abs(first - second).max() < 1e-5


def test_the_runtimes_refusal_is_quoted():
    model = make_pair().model
    model.opset_import[0].version = 99
    with pytest.raises(CheckFailed, match=r"onnxruntime .* does not load it: .*opset"):
        open_session(model.SerializeToString())


def test_inputs_are_brought_to_the_declared_type_or_refused(tmp_path):
    session = open_session(make_pair().save(tmp_path))
    assert fit_inputs(session, [np.zeros((2, 8), np.float64)])[0].dtype == np.float32
    with pytest.raises(DataError, match="shape"):
        fit_inputs(session, [np.zeros((2, 8, 1), np.float32)])
    with pytest.raises(DataError, match="takes 1 inputs"):
        fit_inputs(session, [np.zeros((2, 8), np.float32)] * 2)


def test_a_fixed_batch_is_told_from_a_free_one(tmp_path):
    assert find_fixed_batch(open_session(make_pair().save(tmp_path))) is None
    assert find_fixed_batch(open_session(make_pair(batch=3).save(tmp_path))) == 3


def test_synthetic_inputs_have_the_declared_shapes_and_are_the_same_each_time(tmp_path):
    session = open_session(make_pair().save(tmp_path))
    first, second = make_synthetic_inputs(session, batch=4), make_synthetic_inputs(session, batch=4)
    assert first[0].shape == (4, 8)
    assert np.array_equal(first[0], second[0])
