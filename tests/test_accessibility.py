"""axe finds nothing serious on the pages that are written: of `deploy`, `report` and `compress`,
and on the built documentation, at a desk and on a phone, in light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

import ecqx_onnx
from ecqx_onnx.compression.page import write_page
from ecqx_onnx.reporting import write_report
from tests.axe import VARIANTS, find_faults
from tests.chromium import PHONE, find_chromium, open_browser, serve
from tests.test_page_in_a_browser import deploy_strokes, save_picture
from tests.test_report import trained  # noqa: F401

DOCS = Path(__file__).parents[1] / "docs" / "_build" / "html"


@pytest.fixture(scope="module")
def tab():
    find_chromium()
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def strokes(tmp_path_factory):
    return deploy_strokes(tmp_path_factory.mktemp("strokes"), title="Strokes")


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(trained[0], path)
    return path


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The page of a small float network that was compressed."""
    folder = tmp_path_factory.mktemp("compressed")
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((24, 64)), generator.standard_normal((64, 5))
    weights = {"first": first.astype(np.float32), "second": second.astype(np.float32)}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "first"], ["a"]),
        onnx.helper.make_node("Relu", ["a"], ["b"]),
        onnx.helper.make_node("MatMul", ["b", "second"], ["y"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", width])
        for name, width in (("x", 24), ("y", 5))
    ]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.save(model, folder / "net.onnx")
    np.savez(folder / "data.npz", x=generator.standard_normal((200, 24)).astype(np.float32))
    result = ecqx_onnx.compress(
        folder / "net.onnx", folder / "small.onnx", data=str(folder / "data.npz"), max_error=0.3
    )
    write_page(result, folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize(("size", "dark"), VARIANTS)
def test_the_page_of_deploy(tab, strokes, tmp_path, size, dark):
    tab.set_window(size, dark=dark)
    with serve(strokes) as url:
        tab.open(url)
        tab.wait_until_ready()
        tab.evaluate("document.getElementById('check-details').open = true")
        tab.evaluate("document.querySelector('#thumbnails button').click()")
        tab.wait("document.getElementById('answer').textContent")
        assert find_faults(tab) == []
        # With a message and an offer.
        tab.click("#mode-file")
        tab.choose_file("#file", save_picture(tmp_path / "paper.png", light_paper=True))
        tab.wait("!document.getElementById('offer').hidden")
        tab.evaluate("document.getElementById('trouble').hidden = false")
        tab.evaluate("document.getElementById('trouble').textContent = 'no image'")
        assert find_faults(tab) == []


@pytest.mark.parametrize(("size", "dark"), VARIANTS)
def test_the_page_that_could_not_start(tab, strokes, size, dark):
    tab.set_window(size, dark=dark)
    tab.open(f"file://{strokes}/index.html")
    tab.wait("document.documentElement.dataset.state === 'failed'")
    assert find_faults(tab) == []


@pytest.mark.parametrize("name", ["report", "compressed"])
@pytest.mark.parametrize(("size", "dark"), VARIANTS)
def test_the_reports(tab, request, name, size, dark):
    path = request.getfixturevalue(name)
    tab.set_window(size, dark=dark)
    tab.open(f"file://{path}")
    tab.wait("document.querySelector('footer') !== null")
    assert find_faults(tab) == []
    tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert find_faults(tab) == []


@pytest.mark.parametrize(("size", "dark"), VARIANTS)
def test_the_documentation(tab, size, dark):
    if not (DOCS / "index.html").is_file():
        pytest.skip("the documentation is not built: `make docs`")
    tab.set_window(size, dark=dark)
    faults = {}
    for path in sorted(DOCS.glob("*.html")):
        tab.open(f"file://{path}")
        tab.wait("document.readyState === 'complete'")
        found = find_faults(tab)
        if found:
            faults[path.name] = found
    assert faults == {}


# The reports on a phone and by keyboard


@pytest.mark.parametrize("name", ["report", "compressed"])
def test_reports_are_short_on_a_phone_and_nothing_is_cut_off(tab, request, name):
    path = request.getfixturevalue(name)
    tab.set_window(PHONE)
    tab.open(f"file://{path}")
    tab.wait("document.querySelector('footer') !== null")
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    assert tab.evaluate("document.documentElement.scrollHeight") < 3.5 * PHONE[1]
    tab.set_window((1280, 900))
    # At a desk everything is open without a click.
    charts = "[...document.querySelectorAll('svg[role=img]')].every(each => each.checkVisibility())"
    assert tab.evaluate(charts)


@pytest.mark.parametrize("name", ["report", "compressed"])
def test_every_table_can_be_reached_and_scrolled_by_keyboard(tab, request, name):
    path = request.getfixturevalue(name)
    page = path.read_text(encoding="utf-8")
    framed = re.findall(
        r'<div class="wide" tabindex="0" role="region" aria-label="[^"]+"><table>', page
    )
    assert len(framed) == page.count("<table>") > 0
