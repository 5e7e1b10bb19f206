"""Commands that are killed at any moment leave the old output whole, and nothing after the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ecqx_onnx_converters.graph import outputs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(outputs.fcntl is None, reason="POSIX only")
COMMANDS = ["convert", "pack", "quantize", "deploy"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'converters'}",
    "OMP_NUM_THREADS": "1",
}


def killing(folder, command, moments, seed=0, by="SIGKILL"):
    """What tests/killing.py tells."""
    line = [sys.executable, "-m", "tests.killing", folder, command, moments, seed, by]
    line = [str(part) for part in line]
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["faults"] == []
    return found


def test_a_few_moments_of_a_kill(tmp_path):
    assert killing(tmp_path, "pack", 4)["runs"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_fifty_random_moments_of_a_kill(command, tmp_path):
    found = killing(tmp_path, command, 50, seed=1)
    assert found["runs"] == 50
    assert found["killed"] >= 20  # on a busy machine some end before their moment comes


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_before_each_call_that_touches_the_output(command, tmp_path):
    assert killing(tmp_path, command, "calls")["killed"] >= 20


@pytest.mark.slow
@pytest.mark.parametrize("by", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_leaves_nothing_at_once(command, by, tmp_path):
    assert killing(tmp_path, command, 10, seed=2, by=by)["runs"] == 10
