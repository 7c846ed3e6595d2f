"""`python -m slsam_ds.settings`."""

import sys

from slsam_ds.cli.knobs import main

sys.exit(main())
