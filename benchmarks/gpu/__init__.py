"""What only a card can show, in a few minutes: `python -m benchmarks.gpu`. See docs/gpu.md."""
