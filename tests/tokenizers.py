"""A tokenizer made on the spot, small enough for `tests.models.tiny_llama`."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""The shape of ChatML, without marks around what the assistant says."""

MARKED_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}</s>{% endgeneration %}"
    "{% else %}{{ message.content }}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""The same with marks."""

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:=+-*()'0123456789"


def tiny_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, except that two a's make one: so that what is said later can change how a prompt ends.

    At most 64 tokens, the vocabulary of `tiny_llama`. Characters it does not know become `<unk>`.
    """
    alphabet = [pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in _CHARACTERS + "\n"]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *alphabet, "aa"]
    assert len(tokens) <= 64
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("a", "a")], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )
