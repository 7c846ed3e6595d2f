"""`path/to/model`, `train.jsonl` and `valid.jsonl` in the working folder."""

import json
from pathlib import Path

from tests.models import tiny_llama
from tests.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

tiny_llama().save_pretrained("path/to/model")
tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained("path/to/model")
for name in ("train.jsonl", "valid.jsonl"):
    rows = [json.dumps({"prompt": f"repeat {text}", "response": text}) for text in ("abc", "bcd", "cde", "def")]
    Path(name).write_text("\n".join(rows), encoding="utf-8")
