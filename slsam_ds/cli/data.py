"""From rows to what the model learns: token ids, and labels that are -100 where there is nothing to learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from slsam_ds.cli.arguments import DataArguments
from slsam_ds.cli.chat import Conversations, check_text, read_messages, read_tools
from slsam_ds.cli.labels import agreement, masked
from slsam_ds.cli.refusal import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns hold a sample.

    Attributes:
        kind: "messages" and "text" use one column, "pair" two: prompt and response.
        names: Those columns.
        tools: Beside messages, the column of the tools that they may call. A row without it has none.
    """

    kind: Literal["messages", "pair", "text"]
    names: tuple[str, ...]
    tools: str = "tools"


def choose_columns(available: Sequence[str], given: DataArguments, source: str) -> Columns:
    """Take the columns that the flags name, or find the usual ones: messages, else prompt and response, else text.

    Args:
        available: The columns there are.
        given: The flags.
        source: Names the data in messages.

    Raises:
        UsageError: A column that is not there, flags for two kinds of sample, or no usual column.
    """
    asked = {
        "messages": given.messages_column is not None,
        "pair": given.prompt_column is not None or given.response_column is not None,
        "text": given.text_column is not None,
    }
    names: dict[str, tuple[str, ...]] = {
        "messages": (given.messages_column or "messages",),
        "pair": (given.prompt_column or "prompt", given.response_column or "response"),
        "text": (given.text_column or "text",),
    }
    if sum(asked.values()) > 1:
        raise UsageError(
            "--messages_column, --prompt_column with --response_column, and --text_column exclude each other: "
            "give one kind"
        )
    if given.tools_column is not None and given.tools_column not in available:
        raise UsageError(f"{source}: no column {given.tools_column!r}; there are: {', '.join(available)}")
    for kind in names:
        if asked[kind] or (not any(asked.values()) and set(names[kind]) <= set(available)):
            missing = [name for name in names[kind] if name not in available]
            if missing:
                raise UsageError(f"{source}: no column {missing[0]!r}; there are: {', '.join(available)}")
            if given.tools_column is not None and kind != "messages":
                raise UsageError(f"--tools_column {given.tools_column}: can only be used with --messages_column")
            return Columns(kind=kind, names=names[kind], tools=given.tools_column or "tools")  # type: ignore[arg-type]
    raise UsageError(
        f"{source}: no column messages, no prompt and response, and no text; there are: {', '.join(available)}; "
        "name yours with --messages_column, --prompt_column and --response_column, or --text_column"
    )


class Encoder:
    """One row to token ids and labels. A class, so that `datasets` can hash it for its cache.

    Args:
        tokenizer: Of the model. Where it has a chat template, pairs are put through it too.
        columns: Where in a row the sample is.
        max_length: Longer samples are cut at their end. Tokens.
        source: Names the data in messages.

    Raises:
        UsageError: Messages, and no chat template, or several and none to take.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Columns, max_length: int, source: str) -> None:
        self._tokenizer = tokenizer
        self._columns = columns
        self._max_length = max_length
        if columns.kind == "messages" and not tokenizer.chat_template:
            raise UsageError(f"{source}: column {columns.names[0]!r} needs a chat template, and the tokenizer has none")
        has_conversations = columns.kind != "text" and tokenizer.chat_template
        self._conversations = Conversations(tokenizer, source) if has_conversations else None

    @property
    def max_length(self) -> int:
        """Tokens at most."""
        return self._max_length

    def __call__(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """`input_ids` and `labels`, as long, and `lost_turns`: the assistant's turns that could not be located.

        Args:
            row: The sample; a column it lacks is empty.
            where: Names it in messages.

        Raises:
            UsageError: A malformed row.
        """
        columns = self._columns
        values: list[Any] = [row.get(name) for name in columns.names]
        if columns.kind == "messages":
            messages = read_messages(values[0], f"{where}, column {columns.names[0]!r}")
            tools = read_tools(row.get(columns.tools), f"{where}, column {columns.tools!r}")
            return self._conversation(messages, tools, where)
        for name, value in zip(columns.names, values, strict=True):
            if value is not None:
                check_text(value, f"{where}: column {name!r}")
        if not (values[-1] or "").strip():
            return self._cut([], [])
        if columns.kind == "text":
            ids = self._ended(self._ids(values[0]))
            return self._cut(ids, ids)
        prompt, response = values[0] or "", values[1]
        if self._conversations is None:
            ids = self._ended(self._ids(prompt + response))
            return self._cut(ids, masked(ids, [(agreement(self._ids(prompt), ids), len(ids))]))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self._conversation(messages, None, where)

    def _conversation(self, messages: list[dict[str, Any]], tools: list[Any] | None, where: str) -> dict[str, Any]:
        assert self._conversations is not None
        return self._cut(*self._conversations.encode(messages, tools, where)) if messages else self._cut([], [])

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _cut(self, ids: list[int], labels: list[int], num_lost: int = 0) -> dict[str, Any]:
        return {"input_ids": ids[: self._max_length], "labels": labels[: self._max_length], "lost_turns": num_lost}
