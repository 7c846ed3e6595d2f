"""`python -m slsam_ds.train`: what `launch/train.py` does, where the package is installed without the repository."""

import sys

from slsam_ds.cli.command_line import main

if __name__ == "__main__":
    main(sys.argv[1:])
