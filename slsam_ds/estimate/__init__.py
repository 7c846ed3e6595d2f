"""What a step will take, before there is a machine: `python -m slsam_ds.estimate --model MODEL`. Pure arithmetic."""
