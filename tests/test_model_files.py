"""State dicts as trainings leave them load; files of other tools are told by their first bytes."""

import json
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

import ecqx_onnx
from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx.sources.loading import apply_state, load_model, load_state

CODE = """from torch import nn
INPUT_SHAPE = (3,)

def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
"""


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "user.py").write_text(CODE)
    return f"{tmp_path / 'user.py'}:network"


def renamed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "_orig_mod.", "model._orig_mod.", "any.thing.else."]
)
def test_a_prefix_that_all_weights_have_is_stripped_and_told(tmp_path, spec, prefix):
    state = network().state_dict()
    torch.save(renamed(state, prefix), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt", factory=spec)
    assert all(torch.equal(value, state[name]) for name, value in loaded.model.state_dict().items())
    assert prefix == "_orig_mod." or any("left out" in note for note in loaded.notes)
    written = ecqx_onnx.convert(tmp_path / "weights.pt", tmp_path / "m.onnx", factory=spec, bits=8)
    assert prefix == "_orig_mod." or any("prefix" in note for note in written.notes)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {
            "state_dict": renamed(state, "model."),
            "epoch": 3,
            "hyper_parameters": {"lr": 0.1},
        },
        lambda state: {"ema_net": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda state: {"saved": {"network": {"weights_now": state}}, "step": 7},
    ],
)
def test_nested_dicts_of_any_name_are_looked_into(tmp_path, spec, wrap):
    state = network().state_dict()
    torch.save(wrap(state), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt", factory=spec)
    assert torch.equal(loaded.model[0].weight, state["0.weight"])


def test_two_state_dicts_under_unusual_names_are_not_chosen_between(tmp_path):
    torch.save(
        {"one": network().state_dict(), "two": network().state_dict()}, tmp_path / "weights.pt"
    )
    with pytest.raises(ModelError, match="no state dict"):
        load_state(tmp_path / "weights.pt")


def test_extra_and_missing_weights_are_named_and_can_be_accepted(tmp_path, spec):
    state = network().state_dict()
    del state["2.bias"]
    state["loss.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"lacks 2\.bias; has loss\.weight too many.*--no-strict"):
        load_model(tmp_path / "weights.pt", factory=spec)
    loaded = load_model(tmp_path / "weights.pt", factory=spec, strict=False)
    assert torch.equal(loaded.model[0].weight, state["0.weight"])
    assert "lacks 2.bias" in loaded.notes[0]
    written = ecqx_onnx.convert(
        tmp_path / "weights.pt", tmp_path / "m.onnx", factory=spec, bits=8, strict=False
    )
    assert any("lacks 2.bias" in note for note in written.notes)


def test_weights_of_another_network_are_refused_even_so():
    with pytest.raises(ModelError, match="does not fit"):
        apply_state(network(), {"a.b": torch.ones(2)}, "a test", strict=False)
    state = network().state_dict() | {"0.weight": torch.ones(7, 7)}
    with pytest.raises(ModelError, match="shape"):
        apply_state(network(), state, "a test", strict=False)


# Hugging Face


def safetensors(state):
    """By hand, as the format says."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name, value in state.items():
        content = (
            value.contiguous().view(torch.uint8).numpy().tobytes()
            if value.ndim
            else value.numpy().tobytes()
        )
        places = [len(data), len(data) + len(content)]
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": places,
        }
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_hugging_face_folder_gives_its_weights(tmp_path, spec):
    state = network().state_dict()
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(safetensors(renamed(state, "bert.")))
    (folder / "config.json").write_text("{}")
    for path in (folder, folder / "model.safetensors"):
        assert torch.equal(load_model(path, factory=spec).model[2].weight, state["2.weight"])
        with pytest.raises(ModelError, match=r"--model FILE\.py:FACTORY"):
            ecqx_onnx.convert(path, tmp_path / "m.onnx")


def test_the_parts_of_a_large_folder_are_put_together(tmp_path):
    state = network().state_dict() | {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(5),
    }
    names = list(state)
    (tmp_path / "a.safetensors").write_bytes(safetensors({name: state[name] for name in names[:3]}))
    (tmp_path / "b.safetensors").write_bytes(safetensors({name: state[name] for name in names[3:]}))
    places = {name: "a.safetensors" if name in names[:3] else "b.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = load_state(tmp_path)
    assert all(torch.equal(found[name], state[name]) for name in names)
    places["half"] = "../b.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FileError, match="outside its folder"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"data_offsets": [0, 10**12]}, {"shape": [10**9, 4]}, {"dtype": "F7"}, {"shape": "ab"}],
)
def test_safetensors_that_lie_are_refused(tmp_path, change):
    content = safetensors({"w": torch.ones(2, 2)})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["w"].update(change)
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + content[8 + length :]
    )
    with pytest.raises(FileError, match="safetensors"):
        load_state(tmp_path / "m.safetensors")


# Other tools


def archive(path, *names):
    with zipfile.ZipFile(path, "w") as members:
        for name in names:
            members.writestr(name, b"x")


def write_torchscript(path):
    archive(path, "net/data.pkl", "net/code/__torch__.py", "net/constants.pkl", "net/version")


FOREIGN = {
    "a TorchScript file": write_torchscript,
    "a TensorFlow Lite model": lambda path: path.write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(40)),
    "a Keras or HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40)),
    "a Keras model": lambda path: archive(path, "metadata.json", "config.json", "model.weights.h5"),
    "a Core ML model": lambda path: path.write_bytes(b"\x08\x04\x12\x20\x0a\x05input" + bytes(40)),
    "an ONNX model": lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch" + bytes(40)),
    "a GGUF file": lambda path: path.write_bytes(b"GGUF" + bytes(40)),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("name", ["model.pt", "model.h5", "model"])
def test_files_of_other_tools_are_told_by_their_first_bytes(tmp_path, spec, what, name):
    path = tmp_path / name
    FOREIGN[what](path)
    for options in ({}, {"factory": spec}, {"trust_pickle": True}):
        with pytest.raises(FileError, match=what) as raised:
            ecqx_onnx.convert(path, tmp_path / "m.onnx", **options)
        assert "trust-pickle" not in str(raised.value)
        assert "save it again" not in str(raised.value)


# What the user's own Python may import

IMPORTS = """import torch
from torch import nn
from torchvision.models import SqueezeNet

INPUT_SHAPE = (3, 32, 32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))

    def forward(self, x):
        return self.inner(x)
"""


def run_python(folder, code, *, importable=()):
    """In a process of its own; the current folder is not among what Python searches."""
    paths = [*map(str, importable), *(path for path in sys.path if path)]
    start = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    return subprocess.run([sys.executable, "-P", "-c", start], cwd=folder, check=True)


def test_a_pickle_finds_its_modules_in_the_current_folder_and_torchvision_imports(tmp_path):
    (tmp_path / "own_net.py").write_text(IMPORTS)
    save = """
from ecqx_onnx.quantization.relevance.zennit_import import import_zennit
import_zennit()
from own_net import Net
import torch
torch.save(Net(), "whole.pt")
torch.save(Net().state_dict(), "state.pt")
"""
    run_python(tmp_path, save, importable=[tmp_path])
    load = """
from ecqx_onnx.sources.loading import load_model
before = list(sys.path)
for given in ({"path": "whole.pt", "trust_pickle": True}, {"path": "state.pt", "factory": SPEC}):
    assert type(load_model(**given).model).__name__ == "Net"
assert sys.path == before
"""
    run_python(tmp_path, load.replace("SPEC", "'own_net.py:Net'"))


def test_a_pickle_of_a_script_is_refused_with_what_to_do(tmp_path):
    script = "import torch; from torch import nn\n"
    script += "class Net(nn.Linear): pass\n"
    script += "torch.save(Net(2, 2), 'main.pt')\n"
    (tmp_path / "train.py").write_text(script)
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True)
    with pytest.raises(FileError, match=r"--model FILE\.py:CLASS"):
        load_model(tmp_path / "main.pt", trust_pickle=True)


def test_deploy_takes_a_state_dict_that_has_more_than_the_model(tmp_path, spec):
    torch.manual_seed(0)
    model = network()
    torch.save(model.state_dict() | {"old.weight": torch.zeros(2)}, tmp_path / "more.pt")
    out = tmp_path / "m.onnx"
    options = {"factory": spec, "strict": False}
    ecqx_onnx.convert(tmp_path / "more.pt", out, bits=8, **options)
    deploy = {"to": "linux", "against": tmp_path / "more.pt", "factory": spec}
    with pytest.raises(ModelError, match=r"old\.weight too many"):
        ecqx_onnx.deploy(out, tmp_path / "folder", **deploy)
    ecqx_onnx.deploy(out, tmp_path / "folder", strict=False, **deploy)
    assert (tmp_path / "folder").is_dir()
