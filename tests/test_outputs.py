"""`replace_on_success`: whole or not at all, one winner among writers, leftovers go with the next
one."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ecqx_onnx_converters.graph import moves, outputs
from ecqx_onnx_converters.graph.outputs import (
    check_output,
    derive_path,
    open_temporary_folder,
    replace_folder_on_success,
    replace_on_success,
)

from ecqx_onnx.errors import FileError

pytestmark = pytest.mark.skipif(outputs.fcntl is None, reason="POSIX only")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_pair(path, content, *, force=True, **options):
    with replace_on_success(
        path, force=force, beside=[derive_path(path, ".data")], **options
    ) as temporary:
        temporary.with_name(path.name + ".data").write_text(f"{content} data")
        temporary.write_text(content)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD = {"out": "old", "out.data": "old data"}
NEW = {"out": "new", "out.data": "new data"}


def in_another_process(tmp_path, line):
    """Runs Python in which `die` kills its process, `dies_at` before a file of a name is made."""
    text = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
from ecqx_onnx_converters.graph import moves, outputs
from tests.test_outputs import *
path = Path({str(tmp_path)!r}) / "out"
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def dies_at(call, name):
    real = getattr(os, call)
    def watched(*args, **kwargs):
        if str(args[1 if len(args) > 1 else 0]).endswith(name):
            die()
        return real(*args, **kwargs)
    setattr(os, call, watched)
{line}
"""
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)


@pytest.mark.parametrize(
    "where",
    ['dies_at("replace", "/out.data")', 'dies_at("replace", "/out")', 'dies_at("link", "placed")'],
)
def test_a_pair_that_was_half_moved_when_its_process_was_killed_is_put_back(tmp_path, where):
    write_pair(tmp_path / "out", "old")
    result = in_another_process(tmp_path, f'{where}\nwrite_pair(path, "new")')
    assert result.returncode == -9, result.stderr
    assert len(names(tmp_path)) == 3
    with pytest.raises(FileError, match="exists already"):
        check_output(tmp_path / "out", force=False)
    assert contents(tmp_path) == OLD


def test_a_new_pair_that_was_half_moved_vanishes(tmp_path):
    result = in_another_process(
        tmp_path, 'dies_at("link", "/out")\nwrite_pair(path, "new", force=False)'
    )
    assert result.returncode == -9, result.stderr
    assert "out.data" in names(tmp_path)
    write_pair(tmp_path / "out", "new", force=False)
    assert contents(tmp_path) == NEW


def test_a_replaced_pair_that_was_moved_when_its_process_was_killed_stays(tmp_path):
    write_pair(tmp_path / "out", "old")
    result = in_another_process(tmp_path, 'outputs.flush_folder = die\nwrite_pair(path, "new")')
    assert result.returncode == -9, result.stderr
    check_output(tmp_path / "out", force=True)
    assert contents(tmp_path) == NEW


def test_what_belonged_to_the_replaced_output_goes_even_after_a_kill(tmp_path):
    write_pair(tmp_path / "out", "old")
    line = """
outputs.flush_folder = die
with replace_on_success(path, force=True, superseded=[path.with_name("out.data")]) as temporary:
    temporary.write_text("new")
"""
    assert in_another_process(tmp_path, line).returncode == -9
    check_output(tmp_path / "out", force=True)
    assert contents(tmp_path) == {"out": "new"}


def test_a_file_that_a_user_has_put_there_since_the_kill_is_left_alone(tmp_path):
    result = in_another_process(
        tmp_path, 'dies_at("link", "/out")\nwrite_pair(path, "new", force=False)'
    )
    assert result.returncode == -9, result.stderr
    (tmp_path / "out.data").unlink()
    (tmp_path / "out.data").write_text("mine")
    check_output(tmp_path / "out", force=True)
    assert contents(tmp_path) == {"out.data": "mine"}


def test_a_live_writers_temporaries_stay(tmp_path):
    with replace_on_success(tmp_path / "out", force=False) as temporary:
        temporary.write_text("first")
        result = in_another_process(
            tmp_path, "check_output(path, force=False)\nwrite_pair(path, 'second', force=False)"
        )
        assert result.returncode == 0, result.stderr
        check_output(tmp_path / "out", force=True)
        assert temporary.exists()
        (tmp_path / "out").unlink()
    assert contents(tmp_path) == {"out": "first", "out.data": "second data"}


def test_only_what_is_ours_for_this_output_is_taken_for_a_leftover(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lock").touch()
    (outside / "mine").write_text("mine")
    (tmp_path / ".out.0123456789ab.ecqx-onnx").symlink_to(outside)
    (tmp_path / ".out.0123456789ac.ecqx-onnx").write_text("a file")
    for other in (
        ".out.0123.ecqx-onnx",
        ".out.0123456789ab.ecqx-onnx.old",
        ".other.0123456789ab.ecqx-onnx",
        "out.0123456789ab",
    ):
        (tmp_path / other).mkdir()
        (tmp_path / other / "lock").touch()
    before = names(tmp_path)
    write_pair(tmp_path / "out", "new", force=False)
    assert names(tmp_path) == sorted([*before, "out", "out.data"])
    assert (outside / "mine").read_text() == "mine"


def test_a_link_in_a_leftover_is_removed_and_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    left = tmp_path / ".out.0123456789ab.ecqx-onnx"
    left.mkdir()
    (left / "lock").touch()
    (left / "new").symlink_to(tmp_path / "mine")
    (left / "gone").symlink_to(tmp_path / "mine")
    check_output(tmp_path / "out", force=False)
    assert names(tmp_path) == ["mine"]
    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_move_that_fails_half_way_leaves_everything_as_it_was(tmp_path, monkeypatch, failing):
    write_pair(tmp_path / "out", "old")
    real, calls = os.replace, iter(range(1, 100))

    def fails(*args):
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(FileError, match="Input/output error; nothing was left behind"):
        write_pair(tmp_path / "out", "new")
    assert contents(tmp_path) == OLD


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("moment", ["link", "replace"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_interrupt_at_any_move_leaves_one_whole_pair(
    tmp_path, monkeypatch, signal, moment, call
):
    write_pair(tmp_path / "out", "old")
    real, calls = getattr(os, moment), iter(range(1, 100))

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        if next(calls) == call:
            raise signal

    monkeypatch.setattr(os, moment, interrupted)
    if moment == "replace" and call > 2:
        write_pair(tmp_path / "out", "new")
        assert contents(tmp_path) == NEW
        return
    with pytest.raises(signal):
        write_pair(tmp_path / "out", "new")
    assert contents(tmp_path) in (OLD, NEW)


def no_links(*_, **__):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("force", [False, True])
def test_file_systems_without_hard_links_do_as_well(tmp_path, monkeypatch, force):
    monkeypatch.setattr(os, "link", no_links)
    if force:
        write_pair(tmp_path / "out", "old")
    else:
        (tmp_path / "out").write_text("old")
        with pytest.raises(FileError, match="exists already"):
            write_pair(tmp_path / "out", "new", force=False)
        assert contents(tmp_path) == {"out": "old"}
        (tmp_path / "out").unlink()
    write_pair(tmp_path / "out", "new", force=force)
    assert contents(tmp_path) == NEW
    with replace_on_success(
        tmp_path / "out", force=True, superseded=[tmp_path / "out.data"]
    ) as temporary:
        temporary.write_text("alone")
    assert contents(tmp_path) == {"out": "alone"}


@pytest.mark.parametrize("failing", [1, 2])
def test_without_hard_links_a_failed_move_is_taken_back_too(tmp_path, monkeypatch, failing):
    monkeypatch.setattr(os, "link", no_links)
    write_pair(tmp_path / "out", "old")
    real, calls = os.replace, iter(range(1, 100))

    def fails(*args):
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(FileError, match="Input/output error"):
        write_pair(tmp_path / "out", "new")
    assert contents(tmp_path) == OLD


def test_what_cannot_be_removed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)

    def write_on_a_full_disk():
        with replace_on_success(tmp_path / "out", force=False) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    left = r"'.*/\.out\.[0-9a-f]{12}\.ecqx-onnx' is left and can be deleted"
    with pytest.raises(FileError, match=left) as caught:
        write_on_a_full_disk()
    assert "nothing was left" not in str(caught.value)


@pytest.mark.parametrize("force", [False, True])
def test_of_many_writers_at_once_one_wins_and_the_others_are_refused(tmp_path, force):
    barrier, refused, won = threading.Barrier(8), [], []

    def write(number):
        try:
            with replace_on_success(tmp_path / "out", force=force) as temporary:
                temporary.write_text(f"{number}" * 1000)
                barrier.wait()
            won.append(number)
        except FileError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["out"]
    assert len(won) == (8 if force else 1)
    assert (tmp_path / "out").read_text() in {f"{number}" * 1000 for number in won}
    assert all("exists already" in sentence for sentence in refused)


def test_of_two_folders_at_once_one_wins(tmp_path):
    def write(content, *, meanwhile=lambda: None):
        with replace_folder_on_success(tmp_path / "out", check=lambda: None, force=False) as folder:
            (folder / "a").write_text(content)
            meanwhile()

    with pytest.raises(FileError, match="exists already"):
        write("first", meanwhile=lambda: write("second"))
    assert (tmp_path / "out" / "a").read_text() == "second"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(moves, "_renameat2", lambda *_: False)
    for content in ("old", "new"):
        with replace_folder_on_success(tmp_path / "out", check=lambda: None, force=True) as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "kept").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    with replace_folder_on_success(tmp_path / "out", check=lambda: None, force=True) as folder:
        (folder / "a").write_text("a")
    assert not (tmp_path / "out").is_symlink()
    assert names(tmp_path) == ["kept", "out"]
    assert names(tmp_path / "kept") == []


def test_a_folder_that_was_moved_away_when_its_process_was_killed_comes_back(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    line = """
outputs.exchange_names = lambda *_: False
outputs.rename_to_free = die
with replace_folder_on_success(path, check=lambda: None, force=True) as folder:
    (folder / "new").write_text("new")
"""
    assert in_another_process(tmp_path, line).returncode == -9
    assert not (tmp_path / "out").exists()
    outputs.remove_leftovers(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_no_source_is_replaced_by_a_companion(tmp_path):
    write_pair(tmp_path / "out", "old")
    with pytest.raises(FileError, match=r"out\.data: is what is read"):
        write_pair(tmp_path / "out", "new", sources=[tmp_path / "out.data"])
    assert contents(tmp_path) == OLD


def test_a_file_that_nobody_declared_is_not_moved(tmp_path):
    (tmp_path / ".bashrc").write_text("mine")
    with replace_on_success(tmp_path / "out", force=True) as temporary:
        temporary.write_text("new")
        temporary.with_name(".bashrc").write_text("evil")
    assert contents(tmp_path) == {"out": "new", ".bashrc": "mine"}


@pytest.mark.parametrize("length", [1, 235, 243, 250, 251, 255])
@pytest.mark.parametrize("letter", ["n", "ü", "\udcff"])
def test_names_of_every_length_have_temporaries_and_companions(tmp_path, length, letter):
    unit = len(os.fsencode(letter))
    path = tmp_path / (letter * (length // unit) + "n" * (length % unit))
    data = derive_path(path, ".data")
    assert len(os.fsencode(data.name)) <= 255
    with replace_on_success(path, force=False, beside=[data]) as temporary:
        temporary.with_name(data.name).write_text("data")
        temporary.write_text("model")
    assert names(tmp_path) == sorted([path.name, data.name])
    assert data != derive_path(
        path.with_name(letter * (length // unit) + "m" * (length % unit or 1)), ".data"
    )


def test_longer_names_are_refused_in_a_sentence(tmp_path):
    for name, reason in (
        ("n" * 256, "a name can have 255 bytes"),
        ("ü" * 128, "this one has 256"),
        ("a\0b", "zero character"),
    ):
        with pytest.raises(FileError, match=reason):
            check_output(tmp_path / name, force=True)
    with pytest.raises(FileError, match="File name too long"):
        check_output(tmp_path / ("n" * 300) / "out", force=True)


def test_temporaries_of_killed_processes_go_with_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line = """
import tempfile
tempfile.tempdir = str(path.parent)
with open_temporary_folder() as folder:
    (folder / "a").touch()
    die()
"""
    assert in_another_process(tmp_path, line).returncode == -9
    assert len(names(tmp_path)) == 1
    with open_temporary_folder() as folder:
        assert len(names(tmp_path)) == 1
        assert list(folder.iterdir()) == []
    assert names(tmp_path) == []


def test_a_temporary_that_another_process_takes_away_while_it_is_made_is_made_anew(
    tmp_path, monkeypatch
):
    real, calls = os.mkdir, iter(range(100))

    def swept(folder, *mode):
        real(folder, *mode)
        if next(calls) == 0:
            os.rmdir(folder)

    monkeypatch.setattr(os, "mkdir", swept)
    write_pair(Path(tmp_path / "out"), "new", force=False)
    assert contents(tmp_path) == NEW
