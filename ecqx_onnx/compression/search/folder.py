"""Keeps what a search has found so far in OUT.compress/, so that the same command goes on there.

key.json      hash of model, data and options; another command's folder is emptied
slopes.json   the sensitivities
points.jsonl  one point a line, by its coordinate
lock          process id of the command that works here
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ecqx_onnx.compression.search.points import Point
from ecqx_onnx.compression.search.quality import OutputQuality, Quality
from ecqx_onnx.errors import FileError
from ecqx_onnx.validation.outputs.metrics import Proportion


class SearchFolder:
    """The folder beside the output, locked. Use as `with SearchFolder.at(out, key) as folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextlib.contextmanager
    def at(cls, out: Path, key: str) -> Iterator[SearchFolder]:
        """Lock the folder beside an output; what another key left in it goes.

        It is removed when the block ends well or fails, and stays when it is interrupted.

        Args:
            out: path of the output; the folder has its name and .compress.
            key: stands for everything that the search's points depend on.

        Yields:
            The folder.

        Raises:
            FileError: another process works there, or the folder can't be written.
        """
        folder = cls(out.with_name(out.name + ".compress"))
        folder._lock()
        try:
            folder._keep_if(key)
            yield folder
        except KeyboardInterrupt:
            (folder.path / "lock").unlink(missing_ok=True)
            raise
        except BaseException:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        shutil.rmtree(folder.path, ignore_errors=True)

    def _lock(self) -> None:
        try:
            self.path.mkdir(exist_ok=True)
            lock = self.path / "lock"
            owner = _find_owner(lock)
            if owner is not None:
                raise FileError(
                    f"{self.path}: process {owner} compresses to the same file; wait for it, or "
                    "give another name"
                )
            lock.unlink(missing_ok=True)
            handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(handle, str(os.getpid()).encode())
            os.close(handle)
        except FileExistsError:
            raise FileError(f"{self.path}: another process has just begun there") from None
        except OSError as error:
            raise FileError(f"{self.path}: can't be used ({error.strerror or error})") from error

    def _keep_if(self, key: str) -> None:
        file = self.path / "key.json"
        if not (file.is_file() and file.read_text(encoding="utf-8") == key):
            for name in ("slopes.json", "points.jsonl"):
                (self.path / name).unlink(missing_ok=True)
            file.write_text(key, encoding="utf-8")

    def slopes(self) -> dict[str, float] | None:
        """Read the sensitivities of an earlier run.

        Returns:
            Weight -> a_l; None without, or where they can't be read.
        """
        try:
            found = json.loads((self.path / "slopes.json").read_text(encoding="utf-8"))
            return {str(name): float(value) for name, value in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return None

    def keep_slopes(self, slopes: Mapping[str, float]) -> None:
        """Store the sensitivities for the next run.

        Args:
            slopes: weight -> a_l.
        """
        _replace(self.path / "slopes.json", json.dumps(dict(slopes)))

    def points(self) -> dict[float, Point]:
        """Read the points of an earlier run; a line cut short is passed over.

        Returns:
            Point by its coordinate, the bits that were asked for.
        """
        found = {}
        try:
            lines = (self.path / "points.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                point = _read_point(json.loads(line))
                found[point.bits] = point
        return found

    def keep_point(self, point: Point) -> None:
        """Store one point for the next run.

        Args:
            point: that was measured.
        """
        with open(self.path / "points.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(point)) + "\n")


def _find_owner(lock: Path) -> int | None:
    """The process that holds the lock, if it is alive and another one."""
    try:
        owner = int(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if owner == os.getpid():
        return None
    try:
        os.kill(owner, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return owner
    return owner


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read_point(document: Any) -> Point:
    quality = document["quality"]
    made = Quality(
        tuple(OutputQuality(**output) for output in quality["outputs"]),
        _read_proportion(quality["agreement"]),
        _read_proportion(quality["accuracy"]),
        _read_proportion(quality["float_accuracy"]),
        int(quality["samples"]),
    )
    numbers = (float(document["bits"]), int(document["nbytes"]))
    return Point(*numbers, float(document["bits_per_weight"]), made, dict(document["steps"]))


def _read_proportion(document: Any) -> Proportion | None:
    return None if document is None else Proportion(int(document["hits"]), int(document["total"]))


def hash_parts(*parts: Any) -> str:
    """Hash arrays and bytes by their contents, and anything else by its text.

    Args:
        parts: whatever the result depends on, in a fixed order.

    Returns:
        SHA-256, as hexadecimal digits.
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(np.ascontiguousarray(part).tobytes())
        else:
            total.update(part if isinstance(part, bytes) else repr(part).encode())
    return total.hexdigest()
