"""The sample projects of `deploy --to android` and `--to ios`: what can be said of them without an
Android SDK, Xcode or onnxruntime for the JVM."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ecqx_onnx import api
from ecqx_onnx.deployment.platforms import TEMPLATES
from tests.test_deploy import foreign_file

SIGNATURES = Path(__file__).parent / "signatures" / "onnxruntime_java.txt"
STUB = Path(__file__).parent / "stubs" / "onnxruntime.kt"
TITLE = '@Bob\'s "net" & <b>'
# What the variables of the runner hold, and how Kotlin writes getX() of Java.
HOLDS = {
    "environment": "OrtEnvironment",
    "options": "SessionOptions",
    "session": "OrtSession",
    "result": "Result",
    "value": "OnnxTensor",
    "value.info": "TensorInfo",
    "OrtEnvironment": "OrtEnvironment",
    "OrtSession": "SessionOptions",
    "OnnxTensor": "OnnxTensor",
    "OnnxJavaType": "OnnxJavaType",
}


def read_signatures():
    """{class: {member: number of parameters}}"""
    found = {}
    for line in SIGNATURES.read_text().splitlines():
        if line and not line.startswith("#"):
            owner, member, parameters, _, kind = line.split("\t")
            assert kind in ("static", "instance")
            # A comma within <> parts no parameters.
            plain = re.sub(r"<[^>]*>", "", parameters)
            found.setdefault(owner, {})[member] = len(plain.split(",")) if plain else 0
    return found


def split_arguments(source, start):
    """The arguments of a call whose "(" is at `start`, as they are parted by commas."""
    depth, parts = 0, [""]
    for character in source[start:]:
        depth += character in "([{"
        if character in ")]}":
            depth -= 1
            if depth == 0:
                break
        if character == "," and depth == 1:
            parts.append("")
        elif depth > 1 or character != "(":
            parts[-1] += character
    return [part for part in map(str.strip, parts) if part]


def list_uses(source):
    """(class, member, number of arguments or None) of each use of ai.onnxruntime in Kotlin."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    code = re.sub(r"^import .*$", "", code, flags=re.MULTILINE)
    for name, owner in HOLDS.items():
        for match in re.finditer(rf"(?<![\w.]){re.escape(name)}\.(\w+)(\()?", code):
            if f"{name}.{match[1]}" in HOLDS:
                continue
            count = len(split_arguments(code, match.end() - 1)) if match[2] else None
            yield owner, match[1], count


def find_member(members, name):
    """Under its own name, or as the getter that Kotlin writes as a property."""
    getter = f"get{name[0].upper()}{name[1:]}"
    return name if name in members else getter if getter in members else None


@pytest.mark.parametrize("name", ["EcqxModel.kt", "EcqxJob.kt"])
def test_the_kotlin_runner_uses_only_what_onnxruntimes_java_api_has(name):
    source = (TEMPLATES / "android" / name).read_text()
    known = read_signatures()
    imported = set(re.findall(r"^import ai\.onnxruntime\.(\w+)$", source, re.MULTILINE))
    assert imported <= known.keys()
    uses = set(list_uses(source)) if imported else set()
    assert len(uses) > 8 or name != "EcqxModel.kt"
    for owner, member, count in uses:
        if owner == "OnnxJavaType" and member == "entries":
            continue
        found = find_member(known[owner], member)
        assert found, f"{owner} has no {member}"
        if count is not None:
            assert known[owner][found] == count, f"{owner}.{member} takes another number"


def test_a_use_that_the_api_lacks_is_seen():
    source = (TEMPLATES / "android" / "EcqxModel.kt").read_text()
    changed = source.replace("environment.createSession(modelBytes", "environment.open(modelBytes")
    members = {member for owner, member, _ in list_uses(changed) if owner == "OrtEnvironment"}
    assert "open" in members
    assert find_member(read_signatures()["OrtEnvironment"], "open") is None


def test_the_stand_in_that_kotlin_is_compiled_against_has_nothing_more_than_the_api():
    """So what compiles against it uses nothing else."""
    known = {member for members in read_signatures().values() for member in members}
    source = STUB.read_text()
    for name in re.findall(r"\b(?:fun|val) (\w+)", source):
        own = name in ("copy", "data", "i", "values", "shape", "info", "type")
        assert own or find_member(known, name), name
    for name in re.findall(
        r"\b([A-Z0-9]+)\b(?=[,\s}])", source.split("enum class")[1].split("}")[0]
    ):
        assert name in known, name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    foreign_file(folder / "net.onnx")
    for platform in ("android", "ios"):
        api.deploy(folder / "net.onnx", folder / platform, to=platform, title=TITLE)
    return folder


def test_the_gradle_project_is_whole_and_named_by_the_title(folders):
    android = folders / "android"
    for name in ("settings.gradle.kts", "build.gradle.kts", "app/build.gradle.kts"):
        source = (android / name).read_text()
        assert source.count("{") == source.count("}") > 0
        assert "$least" not in source
    properties = (android / "gradle.properties").read_text()
    assert re.search(r"^onnxruntimeVersion=1\.\d+\.\+$", properties, re.MULTILINE)
    strings = ElementTree.parse(android / "app/src/main/res/values/strings.xml").getroot()
    assert strings.find("string[@name='app_name']").text == '\\@Bob\\\'s \\"net\\" & <b>'
    manifest = ElementTree.parse(android / "app/src/main/AndroidManifest.xml").getroot()
    (activity,) = manifest.iter("activity")
    name = activity.get("{http://schemas.android.com/apk/res/android}name").lstrip(".")
    assert (android / f"app/src/main/java/ecqx/sample/{name}.kt").is_file()
    # All that the build copies is in the folder.
    build = (android / "app/build.gradle.kts").read_text()
    for names in re.findall(r"include\(([^)]*)\)", build):
        for copied in re.findall(r'"([^"]+)"', names):
            assert (android / copied.removesuffix("/**")).exists(), copied


def test_the_android_sample_calls_what_its_runner_has(folders):
    runner = (folders / "android" / "EcqxModel.kt").read_text()
    members = set(re.findall(r"^    (?:override )?(?:fun|val) (\w+)", runner, re.MULTILINE))
    sample = (folders / "android/app/src/main/java/ecqx/sample/MainActivity.kt").read_text()
    called = set(re.findall(r"\b(?:found|known|model\?)\.(\w+)", sample))
    assert {"selfCheck", "imageToRaw", "predict", "latencyMilliseconds"} <= called <= members
    assert sample.count("{") == sample.count("}")


def parse_project(text):
    """An old-style property list as Python values: dicts, lists and texts."""
    text = re.sub(r"/\*.*?\*/|^//[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[{}();,=]|[^\s{}();,="]+', text)
    value, rest = parse_value(tokens, 0)
    assert rest == len(tokens)
    return value


def parse_value(tokens, at):
    if tokens[at] == "{":
        found, at = {}, at + 1
        while tokens[at] != "}":
            key = tokens[at].strip('"')
            assert tokens[at + 1] == "="
            found[key], at = parse_value(tokens, at + 2)
            assert tokens[at] == ";"
            at += 1
        return found, at + 1
    if tokens[at] == "(":
        found, at = [], at + 1
        while tokens[at] != ")":
            value, at = parse_value(tokens, at)
            found.append(value)
            at += tokens[at] == ","
        return found, at + 1
    return tokens[at].strip('"'), at + 1


def list_texts(value):
    """Every text in a nested value."""
    if isinstance(value, str):
        yield value
    else:
        for each in value.values() if isinstance(value, dict) else value:
            yield from list_texts(each)


def test_every_reference_of_the_xcode_project_leads_to_something(folders):
    ios = folders / "ios"
    project = parse_project((ios / "EcqxSample.xcodeproj/project.pbxproj").read_text())
    objects = project["objects"]
    used = {project["rootObject"]}
    for entry in objects.values():
        used |= {text for text in list_texts(entry) if re.fullmatch(r"[0-9A-F]{24}", text)}
    assert used == objects.keys()
    paths = [
        entry["path"]
        for entry in objects.values()
        if entry["isa"] == "PBXFileReference" and entry["sourceTree"] == "<group>"
    ]
    assert len(paths) == 6
    for path in paths:
        assert (ios / path).exists(), path
    (package,) = [e for e in objects.values() if e["isa"] == "XCRemoteSwiftPackageReference"]
    assert re.fullmatch(r"1\.\d+\.0", package["requirement"]["minimumVersion"])
    (copy,) = [e for e in objects.values() if e["isa"] == "PBXCopyFilesBuildPhase"]
    assert copy["dstPath"] == "model"  # where the app looks for it


def test_the_ios_sample_is_of_valid_syntax_and_calls_what_its_runner_has(folders):
    swift = pytest.importorskip("tree_sitter_swift", reason="tree-sitter-swift is not installed")
    tree_sitter = pytest.importorskip("tree_sitter")
    parser = tree_sitter.Parser(tree_sitter.Language(swift.language()))
    source = (folders / "ios/Sample/EcqxSampleApp.swift").read_bytes()
    assert not parser.parse(source).root_node.has_error
    runner = (folders / "ios" / "EcqxModel.swift").read_text()
    members = set(re.findall(r"^    (?:func|let) (\w+)", runner, re.MULTILINE))
    called = set(re.findall(r"(?<![\w.])(?:found|model)\.(\w+)", source.decode()))
    assert {"selfCheck", "predict", "latency", "raw"} <= called <= members


@pytest.mark.parametrize("platform", ["android", "ios"])
def test_the_readme_says_how_to_open_the_project_and_that_it_was_never_built(folders, platform):
    text = " ".join((folders / platform / "README.md").read_text().split())
    assert "The sample app" in text
    assert "the sample app was never built" in text
    assert "$" not in text.replace("${check", "").replace("${model", "").replace("model/$name", "")
