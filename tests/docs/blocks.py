"""The code blocks of a Markdown page, and the commands within its sentences, as they stand there.

Blocks of Python, bash and console are run, those of a page in order in one folder. An HTML comment on the line before a
block changes that; its options are separated by commas:

- `slow`: the page's test is a slow one.
- `skip REASON`: not run. What can be checked without running it still is.
- `setup PATH`: a Python file of the repository that runs first, as a Python block of the page would.
- `append WORDS`: added to the block's last command, to shorten it.
- `file NAME`: the block is written to that file. So is one whose first line is `# file: NAME`.
- `output`: a `text` block is the output of the block above it. Where nothing stands between them, it is without saying.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from markdown_it import MarkdownIt
from markdown_it.token import Token

RUN = ("python", "bash", "console")
DATA = ("json", "yaml", "toml")
PROGRAMS = ("slsam", "deepspeed", "torchrun", "accelerate", "python", "pytest", "make", "sbatch")
"""A word in backticks that begins with one of these, and has more than one word, is a command."""

_COMMENT = re.compile(r"<!--\s*test:\s*(.*?)\s*-->", re.DOTALL)
_NAMED = re.compile(r"# file: (\S+)\n")
_TAKE_THE_REST = ("skip", "append")
_WITH_VALUE = {
    "skip": "a reason, like `skip needs eight GPUs`",
    "append": "words, like `append --max_steps 2`",
    "setup": "a file, like `setup tests/docs/setups/model_and_data.py`",
    "file": "a name, like `file ds.json`",
}
_WITHOUT_VALUE = ("slow", "output")


class PageError(ValueError):
    """A page is not written as it must be, or does not do what it says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        place: Where it begins: page and line.
        language: The word behind the fence.
        text: What stands in it.
        options: Of the comment on the line before it.
        follows: Whether nothing stands between it and the block before.
    """

    place: str
    language: str
    text: str
    options: dict[str, str] = field(default_factory=dict)
    follows: bool = False

    @property
    def file(self) -> str | None:
        """The file that it is written to, in place of being run."""
        named = _NAMED.match(self.text)
        return self.options.get("file", named[1] if named else None)

    @property
    def is_run(self) -> bool:
        """Whether it is run."""
        return self.language in RUN and "skip" not in self.options and self.file is None

    @property
    def line(self) -> int:
        """Of the page, where the first line of `text` is."""
        return int(self.place.rpartition(":")[2]) + 1


def read_blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page, in their order.

    Args:
        page: What to call it.
        text: Its Markdown.

    Raises:
        PageError: A comment says nothing that is known, or stands before no block; a block has a language that nothing
            is known of.
    """
    blocks: list[Block] = []
    options: dict[str, str] | None = None
    follows = False
    for token in MarkdownIt().enable("table").parse(text):
        place = f"{page}:{(token.map or [0])[0] + 1}"
        comments = _COMMENT.findall(token.content) if token.type == "html_block" else []
        if comments:
            for comment in comments:
                options = (options or {}) | _read_options(place, comment)
        elif token.type == "fence" and token.info.startswith("{"):
            follows = False  # a directive of the site
        elif token.type == "fence":
            language = token.info.split()[0] if token.info.strip() else ""
            blocks.append(
                Block(place=place, language=language, text=token.content, options=options or {}, follows=follows)
            )
            _check(blocks)
            options, follows = None, True
        else:
            if options is not None:
                raise PageError(f"{place}: the comment `test: ...` above does not stand before a block")
            follows = False
    return blocks


def read_commands(page: str, text: str) -> Iterator[tuple[str, str]]:
    """The commands within sentences and tables: where they stand, and what they are."""
    for token in MarkdownIt().enable("table").parse(text):
        for child in token.children or ():
            if _is_command(child):
                names_one = re.fullmatch(r"slsam \w+", child.content) is not None
                yield f"{page}:{(token.map or [0])[0] + 1}", child.content + " --help" * names_one


def outputs(blocks: list[Block]) -> dict[int, str]:
    """What each block must print, by its number, where the page shows it."""
    return {
        number: after.text
        for number, (block, after) in enumerate(itertools.pairwise(blocks))
        if _is_output(block, after) and block.is_run
    }


def is_slow(blocks: list[Block]) -> bool:
    """Whether any of them takes long."""
    return any("slow" in block.options and block.is_run for block in blocks)


def _is_command(token: Token) -> bool:
    words = token.content.split() if token.type == "code_inline" else []
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return len(words) > 1 and words[0] in PROGRAMS


def _is_output(block: Block, text: Block) -> bool:
    shown = text.language == "text" and "skip" not in text.options and text.file is None
    prints = block.language in RUN and block.file is None
    return shown and prints and (text.follows or "output" in text.options)


def _read_options(place: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    while text := text.strip(" ,\n"):
        takes_the_rest = re.match(r"\w*", text)[0] in _TAKE_THE_REST
        part, _, text = (text, "", "") if takes_the_rest else text.partition(",")
        name, _, value = part.strip().partition(" ")
        if name not in (*_WITH_VALUE, *_WITHOUT_VALUE):
            known = ", ".join((*_WITH_VALUE, *_WITHOUT_VALUE))
            raise PageError(f"{place}: `test: {name}` is not known; choose among {known}")
        if name in _WITH_VALUE and not value.strip():
            raise PageError(f"{place}: `test: {name}` needs {_WITH_VALUE[name]}")
        if name in _WITHOUT_VALUE and value:
            raise PageError(f"{place}: `test: {name}` takes no value; separate options by commas")
        options[name] = value.strip()
    return options


def _check(blocks: list[Block]) -> None:
    """Whether the last of them is one that something can be done with."""
    block = blocks[-1]
    if "skip" in block.options or block.file is not None or block.language in (*RUN, *DATA):
        return
    if block.language != "text":
        known = ", ".join((*RUN, *DATA, "text"))
        raise PageError(
            f"{block.place}: a block of `{block.language}` is not tested: use one of {known}, or say why not with "
            "`<!-- test: skip REASON -->`"
        )
    if len(blocks) < 2 or not _is_output(blocks[-2], block):
        raise PageError(
            f"{block.place}: a `text` block must stand directly below the Python, bash or console block that prints "
            "it, or after `<!-- test: output -->`; say `<!-- test: skip REASON -->` where nothing prints it"
        )
