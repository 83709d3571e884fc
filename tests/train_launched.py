"""`offprincipal train` as one of several processes that a launcher started; `--fsdp` lets accelerate shard on CPUs.

The program is `python train_launched.py [--fsdp] ARGUMENTS…`, with the arguments of the command line.
"""

import os
import sys

from train_monitored import force_fsdp

from offprincipal.cli import main

if __name__ == "__main__":
    if "--fsdp" in sys.argv:
        sys.argv.remove("--fsdp")
        force_fsdp()
    try:
        main()
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))  # gloo's threads may abort an interpreter that ends by itself on a busy machine
