"""The command line: `launch/train.py` and `python -m slsam_ds.estimate`."""
