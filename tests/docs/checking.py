"""What can be said of a page's blocks without running them."""

import json
import subprocess
import tomllib
from collections.abc import Mapping
from typing import Any

import yaml

from slsam_ds import SLSAMConfig
from tests.docs.blocks import Block, PageError
from tests.docs.running import read_session


def check_syntax(block: Block) -> None:
    """Whether it is what its fence says, and its `slsam` section is one.

    Raises:
        PageError: It is not.
    """
    if block.language == "python":
        try:
            compile("\n" * (block.line - 1) + block.text, block.place, "exec")
        except SyntaxError as error:
            raise PageError(f"{block.place}: {error}") from None
    elif text := shell_text(block):
        done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
        if done.returncode:
            raise PageError(f"{block.place}: {done.stderr}")
    elif block.language in _READERS:
        try:
            _check_section(_READERS[block.language](block.text))
        except (ValueError, yaml.YAMLError) as error:
            raise PageError(f"{block.place}: {error}") from None


def shell_text(block: Block) -> str:
    """The commands of a block of bash or console; nothing of others."""
    if block.language == "console":
        return "\n".join(command for command, _ in read_session(block))
    return block.text if block.language == "bash" else ""


_READERS = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}


def _check_section(content: Any) -> None:
    if isinstance(content, Mapping) and "slsam" in content:
        SLSAMConfig.of(content["slsam"])
