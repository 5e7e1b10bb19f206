"""("FILE.py:NAME") -> what the user's Python file calls NAME. No torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ecqx_onnx.errors import FileError, InputError


def is_function_spec(spec: str) -> bool:
    """Whether the text has the form FILE.py:NAME."""
    file, _, name = spec.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


def load_function(spec: str) -> Callable[..., Any]:
    """FILE.py:NAME -> the function NAME of the file. FileError if the file is missing, fails, or has no such function."""
    if not is_function_spec(spec):
        raise FileError(f"'{spec}' does not name a function: write it as FILE.py:FUNCTION")
    file, _, name = spec.rpartition(":")
    function = getattr(run_file(file), name, None)
    if not callable(function):
        raise FileError(f"{file} has no function '{name}': check the name in '{spec}'")
    return function


def run_file(file: str) -> ModuleType:
    """The user's Python file as a module; its own folder is importable while it runs. FileError with the reason."""
    path = Path(file)
    if not path.is_file():
        raise FileError(f"there is no Python file {file}: check the path")
    specification = importlib.util.spec_from_file_location(f"_ecqx_user_{path.stem}", path)
    if specification is None or specification.loader is None:
        raise FileError(f"{file} cannot be imported as Python: give a file that ends in .py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses and pickles look their module up by name
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        specification.loader.exec_module(module)
    except InputError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # the user's file may raise anything; a script ends when it is run
        raise FileError(
            f"{file} fails when it is run ({type(error).__name__}: {error}): mend it"
        ) from error
    finally:
        sys.path.remove(folder)
    return module
