"""A .pt2 archive is loaded only when nothing in it can run code."""

import io
import json
import pickle
import warnings
import zipfile

import pytest
import torch

from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.program.program import load_program, run_module, save_program


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(4, 3, batch_first=True)
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def archive(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns of the LSTM's own bookkeeping
        return save_program(
            torch.export.export(
                net, (torch.randn(2, 5, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
        )


def altered(archive, member, change):
    """The archive with `change` applied to one member's text."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(member):
                new = change(data.decode()).encode()
                assert new != data, "the planted change changed nothing"
                data = new
            target.writestr(name, data)
    return out.getvalue()


def test_a_program_survives_the_round_trip_with_any_batch_size(net, archive):
    x = torch.randn(7, 5, 4)
    assert torch.equal(run_module(load_program(archive, "net.pt2"))(x), net(x))


def test_the_archive_holds_no_path_of_its_author(archive):
    assert b"test_program" not in archive
    assert b"site-packages" not in archive


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda text: text.replace("torch.ops.aten.lstm.input", "torch.hub.load"),
            "no ATen operator",
        ),
        (
            lambda text: text.replace("torch.ops.aten.lstm.input", "torch.os.system"),
            "no ATen operator",
        ),
        (lambda text: text.replace("torch.ops.aten.lstm.input", "#shell:run"), "no ATen operator"),
        (
            lambda text: text.replace("Symbol('", "__import__('os').system('"),
            "more than arithmetic",
        ),
        (lambda text: text.replace("Symbol('", "().__class__.mro('"), "more than arithmetic"),
        (lambda text: text.replace("builtins.dict", "collections.namedtuple"), "only tensors"),
    ],
)
def test_an_archive_that_could_run_code_is_refused(archive, change, why):
    with pytest.raises(FileError, match=why):
        load_program(altered(archive, "model.json", change), "evil.pt2")


def test_pickled_weights_are_refused(archive):
    evil = altered(
        archive,
        "model_weights_config.json",
        lambda text: text.replace('"use_pickle": false', '"use_pickle": true', 1),
    )
    with pytest.raises(FileError, match="unpickling"):
        load_program(evil, "evil.pt2")


def test_a_pickled_constant_is_refused(archive):
    out = io.BytesIO(archive)
    with zipfile.ZipFile(out, "a") as members:
        members.writestr("archive/data/constants/opaque_obj_0", pickle.dumps({"a": 1}))
    with pytest.raises(FileError, match="pickled object"):
        load_program(out.getvalue(), "evil.pt2")


def test_guards_in_the_file_are_never_executed(archive, tmp_path):
    marker = tmp_path / "ran"

    def plant(text):
        document = json.loads(text)
        document["guards_code"] = [f"open({str(marker)!r}, 'w') is None"]
        return json.dumps(document)

    program = load_program(altered(archive, "model.json", plant), "guarded.pt2")
    run_module(program)(torch.randn(2, 5, 4))
    assert not marker.exists()


@pytest.mark.parametrize("size", [0, 1, 100, 2000])
def test_a_truncated_archive_is_refused(archive, size):
    with pytest.raises(FileError, match="archive"):
        load_program(archive[:size], "cut.pt2")
