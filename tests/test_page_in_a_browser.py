"""The page of `deploy --to web` in a real Chromium: what a person sees who opens, draws, drops a
wrong file, has no server, uses the keyboard, a phone, a camera or a microphone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ecqx_onnx import api
from ecqx_onnx.data import Dataset
from ecqx_onnx.errors import InputError, OptionError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.validation.devices import set_up
from tests.chromium import DESKTOP, FAKE_MEDIA, PHONE, find_chromium, open_browser, serve

LABELS = ("left", "right")
SIDE = 16
STALLED = "?wait=1"  # seconds of patience, instead of 20


def draw_strokes(count):
    """Light vertical strokes on black in the left or right half, and which: uint8 [N, 16, 16]."""
    generator = np.random.default_rng(0)
    pictures = np.zeros((count, SIDE, SIDE), np.uint8)
    sides = np.arange(count) % 2
    for picture, side in zip(pictures, sides, strict=True):
        column = generator.integers(2, 6) + 8 * side
        picture[3:13, column : column + 2] = 255
    return pictures, sides


def deploy_strokes(folder, *, mean=0.1, light_paper=False, target="onnxruntime", **options):
    """A page for a model that tells strokes in the left half from those in the right one."""
    find_chromium()
    try:
        set_up("web")
    except InputError as error:
        pytest.skip(str(error))
    pictures, sides = draw_strokes(40)
    if light_paper:
        pictures = 255 - pictures
    settings = Preprocessing("image", scale=255.0, mean=(mean,), std=(0.3,))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIDE * SIDE, 2))
    halves = torch.zeros(2, SIDE, SIDE)
    halves[0, :, :8] = halves[1, :, 8:] = -0.1 if light_paper else 0.1
    with torch.no_grad():
        net[1].weight.copy_(halves.reshape(2, -1))
        net[1].bias.zero_()
    example = torch.from_numpy(settings.apply(pictures[:2]))
    checkpoint = api.as_checkpoint(
        net, example=example, bits=4, preprocessing=settings, labels=LABELS
    )
    folder.mkdir(exist_ok=True)
    api.save(checkpoint, folder / "model.pt")
    api.convert(folder / "model.pt", folder / "strokes.onnx", target=target)
    data = Dataset.from_arrays(
        "strokes",
        {"x_test": pictures, "y_test": sides, "labels": np.array(LABELS)},
        preprocessing=settings,
    )
    against = folder / "model.pt"
    api.deploy(
        folder / "strokes.onnx", folder / "web", to="web", against=against, data=data, **options
    )
    return folder / "web"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return deploy_strokes(tmp_path_factory.mktemp("strokes"), title='Left & "right" <b>?</b>')


@pytest.fixture(scope="module")
def browser():
    find_chromium()
    with open_browser(*FAKE_MEDIA) as tab:
        yield tab


@pytest.fixture
def tab(browser):
    """The same browser for all, with an empty tab."""
    browser.open("about:blank")
    browser.set_window(DESKTOP)
    browser.errors.clear()
    return browser


def save_picture(path, *, light_paper=False):
    picture = draw_strokes(1)[0][0]
    Image.fromarray(255 - picture if light_paper else picture).save(path)
    return path


# Where it cannot start


def test_opened_by_a_double_click_it_says_at_once_how_to_serve_it(page, tab):
    tab.open(f"file://{page}/index.html")
    tab.wait("document.documentElement.dataset.state === 'failed'", limit=5)
    assert "needs a web server" in tab.text("#failure")
    assert "python3 -m http.server" in tab.text("#served")
    assert "http://localhost:8000" in tab.text("#served")
    assert "loading" not in tab.text("body")
    assert not tab.text("#stuck")


def test_a_server_that_knows_no_mjs_serves_it(page, tab):
    """Stock nginx sends .mjs as octet-stream, and .wasm too."""
    assert not list(page.rglob("*.mjs"))
    types = {".mjs": "application/octet-stream", ".wasm": "application/octet-stream"}
    with serve(page, types=types) as url:
        tab.open(url)
        tab.wait_until_ready()
        assert "passed" in tab.text("#verdict")
        assert tab.errors == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"types": {".js": "application/octet-stream"}}, "as application/octet-stream"),
        ({"headers": {"Content-Security-Policy": "default-src 'self'"}}, "'wasm-unsafe-eval'"),
        (
            {"headers": {"Content-Security-Policy": "script-src 'self'; connect-src 'none'"}},
            "'wasm-unsafe-eval'",
        ),
        (
            {
                "headers": {
                    "Content-Security-Policy": "script-src 'self' 'wasm-unsafe-eval'; "
                    "connect-src 'none'"
                }
            },
            "forbids it (connect-src)",
        ),
    ],
    ids=["type of scripts", "no WebAssembly", "neither", "no requests"],
)
def test_a_server_that_forbids_something_is_told_what(page, tab, settings, says):
    # start.js itself comes as a script that needs no type.
    with serve(page, **settings) as url:
        tab.open(url)
        tab.wait("document.documentElement.dataset.state === 'failed'")
        assert says in tab.text("#failure")
        assert "loading" not in tab.text("body")


def test_where_no_script_may_run_the_page_itself_says_so(page, tab):
    with serve(page, headers={"Content-Security-Policy": "script-src 'none'"}) as url:
        tab.open(url)
        tab.wait(
            "getComputedStyle(document.getElementById('stuck')).visibility === 'visible'"
            " && document.getElementById('stuck').innerText.includes('Content-Security-Policy')",
            limit=12,
        )


@pytest.mark.parametrize("name", ["app.js", "model.js", ".wasm", "manifest.json", "model.onnx"])
def test_a_file_that_never_arrives_is_named(page, tab, name):
    with serve(page, stalls=[name]) as url:
        tab.open(url + STALLED)
        tab.wait("document.documentElement.dataset.state === 'failed'", limit=20)
        assert name in tab.text("#failure")
        assert "nothing came for 1 s" in tab.text("#failure")


def test_a_golden_file_that_never_arrives_fails_the_self_check_and_nothing_else(page, tab):
    with serve(page, stalls=["00.output0.bin"]) as url:
        tab.open(url + STALLED)
        tab.wait_until_ready()
        assert "failed" in tab.text("#verdict")
        assert "00.output0.bin does not arrive" in tab.text("#checks")
        tab.click("#thumbnails button")
        tab.wait("document.getElementById('answer').textContent")


def test_a_start_page_sent_for_every_missing_file_is_recognised(page, tab, tmp_path):
    import shutil

    shutil.copytree(page, tmp_path / "web")
    (tmp_path / "web" / "manifest.json").write_text("<!doctype html><title>app</title>")
    with serve(tmp_path / "web") as url:
        tab.open(url)
        tab.wait("document.documentElement.dataset.state === 'failed'")
        assert "manifest.json is no JSON" in tab.text("#failure")


# What one sees


def open_ready(tab, url, size=DESKTOP):
    tab.set_window(size)
    tab.open(url)
    tab.wait_until_ready()


@pytest.fixture(scope="module")
def address(page):
    with serve(page) as url:
        yield url


def test_title_and_name_are_the_users(page, tab, address):
    open_ready(tab, address)
    name = 'Left & "right" <b>?</b>'
    assert tab.evaluate("document.title") == name
    assert tab.text("h1") == name
    assert "<title>Left &amp; &quot;right&quot; &lt;b&gt;" in (page / "index.html").read_text()
    assert json.loads((page / "manifest.json").read_text())["name"] == name
    assert tab.errors == []


def test_a_title_that_no_page_shows_is_refused(tmp_path):
    with pytest.raises(OptionError, match="--title has 300 characters"):
        deploy_strokes(tmp_path / "long", title="x" * 300)


def test_on_a_phone_the_self_check_is_seen_without_scrolling_and_nothing_is_cut_off(tab, address):
    open_ready(tab, address, PHONE)
    _, top, _, height = tab.box("#verdict")
    assert top + height < PHONE[1] / 3
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    assert tab.box("#prediction")[1] < PHONE[1]  # its heading is in sight


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_after_a_wrong_file_no_old_prediction_stays_and_the_error_is_in_sight(
    tab, address, tmp_path, size
):
    (tmp_path / "no image.png").write_text("no image")
    open_ready(tab, address, size)
    tab.click("#mode-file")
    tab.choose_file("#file", save_picture(tmp_path / "right.png"))
    tab.wait("document.getElementById('answer').textContent === 'left'")
    tab.choose_file("#file", tmp_path / "no image.png")
    tab.wait("!document.getElementById('trouble').hidden")
    assert "'no image.png' is no image" in tab.text("#trouble")
    assert not tab.text("#result")
    assert tab.evaluate("document.getElementById('answer').textContent") == ""
    _, top, _, height = tab.box("#trouble")
    assert top >= 0
    assert top + height <= size[1]
    _, drop_top, _, drop_height = tab.box("#drop")
    assert 0 <= top - (drop_top + drop_height) < 60  # right below what was used
    # The next good one takes it away, and inverting the wrong one brings nothing back.
    tab.click("#invert")
    assert not tab.text("#result")
    tab.click("#invert")
    tab.choose_file("#file", tmp_path / "right.png")
    tab.wait("document.getElementById('answer').textContent === 'left'")
    assert not tab.text("#trouble")


def test_a_dark_drawing_on_light_paper_is_offered_to_be_inverted(tab, address, tmp_path):
    open_ready(tab, address)
    tab.click("#mode-file")
    tab.choose_file("#file", save_picture(tmp_path / "as_trained.png"))
    tab.wait("document.getElementById('answer').textContent === 'left'")
    assert not tab.text("#offer")
    tab.choose_file("#file", save_picture(tmp_path / "paper.png", light_paper=True))
    tab.wait("!document.getElementById('offer').hidden")
    assert "dark on light" in tab.text("#offer")
    assert tab.text("#answer") == "right"  # as wrong as it is without inverting
    tab.click("#offer-invert")
    tab.wait("document.getElementById('answer').textContent === 'left'")
    assert not tab.text("#offer")
    assert tab.evaluate("document.getElementById('invert').checked")
    # Of the next picture, which needs none, it is offered to be taken back.
    tab.choose_file("#file", tmp_path / "as_trained.png")
    tab.wait("!document.getElementById('offer').hidden")


def test_a_model_of_dark_drawings_gets_a_light_pad_and_the_opposite_offer(tab, tmp_path):
    folder = deploy_strokes(tmp_path / "paper", mean=0.9, light_paper=True)
    with serve(folder) as url:
        open_ready(tab, url)
        assert "invert(1)" in tab.evaluate(
            "getComputedStyle(document.getElementById('pad')).filter"
        )
        draw_by_keyboard(tab)
        tab.wait("document.getElementById('answer').textContent")
        seen = "document.getElementById('seen').getContext('2d').getImageData(0, 0, 16, 16).data"
        lightness = np.array(tab.evaluate(f"[...{seen}]")).reshape(16, 16, 4)[..., 0]
        assert lightness[0].min() == 255  # paper
        assert lightness[8].min() < 100  # ink
        tab.click("#mode-file")
        tab.choose_file("#file", save_picture(tmp_path / "dark.png"))
        tab.wait("!document.getElementById('offer').hidden")
        assert "light on dark" in tab.text("#offer").split(",")[0]


def draw_by_keyboard(tab):
    """A stroke down in the left half, and one dot at the right that keeps it there."""
    tab.evaluate("document.getElementById('pad').focus()")
    tab.press("ArrowLeft", times=9)
    tab.press("ArrowUp", times=6)
    tab.press(" ", code="Space", text=" ")
    tab.press("ArrowDown", times=12)
    tab.press(" ", code="Space", text=" ")


def test_the_canvas_is_drawn_on_and_cleared_by_keyboard_alone(tab, address):
    open_ready(tab, address)
    for _ in range(12):
        tab.press("Tab")
        if tab.evaluate("document.activeElement.id") == "pad":
            break
    assert tab.evaluate("document.activeElement.id") == "pad"
    assert "arrows move" in tab.text("#pad-help")
    draw_by_keyboard(tab)
    tab.wait("document.getElementById('answer').textContent")
    drawn = "[...document.getElementById('pad').getContext('2d').getImageData(50, 140, 1, 1).data]"
    assert tab.evaluate(drawn)[0] == 255
    assert tab.evaluate("scrollY") == 0  # arrows drew, and did not scroll
    tab.press("Delete")
    tab.wait("document.getElementById('result').hidden")
    assert tab.evaluate(drawn)[0] == 0
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "clear"  # no trap


def test_the_camera_predicts_until_it_is_stopped(tab, address):
    open_ready(tab, address)
    tab.click("#mode-camera")
    tab.wait("document.getElementById('answer').textContent")
    assert tab.evaluate("document.getElementById('video').videoWidth") > 0
    tab.click("#camera-stop")
    assert tab.evaluate("document.getElementById('video').srcObject") is None
    assert tab.text("#drop")
    assert not tab.text("#camera")
    assert tab.errors == []


def test_without_permission_the_camera_is_told_and_none_is_left_running(page, address):
    with open_browser("--use-fake-device-for-media-stream", "--deny-permission-prompts") as tab:
        open_ready(tab, address)
        tab.click("#mode-camera")
        tab.wait("!document.getElementById('trouble').hidden")
        assert "may not use the camera" in tab.text("#trouble")


def test_the_microphone_records_as_long_as_the_model_hears(tab, tmp_path):
    from tests.test_deploy import a_model

    find_chromium()
    checkpoint, file, data = a_model("sound", tmp_path)
    folder = api.deploy(file, tmp_path / "web", to="web", against=checkpoint, data=data).folder
    with serve(folder) as url:
        open_ready(tab, url)
        assert tab.text("#record").startswith("Record 0.1")  # 1000 samples at 8000 Hz
        tab.click("#record")
        tab.wait("document.getElementById('answer').textContent")
        assert tab.text("#record").startswith("Record")
        assert not tab.text("#trouble")


# WebGPU


@pytest.mark.slow  # 27 MB from npm the first time
def test_the_gpu_takes_over_only_where_it_passes_the_self_check(tmp_path):
    try:
        set_up("webgpu")
    except InputError as error:
        pytest.skip(str(error))
    # Of 4 bit integers onnxruntime-web 1.30's WebGPU build casts none: tried below.
    folder = deploy_strokes(tmp_path / "gpu", target="onnxruntime-1.17", webgpu=True)
    refused = deploy_strokes(tmp_path / "refused", webgpu=True)
    flags = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with open_browser(*flags) as tab, serve(folder) as url:
        tab.open(url)
        tab.wait_until_ready()
        # So small a model is not worth 27 MB more.
        assert tab.evaluate("document.documentElement.dataset.device") == "wasm"
        if "is not here" in tab.text("#latency-note"):
            pytest.skip("this Chromium finds no WebGPU adapter, not even SwiftShader")
        assert "would not be faster" in tab.text("#latency-note")
        tab.open(url + "?device=webgpu")
        tab.wait_until_ready()
        assert tab.evaluate("document.documentElement.dataset.device") == "webgpu"
        assert "passed" in tab.text("#verdict")
        tab.click("#thumbnails button")
        tab.wait("document.getElementById('answer').textContent === 'left'")
        spoil_golden_output(folder)
        tab.open(url + "?device=webgpu")
        tab.wait_until_ready()
        assert tab.evaluate("document.documentElement.dataset.device") == "wasm"
        assert "fails the self-check and is not used" in tab.text("#latency-note")
        with serve(refused) as other:
            tab.open(other + "?device=webgpu")
            tab.wait_until_ready()
            assert tab.evaluate("document.documentElement.dataset.device") == "wasm"
            assert "WebGPU does not start" in tab.text("#latency-note")
            assert "passed" in tab.text("#verdict")


def spoil_golden_output(folder):
    """So that no self-check passes."""
    import hashlib

    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["golden"]["cases"][0]["outputs"][0]
    values = np.fromfile(folder / entry["file"], np.float32) + 1
    (folder / entry["file"]).write_bytes(values.tobytes())
    entry["sha256"] = hashlib.sha256(values.tobytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_gpu_is_for_the_web_only(tmp_path):
    from tests.test_deploy import foreign_file

    foreign_file(tmp_path / "foreign.onnx")
    with pytest.raises(OptionError, match="--webgpu is for --to web"):
        api.deploy(tmp_path / "foreign.onnx", tmp_path / "linux", to="linux", webgpu=True)
