"""What a chat template is given: the right one of several, tools and their calls, parts of text; or a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from slsam_ds.cli.arguments import DataArguments
from slsam_ds.cli.chat import use_template
from slsam_ds.cli.data import Columns, Encoder, choose_columns
from slsam_ds.cli.labels import IGNORED
from slsam_ds.cli.refusal import UsageError
from slsam_ds.cli.rows import Rows, read_files
from tests.tokenizers import CHAT_TEMPLATE, MARKED_TEMPLATE, tiny_tokenizer

MESSAGES = Columns(kind="messages", names=("messages",))
TOOLS_TEMPLATE = (
    "{% if tools %}<s>{% for tool in tools %}{{ tool.function.name }} {% endfor %}</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}call {{ call.function.name }}"
    "{% for key, value in call.function.arguments|items %} {{ key }}={{ value }}{% endfor %}{% endfor %}"
    "</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
UNMARKED_TOOLS_TEMPLATE = TOOLS_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("weather", "time")
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "rome"}}}
CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "is it "}, {"type": "text", "text": "hot"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "22"},
    {"role": "assistant", "content": "yes"},
]
WRITTEN = (
    "<s>weather time </s>\n<s>user\nis it hot</s>\n<s>assistant\ncall weather city=rome</s>\n<s>tool\n22</s>\n"
    "<s>assistant\nyes</s>\n"
)


def encode(row: dict[str, Any], template: Any, columns: Columns = MESSAGES) -> tuple[str, str]:
    """What is put in, and what is learned."""
    tokenizer = tiny_tokenizer(chat_template=template)
    sample = Encoder(tokenizer, columns, 1000, "data")(row, "row 1")
    learned = [label for label in sample["labels"] if label != IGNORED]
    return str(tokenizer.decode(sample["input_ids"])), str(tokenizer.decode(learned))


# Tools, their calls, parts


@pytest.mark.parametrize("template", [TOOLS_TEMPLATE, UNMARKED_TOOLS_TEMPLATE], ids=["marks", "no marks"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls_are_written_and_only_the_assistant_is_learned(template: str, as_text: bool) -> None:
    row = {"messages": CONVERSATION, "tools": TOOLS}
    if as_text:  # as a CSV file holds them
        row = {name: json.dumps(value) for name, value in row.items()}
    written, learned = encode(row, template)
    assert written == WRITTEN
    assert learned.replace("\n", "") == "call weather city=rome</s>yes</s>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["no marks", "marks"])
def test_turns_of_weight_zero_are_not_learned(template: str) -> None:
    turns = [("user", "one", None), ("assistant", "two", 0), ("user", "three", None), ("assistant", "four", 1)]
    messages = [{"role": role, "content": content, "weight": weight} for role, content, weight in turns]
    assert encode({"messages": messages}, template)[1].strip() == "four</s>"


def test_what_arrow_fills_in_is_not_written(tmp_path: Path) -> None:
    """In a parquet file all structs of a column have all keys."""
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "utc"}}}
    asked = {"role": "user", "content": "is it hot"}  # nor can a column hold both text and parts
    conversations = [[asked, *CONVERSATION[1:]], [asked, {"role": "assistant", "content": None, "tool_calls": [other]}]]
    table = Dataset.from_list([{"messages": messages, "tools": TOOLS} for messages in conversations])
    table.to_parquet(tmp_path / "a.parquet")
    for rows in (read_files("--train_file", [str(tmp_path / "a.parquet")]), Rows.of_table("data", table)):
        first, second = (encode(located["row"], TOOLS_TEMPLATE)[0] for located in Rows.read(rows.shards))
        assert first == WRITTEN
        assert second.endswith("call time zone=utc</s>\n")


def test_the_column_of_tools_has_a_name() -> None:
    columns = choose_columns(["messages", "functions"], DataArguments(tools_column="functions"), "data")
    assert encode({"messages": CONVERSATION, "functions": TOOLS}, TOOLS_TEMPLATE, columns)[0] == WRITTEN
    with pytest.raises(UsageError, match="data: no column 'functions'; there are: messages"):
        choose_columns(["messages"], DataArguments(tools_column="functions"), "data")
    with pytest.raises(UsageError, match="--tools_column a: can only be used with --messages_column"):
        choose_columns(["text", "a"], DataArguments(tools_column="a"), "data")


@pytest.mark.parametrize(
    ("row", "template", "sentence"),
    [
        (
            {"messages": CONVERSATION, "tools": TOOLS},
            CHAT_TEMPLATE,
            "the chat template leaves out the tools: choose one",
        ),
        ({"messages": CONVERSATION}, MARKED_TEMPLATE, "the chat template leaves out the tool calls: choose one"),
        ({"messages": CONVERSATION, "tools": "none"}, TOOLS_TEMPLATE, "column 'tools': expected a list of tools"),
        ({"messages": CONVERSATION, "tools": ["time"]}, TOOLS_TEMPLATE, "column 'tools': expected a list of tools"),
        ({"messages": [{"role": "assistant", "content": None}]}, TOOLS_TEMPLATE, "message 1 has no content that is"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, TOOLS_TEMPLATE, r"is no text \(image\)"),
        ({"messages": [{"role": "user", "content": ["hello"]}]}, TOOLS_TEMPLATE, r"is no text \(str\)"),
    ],
)
def test_what_would_be_lost_is_refused(row: dict[str, Any], template: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^row 1.*{sentence}"):
        encode(row, template)


# Several templates

NAMED = {"default": CHAT_TEMPLATE, "shout": CHAT_TEMPLATE.replace("</s>", "!</s>"), "tool_use": TOOLS_TEMPLATE}
PAIR = {"prompt": "what", "response": "that"}
PAIR_COLUMNS = Columns(kind="pair", names=("prompt", "response"))


def test_of_several_templates_the_default_is_used_and_that_for_tools_with_tools() -> None:
    assert encode(PAIR, NAMED, PAIR_COLUMNS)[0] == "<s>user\nwhat</s>\n<s>assistant\nthat</s>\n"
    assert encode({"messages": CONVERSATION, "tools": TOOLS}, NAMED)[0] == WRITTEN


def test_several_templates_do_not_matter_to_text() -> None:
    text = Columns(kind="text", names=("text",))
    assert encode({"text": "plain"}, {"a": CHAT_TEMPLATE, "b": CHAT_TEMPLATE}, text)[0] == "plain</s>"


def test_none_is_taken_by_chance() -> None:
    with pytest.raises(UsageError, match="data: the tokenizer's chat templates are a, b, and none is named def"):
        encode(PAIR, {"b": CHAT_TEMPLATE, "a": CHAT_TEMPLATE}, PAIR_COLUMNS)


def test_a_template_is_chosen_by_name_or_file(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }};{% endfor %}")
    for asked, expected in (("shout", NAMED["shout"]), (str(tmp_path / "own.jinja"), None), (None, NAMED)):
        tokenizer = tiny_tokenizer(chat_template=NAMED)  # type: ignore[arg-type]
        use_template(tokenizer, asked)
        assert tokenizer.chat_template == (expected or (tmp_path / "own.jinja").read_text())
    for template, there in (
        (NAMED, "the tokenizer has default, shout, tool_use"),
        (CHAT_TEMPLATE, "has no named templates"),
    ):
        tokenizer = tiny_tokenizer(chat_template=template)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=rf"--chat_template nothing: neither the name .*{there}"):
            use_template(tokenizer, "nothing")
