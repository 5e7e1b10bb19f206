"""Run the user's own Python file, and take from it what "FILE.py:NAME" names.

This is trusted code: it comes from the command line or a recipe. torch is not needed here, and
torchvision can be imported in it beside a CPU-only torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ecqx_onnx.errors import FileError, InputError
from ecqx_onnx.inputs.torchvision_import import import_beside_torchvision


def is_function_spec(spec: str) -> bool:
    """Whether a text has the form FILE.py:NAME.

    Args:
        spec: any text.

    Returns:
        True for a file that ends in .py and an identifier; the file need not be there.
    """
    file, _, name = spec.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


def load_function(spec: str) -> Callable[..., Any]:
    """Run FILE.py and take the function NAME from it.

    Args:
        spec: "FILE.py:NAME".

    Returns:
        The function, or another callable of that name.

    Raises:
        FileError: if the file is missing, fails, or has no such function.
    """
    if not is_function_spec(spec):
        raise FileError(f"'{spec}' does not name a function: write it as FILE.py:FUNCTION")
    file, _, name = spec.rpartition(":")
    function = getattr(run_file(file), name, None)
    if not callable(function):
        raise FileError(f"{file} has no function '{name}': check the name in '{spec}'")
    return function


def run_file(file: str) -> ModuleType:
    """Run the user's Python file as a module.

    Args:
        file: its path; its folder is importable while it runs.

    Returns:
        The module.

    Raises:
        FileError: if it is missing or fails, with the reason; errors of ours pass as they are.
    """
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
        loader = specification.loader
        import_beside_torchvision(lambda: loader.exec_module(module))
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # it may raise anything; a script ends when run
        raise FileError(
            f"{file} fails when it is run ({type(error).__name__}: {error}): mend it"
        ) from error
    finally:
        sys.path.remove(folder)
    return module
