"""`offprincipal train` as one of several processes that a launcher started, on CPUs.

The program is `python train_launched.py [--fsdp | --deepspeed] ARGUMENTS…`, with the arguments of the command line;
either option has accelerate do there what it does on accelerators alone.
"""

import os
import sys
from typing import Any

import accelerate
from train_monitored import force_fsdp

from offprincipal.cli import main


def force_deepspeed() -> None:
    """Let accelerate hand the model to DeepSpeed, as its environment has it."""
    State = accelerate.state.AcceleratorState
    begin = State.__init__

    def begin_with_plugins(self: Any, *positional: Any, deepspeed_plugin: Any = None, **named: Any) -> None:
        begin(self, *positional, deepspeed_plugin=deepspeed_plugin, **named)
        self.distributed_type = accelerate.DistributedType.DEEPSPEED
        if deepspeed_plugin is not None:  # else all is there already, since all states are one
            deepspeed_plugin.set_mixed_precision(self._mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            self._mixed_precision = "no"
            self.deepspeed_plugins = deepspeed_plugin

    State.__init__ = begin_with_plugins


if __name__ == "__main__":
    for option, force in (("--fsdp", force_fsdp), ("--deepspeed", force_deepspeed)):
        if option in sys.argv:
            sys.argv.remove(option)
            force()
    try:
        main()
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))  # gloo's threads may abort an interpreter that ends by itself on a busy machine
