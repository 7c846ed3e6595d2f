"""The configuration of Llama-3.1-8B's shape: `config.json`, and the folder `llama-8b` with the same."""

from transformers import LlamaConfig

for folder in (".", "llama-8b"):
    LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
