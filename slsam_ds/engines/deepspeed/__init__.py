"""DeepSpeed: its configuration, its checkpoints, and one engine per ZeRO stage."""
