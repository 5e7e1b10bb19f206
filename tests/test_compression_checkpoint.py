"""`compress --checkpoint`: the levels of the file, back in the PyTorch network's parameters."""

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")

from ecqx_onnx.api import convert  # noqa: E402
from ecqx_onnx.checkpoint import load  # noqa: E402
from ecqx_onnx.errors import FileError, OptionError  # noqa: E402
from ecqx_onnx.verbs.compress import compress  # noqa: E402


class Small(torch.nn.Module):
    """A convolution with a bias and one without, each with BatchNorm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = torch.nn.BatchNorm2d(8)
        self.second = torch.nn.Conv2d(8, 12, 3, stride=2, bias=False)
        self.norm2 = torch.nn.BatchNorm2d(12)
        self.last = torch.nn.Linear(12, 6)

    def forward(self, x):
        x = torch.relu(self.norm1(self.first(x)))
        x = torch.relu(self.norm2(self.second(x)))
        return self.last(x.mean((2, 3)))


class Recurrent(torch.nn.Module):
    """Indices, a table, an LSTM in both directions whose gates ONNX orders otherwise, a product."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(50, 12)
        self.lstm = torch.nn.LSTM(12, 16, batch_first=True, bidirectional=True)
        self.last = torch.nn.Linear(32, 6)

    def forward(self, ids):
        states, _ = self.lstm(self.table(ids))
        return self.last(states[:, -1])


class Attentive(torch.nn.Module):
    """Attention whose projections share one bias, which the graph holds in slices."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Linear(6, 16)
        self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = torch.nn.Linear(16, 4)

    def forward(self, x):
        hidden = self.table(x)
        mixed, _ = self.attention(hidden, hidden, hidden)
        return self.last(mixed.mean(1))


def make_attentive():
    torch.manual_seed(0)
    rows = np.random.default_rng(1).normal(1.0, 1.0, (128, 5, 6)).astype(np.float32)
    return Attentive().eval(), rows


def make_small():
    torch.manual_seed(0)
    network = Small()
    for norm in (network.norm1, network.norm2):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2.0)
        torch.nn.init.normal_(norm.weight, 0.2, 1.0)  # some of them negative
        torch.nn.init.normal_(norm.bias, 0, 0.3)
    images = np.random.default_rng(1).normal(size=(96, 3, 9, 9)).astype(np.float32)
    return network.eval(), images


def make_recurrent():
    torch.manual_seed(0)
    ids = np.random.default_rng(1).integers(0, 50, (160, 7))
    return Recurrent().eval(), ids


def test_corrections_of_biases_in_slices_come_back(tmp_path):
    network, inputs = make_attentive()
    result = compress(
        network,
        tmp_path / "small.onnx",
        data=inputs,
        example=torch.from_numpy(inputs[:2]),
        bits_per_weight=4.0,
        checkpoint=tmp_path / "small.pt",
    )
    assert not any("mean error" in note for note in result.notes)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    found = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    again = load(tmp_path / "small.pt").module()(torch.from_numpy(inputs)).detach().numpy()
    assert again == pytest.approx(found, rel=1e-3, abs=1e-5 * float(np.abs(found).max()))


@pytest.mark.parametrize("make", [make_small, make_recurrent])
def test_the_checkpoint_computes_what_the_file_does(tmp_path, make):
    network, inputs = make()
    out, checkpoint = tmp_path / "small.onnx", tmp_path / "small.pt"
    result = compress(
        network,
        out,
        data=inputs,
        example=torch.from_numpy(inputs[:2]),
        bits_per_weight=9.0,
        checkpoint=checkpoint,
    )
    assert result.ok
    assert any("training goes on" in note for note in result.notes)
    loaded = load(checkpoint)
    session = onnxruntime.InferenceSession(out)
    found = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    again = loaded.module()(torch.from_numpy(inputs)).detach().numpy()
    assert again == pytest.approx(found, rel=1e-3, abs=1e-4 * float(np.abs(found).max()))
    names = {tensor.name for tensor in loaded.tensors}
    wanted = {name for name, value in network.state_dict().items() if value.ndim >= 2}
    assert names == wanted
    # What convert makes of it computes the same once more.
    convert(checkpoint, tmp_path / "again.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "again.onnx")
    found = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    assert again == pytest.approx(found, rel=1e-3, abs=1e-4 * float(np.abs(found).max()))


def test_tied_weights_stay_tied_in_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
    network[2].weight = network[0].weight
    x = torch.randn(96, 16)
    checkpoint = tmp_path / "small.pt"
    compress(
        network.eval(),
        tmp_path / "small.onnx",
        data=x.numpy(),
        example=x[:2],
        max_error=0.2,
        checkpoint=checkpoint,
        keep_best=True,
    )
    loaded = load(checkpoint)
    assert len(loaded.tensors) == 1
    assert len(loaded.aliases) == 1


def test_a_checkpoint_of_an_onnx_file_is_refused(tmp_path):
    with pytest.raises(OptionError, match="PyTorch"):
        compress(
            tmp_path / "a.onnx", tmp_path / "b.onnx", data="d.npz", checkpoint=tmp_path / "c.pt"
        )


def test_a_checkpoint_that_exists_is_not_replaced(tmp_path):
    network, inputs = make_small()
    (tmp_path / "old.pt").write_text("mine")
    with pytest.raises(FileError, match="--force"):
        compress(
            network,
            tmp_path / "b.onnx",
            data=inputs,
            example=torch.from_numpy(inputs[:2]),
            checkpoint=tmp_path / "old.pt",
        )
    assert (tmp_path / "old.pt").read_text() == "mine"


def test_nothing_is_written_where_a_bound_is_missed(tmp_path):
    network, inputs = make_small()
    result = compress(
        network,
        tmp_path / "b.onnx",
        data=inputs,
        example=torch.from_numpy(inputs[:2]),
        max_bytes=400,
        checkpoint=tmp_path / "c.pt",
    )
    assert not result.ok
    assert not list(tmp_path.iterdir())
