"""`python -m slsam_ds.recipes`."""

import json

import pytest

from slsam_ds import SLSAMConfig
from slsam_ds.cli.recipes import main
from slsam_ds.recipes import RECIPES


def test_the_table_has_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    table, legend = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == list(RECIPES)
    assert legend.startswith("g is the gradient at the weights")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_in_full_can_be_pasted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 0
    shown = capsys.readouterr().out
    short, full = (json.loads(block)["slsam"] for block in json_objects(shown))
    assert SLSAMConfig.from_dict(short) == SLSAMConfig.from_dict(full)
    assert RECIPES[name].formula in shown
    assert RECIPES[name].source in shown
    assert all(f"--{flag} " in shown for flag in RECIPES[name].training)


def json_objects(text: str) -> list[str]:
    """The two blocks of a recipe: in one line, and from a line with a brace to the next."""
    lines = text.splitlines()
    start, end = lines.index("{"), lines.index("}")
    return [next(line for line in lines if line.startswith('{"slsam"')), "\n".join(lines[start : end + 1])]


def test_an_unknown_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adamwprice"]) == 2
    assert capsys.readouterr().err == "error: adamwprice: no such preset; did you mean adamw_price?\n"
    assert main(["x"]) == 2
    assert capsys.readouterr().err == "error: x: no such preset; slsam recipes lists them\n"
    with pytest.raises(SystemExit):
        main(["--model", "somewhere"])
    assert "--model needs NAME" in capsys.readouterr().err
