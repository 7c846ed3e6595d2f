"""The user's model: its layers, its micro-batches, its optimizer's groups."""
