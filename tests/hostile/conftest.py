"""Tests of hostile programs run in a process of their own.

They make torch build thousands of programs that nobody meant. In about one whole run of five, the
garbage collector later met a damaged object among what was left of them, and took the worker with
it, in whatever test it was then. A fork for each test keeps what is left to that test.
"""

import os
import pickle
import traceback

import pytest

FORKED = "test_hostile_program"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run the test in a fork where its file is such a one; True says that it has been run."""
    if not pyfuncitem.module.__name__.endswith(FORKED) or not hasattr(os, "fork"):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        said = ""
        try:
            pyfuncitem.obj(**arguments)
        except BaseException:
            said = traceback.format_exc()
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(said, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        pytest.fail(f"the test's process ended with status {status}", pytrace=False)
    said = pickle.loads(answer)
    if said:
        pytest.fail(said, pytrace=False)
    return True
