"""Run a command; print its exit status, wall time and peak resident memory as JSON.

    python -S measure_child.py COMMAND ARGUMENT...

A small process of its own, because the kernel counts into a child's peak what the process that forked it had resident:
measured from a benchmark that holds gigabytes, every command would seem to need gigabytes. Mapped pages count.
"""

import json
import os
import sys
import time


def main(command: list[str]) -> None:
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)  # what the command prints is no part of our answer
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(error, file=sys.stderr)
            os._exit(127)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - began
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main(sys.argv[1:])
