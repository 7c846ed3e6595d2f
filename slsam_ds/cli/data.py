"""From rows to what the model learns: token ids, and labels that are -100 where there is nothing to learn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from slsam_ds.cli.arguments import DataArguments
from slsam_ds.cli.refusal import UsageError, refusals

IGNORED = -100
"""The label that cross-entropy leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns hold a sample.

    Attributes:
        kind: "messages" and "text" use one column, "pair" two: prompt and response.
        names: Those columns.
    """

    kind: Literal["messages", "pair", "text"]
    names: tuple[str, ...]


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
    for kind in names:
        if asked[kind] or (not any(asked.values()) and set(names[kind]) <= set(available)):
            missing = [name for name in names[kind] if name not in available]
            if missing:
                raise UsageError(f"{source}: no column {missing[0]!r}; there are: {', '.join(available)}")
            return Columns(kind=kind, names=names[kind])  # type: ignore[arg-type]
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
        UsageError: Messages, and no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, columns: Columns, max_length: int, source: str) -> None:
        self._tokenizer = tokenizer
        self._columns = columns
        self._max_length = max_length
        self._marks_turns = "{% generation" in (tokenizer.chat_template or "").replace("{%-", "{%")
        if columns.kind == "messages" and not tokenizer.chat_template:
            raise UsageError(f"{source}: column {columns.names[0]!r} needs a chat template, and the tokenizer has none")

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
        values: list[Any] = [row.get(name) for name in self._columns.names]
        if self._columns.kind == "messages":
            messages = _checked_messages(values[0], f"{where}, column {self._columns.names[0]!r}")
            return self._cut(*self._encode_messages(messages, where)) if messages else self._cut([], [])
        for name, value in zip(self._columns.names, values, strict=True):
            if value is not None:
                _check_text(value, f"{where}: column {name!r}")
        if not (values[-1] or "").strip():
            return self._cut([], [])
        if self._columns.kind == "text":
            ids = self._ended(self._ids(values[0]))
            return self._cut(ids, ids)
        prompt, response = values[0] or "", values[1]
        if not self._tokenizer.chat_template:
            ids = self._ended(self._ids(prompt + response))
            return self._cut(ids, _masked(ids, [(self._agreement(self._ids(prompt), ids), len(ids))]))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self._cut(*self._encode_messages(messages, where))

    def _encode_messages(self, messages: list[dict[str, Any]], where: str) -> tuple[list[int], list[int], int]:
        """Token ids, labels, and the number of assistant turns that could not be located."""
        with refusals(Exception, prefix=f"{where}: the chat template refuses it: "):  # it may compute anything
            if self._marks_turns:
                out = self._tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
                ids = list(out["input_ids"])
                return ids, [token if on else IGNORED for token, on in zip(ids, out["assistant_masks"], strict=True)], 0
            text = self._render(messages)
            spans, num_lost = [], 0
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = self._render(messages[:turn], add_generation_prompt=True) if turn else ""
                    spans.append((before, self._render(messages[: turn + 1])))
        ids = self._ids(text, special=False)
        located = []
        for before, after in spans:
            if text.startswith(before) and text.startswith(after):
                located.append(tuple(self._agreement(self._ids(part, special=False), ids) for part in (before, after)))
            else:
                num_lost += 1
        return ids, _masked(ids, located), num_lost

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    @staticmethod
    def _agreement(prefix: list[int], ids: list[int]) -> int:
        """How many tokens of `prefix` begin `ids`: its last ones may have merged with what follows."""
        pairs = zip(prefix, ids, strict=False)
        return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(ids)))

    def _cut(self, ids: list[int], labels: list[int], num_lost: int = 0) -> dict[str, Any]:
        return {"input_ids": ids[: self._max_length], "labels": labels[: self._max_length], "lost_turns": num_lost}


def _masked(ids: list[int], spans: Sequence[tuple[int, ...]]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def _checked_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages without the empty keys that `datasets` fills in."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise UsageError(f'{where}: expected a list of messages, like [{{"role": "user", "content": "..."}}]')
    messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UsageError(f"{where}: message {number} has no {key} that is text")
            _check_text(message[key], f"{where}: the {key} of message {number}")
    return messages


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{where} holds {type(value).__name__}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write it, but it is no character, and no tokenizer takes it
        raise UsageError(
            f"{where} holds half a surrogate pair, as character {error.start + 1}; expected text"
        ) from None
