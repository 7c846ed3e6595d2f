"""The configuration of Llama-3.1-8B's shape: `config.json`, and the folder `llama-8b` with the same."""

import json
from pathlib import Path

config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
Path("llama-8b").mkdir()
for folder in (".", "llama-8b"):
    Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
