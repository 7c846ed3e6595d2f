"""`python -m slsam_ds.doctor`."""

import sys

from slsam_ds.cli.doctor.command import main

sys.exit(main())
