"""Tests train on one device, which is said in one place."""

import os
import subprocess
import sys

from tests.command_line import ROOT

ASK = """
import pytest
from tests.ranks import run_on_ranks
try:
    run_on_ranks(1000, print)
except pytest.skip.Exception as skipped:
    print(skipped)
"""


def test_without_so_many_devices_a_test_is_skipped() -> None:
    """And not run on the CPU in their place."""
    variables = {**os.environ, "SLSAM_TEST_DEVICE": "cuda"}
    asked = subprocess.run(
        [sys.executable, "-c", ASK], check=True, cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert asked.stdout.startswith("needs 1000 devices of cuda, this machine has ")
