"""Every error that this project raises on purpose; the command line turns them into exit statuses.

    EcqxError
    ├── InputError            exit 2: the user can mend it (a file, a value, an option)
    │   ├── FileError         a file is missing, damaged, lying about itself, in the way,
    │   │                     or not to be written
    │   ├── ModelError        a model, checkpoint or graph that cannot be used as asked
    │   ├── DataError         a data set that cannot be used as asked
    │   ├── MissingPackageError    a package of an extra is not installed; an ImportError as well
    │   └── OptionError       options that do not go together, or that a target cannot satisfy
    │       └── UnknownOptionError    there is no option of this name; a TypeError as well
    └── CheckFailed           exit 1: everything could be read, and it is not as it should be

A message is one sentence: what, which value, where, and what to do next.
"""


class EcqxError(Exception):
    """Base of all errors raised on purpose."""

    exit_status = 2


class InputError(EcqxError):
    """Something the user gave cannot be used; the message says what to do."""


class FileError(InputError):
    """A file is missing, damaged, lying about itself, in the way, or cannot be written."""


class ModelError(InputError):
    """A model, checkpoint or graph cannot be used as asked."""


class DataError(InputError):
    """A data set cannot be used as asked."""


class OptionError(InputError):
    """Options do not go together, or the target cannot satisfy them."""


class UnknownOptionError(OptionError, TypeError):
    """There is no option of this name; the message has the nearest one.

    A TypeError too, as Python raises for an unexpected keyword argument.
    """


class MissingPackageError(InputError, ImportError):
    """A package that an extra brings is not installed; the message has the command.

    An ImportError too, as Python raises for an import that fails.
    """


# Package -> the extra of pyproject.toml that brings it.
EXTRAS = {
    "torch": "torch",
    "torchvision": "torch",
    "zennit": "torch",
    "onnxscript": "torch",
    "sklearn": "demo",
    "matplotlib": "demo",
}


def explain_missing_package(error: ImportError, doing: str) -> MissingPackageError | None:
    """Say which command brings a package that could not be imported.

    Args:
        error: as Python raised it.
        doing: what was to be done, the beginning of the sentence.

    Returns:
        An error with one sentence; None if the package is of no extra, so that its absence is a
        defect and no choice.
    """
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    name = {"sklearn": "scikit-learn"}.get(package, package)
    return MissingPackageError(
        f"{doing} needs {name}, which is not installed here; this brings it:"
        f" python -m pip install 'ecqx-onnx[{EXTRAS[package]}]'"
    )


class CheckFailed(EcqxError):  # noqa: N818 - a failed check is a result, not a fault
    """A check ran and failed; the message says which and by how much."""

    exit_status = 1
