"""`python -m slsam_ds.run`."""

import sys

from slsam_ds.cli.run import main

main(sys.argv[1:])
