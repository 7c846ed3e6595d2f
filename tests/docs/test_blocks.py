"""What the tests of the documentation must not let pass, and what they must."""

from pathlib import Path

import pytest

from tests.docs.blocks import Block, PageError, is_slow, read_blocks, read_commands
from tests.docs.checking import check_syntax
from tests.docs.parsing import split_commands, wrong_with
from tests.docs.running import matches, run_blocks


def page(*parts: str) -> list[Block]:
    return read_blocks("page.md", "\n".join(parts))


def fenced(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def run(folder: Path, *parts: str) -> None:
    run_blocks(page(*parts), folder)


def test_blocks_run_in_order_in_one_folder_and_one_namespace(tmp_path: Path) -> None:
    run(
        tmp_path,
        fenced("python", "# file: words.py", 'WORDS = ["good", "day"]'),
        fenced("python", "import pathlib", 'name = "seen.txt"'),
        fenced("bash", "echo hello > seen.txt", "ls launch/train.py ds_configs/zero2.json"),
        fenced("python", "from words import WORDS", "print(*WORDS, pathlib.Path(name).read_text())"),
        fenced("text", "good ... hello"),
        fenced("console", "$ cat \\", "> seen.txt", "hello", "$ cd launch", "$ ls *.py", "words.py"),
        "<!-- test: setup tests/docs/setups/plain_loop.py -->",
        fenced("python", "print(len(window))"),
        fenced("text", "2"),
        "<!-- test: file hosts/two -->",
        fenced("text", "a slots=2"),
        "<!-- test: append seen.txt hosts/two -->",
        fenced("bash", "cd .", "cat  # FILES"),
        fenced("text", "hello", "a slots=2"),
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([fenced("python", "", "missing")], 'page.md", line 3, in <module>'),
        ([fenced("bash", "false", "true")], "page.md:1: exit code 1"),
        ([fenced("bash", "false | true")], "page.md:1: exit code 1"),
        ([fenced("console", "$ echo 1", "2")], "page.md:1: shown is\n2\nbut seen was\n1"),
        ([fenced("python", "print(1)"), fenced("text", "2")], "page.md:1: shown is\n2\n\nbut seen was\n1"),
        ([fenced("bash", "echo 1"), "So:", "", "<!-- test: output -->", fenced("text", "2")], "shown is\n2"),
        ([fenced("python", "import atexit, os", "atexit.register(os._exit, 3)")], "ended badly"),
    ],
)
def test_a_block_that_does_not_do_what_the_page_says_fails(parts: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(PageError) as raised:
        run(tmp_path, *parts)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["<!-- test: skip -->", fenced("bash", "true")], "page.md:1: `test: skip` needs a reason"),
        (["<!-- test: sloww -->", fenced("bash", "true")], "`test: sloww` is not known"),
        (["<!-- test: slow 3 -->", fenced("bash", "true")], "takes no value"),
        (["<!-- test: slow -->", "", "Words."], "does not stand before a block"),
        ([fenced("", "true")], "page.md:1: a block of `` is not tested"),
        ([fenced("sh", "true")], "a block of `sh` is not tested"),
        ([fenced("bash", "true"), "", "Words.", "", fenced("text", "1")], "must stand directly below"),
    ],
)
def test_a_page_that_leaves_open_what_is_tested_fails(parts: list[str], message: str) -> None:
    with pytest.raises(PageError) as raised:
        page(*parts)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "block",
    [
        fenced("python", "print("),
        fenced("bash", "if true"),
        fenced("console", "no command"),
        fenced("json", "{'rho': 1}"),
        fenced("json", '{"slsam": {"rhoo": 1}}'),
        fenced("yaml", "slsam: {preset: nobody}"),
        fenced("yaml", "a: ["),
    ],
)
def test_a_block_that_is_not_what_its_fence_says_fails(block: str) -> None:
    with pytest.raises(PageError, match=r"page\.md:2: "):
        check_syntax(*page("<!-- test: file x -->", block))


def test_good_blocks_pass() -> None:
    for block in (
        fenced("json", '{"slsam": {"preset": "adamw_price", "rho": 0.02}}'),
        fenced("yaml", "slsam: {active_layers: 2}"),
        fenced("console", "$ true"),
    ):
        check_syntax(*page(block))


def test_wrong_flags_fail() -> None:
    right = [
        "deepspeed launch/train.py --deepspeed ds_configs/zero2.json FLAGS  # for `FLAGS`, see below",
        "OMP_NUM_THREADS=1 torchrun --nproc_per_node $RANKS -m slsam_ds.run --slsam preset=sam -- train.py --any thing",
        "slsam estimate --model MODEL --world_size N; nobody --knows this",
    ]
    wrong = {
        "slsam estimate --model m --zer 2": "--zer: unknown flag",
        "slsam estimat": "no such command",
        "cd x && deepspeed launch/train.py --max_stepz 2": "--max_stepz: unknown flag",
        "deepspeed --module slsam_ds.train \\\n    --max_steps many": "invalid int value",
        "deepspeed --num_acceleratorz 2 launch/train.py --max_steps 2": "--num_acceleratorz",
        "torchrun -m slsam_ds.run --slsam rhoo=1 -- train.py": "rhoo",
        "make demoo": "demoo",
        "pytest tests/unit/test_nothing.py": "no such file",
        "pytest -k nothing_like_that tests/unit": "no test has",
    }
    answers = wrong_with([*right, *wrong])
    assert answers[: len(right)] == [""] * len(right)
    for answer, part in zip(answers[len(right) :], wrong.values(), strict=True):
        assert part in answer


def test_shown_output_may_leave_out_what_changes() -> None:
    seen = "\n[INFO] noise\nloss 1.2345 after 3 s  \n\n  more\n"
    assert matches("[INFO] noise\nloss 1.2345 after 3 s\n\n  more", seen)
    assert matches("...\nloss 1.2... after ... s\n...", seen)
    assert matches("...\n[INFO] noise\nloss ...\n\n...\n  more", seen)
    assert not matches("loss 1.2...", seen)
    assert not matches("...\nloss 1.3... after ...\n...", seen)
    assert not matches("...\nloss 1.2345 after 3\n...", seen)


def test_comments_are_read() -> None:
    blocks = page(
        "- In a list:",
        "",
        "  <!-- test: slow, setup a.py -->",
        "  <!-- test: append --max_steps 2, 3 -->",
        "  ```bash",
        "  true",
        "  ```",
        "",
        "<!-- A comment of another kind. -->",
        fenced("bash", "true"),
        "<!-- test: skip needs a GPU, or two -->",
        fenced("bash", "true"),
    )
    assert [block.options for block in blocks] == [
        {"slow": "", "setup": "a.py", "append": "--max_steps 2, 3"},
        {},
        {"skip": "needs a GPU, or two"},
    ]
    assert [block.is_run for block in blocks] == [True, True, False]
    assert is_slow(blocks)
    assert not is_slow(blocks[1:])


def test_commands_are_found_in_sentences_and_tables() -> None:
    text = "Run `slsam\ndoctor`, not `slsam` or `make_folder x`.\n\n| a |\n|---|\n| `A=1 pytest -k x` |\n"
    assert list(read_commands("p", text)) == [("p:1", "slsam doctor --help"), ("p:6", "A=1 pytest -k x")]


def test_commands_are_split_as_a_shell_does() -> None:
    text = "a 'b\nc' && d # e\nf \\\n g | h;i 2>&1 > j\nfor k in l; do m 2 < n; done\n"
    assert list(split_commands(text)) == [
        ["a", "b\nc"],
        ["d"],
        ["f", "g"],
        ["h"],
        ["i"],
        ["for", "k", "in", "l"],
        ["do", "m", "2"],
        ["done"],
    ]
