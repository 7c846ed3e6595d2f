"""Fine-tune a causal language model with SL-SAM: `deepspeed launch/train.py --deepspeed ds_configs/zero2.json`.

Flags: `python launch/train.py --help`. Also runs under torchrun and accelerate launch.
"""

import sys

from slsam_ds.cli.command_line import main

if __name__ == "__main__":
    main(sys.argv[1:])
