"""What a step costs, relative to a step of AdamW, and samples that meet a budget."""
