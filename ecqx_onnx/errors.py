"""Every error that this project raises on purpose; the command line turns them into exit statuses.

    EcqxError
    ├── InputError            exit 2: the user can mend it (a file, a value, an option)
    │   ├── FileError         a file is missing, damaged, lying about itself, in the way,
    │   │                     or not to be written
    │   ├── ModelError        a model, checkpoint or graph that cannot be used as asked
    │   ├── DataError         a data set that cannot be used as asked
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


class CheckFailed(EcqxError):  # noqa: N818 - a failed check is a result, not a fault
    """A check ran and failed; the message says which and by how much."""

    exit_status = 1
