"""What is learned from a row, which columns are taken, and what is refused in which words."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from slsam_ds.cli.arguments import DataArguments
from slsam_ds.cli.data import Columns, Encoder, choose_columns
from slsam_ds.cli.labels import IGNORED
from slsam_ds.cli.refusal import UsageError
from slsam_ds.cli.rows import Rows
from slsam_ds.cli.samples import tokenize
from tests.tokenizers import CHAT_TEMPLATE, MARKED_TEMPLATE, tiny_tokenizer

PAIR = Columns(kind="pair", names=("prompt", "response"))
TEXT = Columns(kind="text", names=("text",))
MESSAGES = Columns(kind="messages", names=("messages",))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def _learned(sample: dict[str, Any], tokenizer: Any) -> str:
    """What the labels spell; they agree with the input wherever they are not ignored."""
    kept = [
        (token, label) for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != IGNORED
    ]
    assert all(token == label for token, label in kept)
    return str(tokenizer.decode([label for _, label in kept]))


def _encode(rows: list[dict[str, Any]], columns: Columns, tokenizer: Any, max_length: int = 1000) -> Dataset:
    table = Rows.of_table("data", Dataset.from_list(rows))
    return tokenize(table, Encoder(tokenizer, columns, max_length, "data"))


# What is learned


def test_pair_without_template_learns_the_response_and_the_end() -> None:
    tokenizer = tiny_tokenizer()
    (sample,) = _encode([{"prompt": "what is it? ", "response": "a cat."}], PAIR, tokenizer)
    assert _learned(sample, tokenizer) == "a cat.</s>"
    assert tokenizer.decode(sample["input_ids"]).startswith("what is it")


def test_token_that_joins_prompt_and_response_is_learned() -> None:
    """ "ha" + "ab" has the token "aa" across the seam: what the model must predict begins with it."""
    tokenizer = tiny_tokenizer()
    (sample,) = _encode([{"prompt": "ha", "response": "ab"}], PAIR, tokenizer)
    assert _learned(sample, tokenizer) == "aab</s>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["no marks", "marks"])
def test_pair_with_template_is_a_conversation(template: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    (sample,) = _encode([{"prompt": "what is it", "response": "a cat."}], PAIR, tokenizer)
    assert tokenizer.decode(sample["input_ids"]) == "<s>user\nwhat is it</s>\n<s>assistant\na cat.</s>\n"
    assert _learned(sample, tokenizer).strip() == "a cat.</s>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["no marks", "marks"])
def test_every_turn_of_the_assistant_is_learned(template: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    (sample,) = _encode([{"messages": messages}], MESSAGES, tokenizer)
    assert _learned(sample, tokenizer).replace("\n", "") == "two</s>four</s>"


def test_turns_that_the_template_rewrites_are_not_learned(capsys: pytest.CaptureFixture[str]) -> None:
    """Some templates drop the reasoning of earlier turns: what those looked like when they were said is not there."""
    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}think {% endif %}"
        "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    (sample,) = _encode(rows, MESSAGES, tokenizer)
    assert _learned(sample, tokenizer).strip() == "think four</s>"
    assert "1 assistant turns are left out of the loss" in capsys.readouterr().err


def test_text_is_learned_whole() -> None:
    tokenizer = tiny_tokenizer()
    (sample,) = _encode([{"text": "abc def"}], TEXT, tokenizer)
    assert _learned(sample, tokenizer) == "abc def</s>"


def test_long_samples_are_cut_and_empty_ones_dropped_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "b" * 8, "response": "cdefg"},  # cut within the response
        {"prompt": "b" * 10, "response": "cut away"},
        {"prompt": "b", "response": "  "},
        {"prompt": "b", "response": None},
        {"prompt": None, "response": "c"},
    ]
    encoded = _encode(rows, PAIR, tokenizer, max_length=10)
    assert [_learned(sample, tokenizer) for sample in encoded] == ["cd", "c</s>"]
    assert max(len(sample["input_ids"]) for sample in encoded) == 10
    assert "3 of 5 samples were dropped: nothing to learn within --max_length 10" in capsys.readouterr().err


def test_nothing_left_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to learn in any of its 1 samples within --max_length 4"):
        _encode([{"prompt": "long prompt", "response": "x"}], PAIR, tiny_tokenizer(), max_length=4)


@pytest.mark.parametrize(
    ("row", "columns", "sentence"),
    [
        ({"prompt": "a", "response": 3}, PAIR, "data, sample 1: column 'response' holds int; expected text"),
        ({"messages": "hello"}, MESSAGES, "sample 1, column 'messages': expected a list of messages"),
        ({"messages": [{"from": "human", "content": "x"}]}, MESSAGES, "message 1 has no role that is text"),
        ({"messages": [{"role": "user"}]}, MESSAGES, "message 1 has no content that is text"),
    ],
)
def test_malformed_rows_are_refused(row: dict[str, Any], columns: Columns, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _encode([row], columns, tiny_tokenizer(chat_template=CHAT_TEMPLATE))


def test_what_the_template_refuses_is_a_sentence() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    rows = [{"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    with pytest.raises(UsageError, match="sample 1: the chat template rejects it: no system"):
        _encode(rows, MESSAGES, tiny_tokenizer(chat_template=template))


def test_messages_need_a_template() -> None:
    with pytest.raises(UsageError, match="column 'messages' needs a chat template"):
        _encode([{"messages": []}], MESSAGES, tiny_tokenizer())


# Columns


@pytest.mark.parametrize(
    ("available", "flags", "expected"),
    [
        (["text"], {}, TEXT),
        (["text", "response", "prompt"], {}, PAIR),
        (["prompt", "response", "messages"], {}, MESSAGES),
        (["text", "messages"], {"text_column": "text"}, TEXT),
        (["q", "a"], {"prompt_column": "q", "response_column": "a"}, Columns(kind="pair", names=("q", "a"))),
        (["prompt", "a"], {"response_column": "a"}, Columns(kind="pair", names=("prompt", "a"))),
    ],
)
def test_columns_are_found(available: list[str], flags: dict[str, str], expected: Columns) -> None:
    assert choose_columns(available, DataArguments(**flags), "data") == expected


@pytest.mark.parametrize(
    ("available", "flags", "sentence"),
    [
        (["a", "b"], {"text_column": "c"}, "data: no column 'c'; there are: a, b"),
        (["a", "prompt"], {"prompt_column": "a"}, "data: no column 'response'; there are: a, prompt"),
        (["a", "prompt"], {}, "no column messages, no prompt and response, and no text; there are: a, prompt"),
        (["a"], {"text_column": "a", "messages_column": "a"}, "exclude each other"),
    ],
)
def test_columns_that_are_not_there_are_refused(available: list[str], flags: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        choose_columns(available, DataArguments(**flags), "data")
