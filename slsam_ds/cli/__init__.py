"""The command line: `slsam` and its commands, among them `train`, which is `launch/train.py`."""
