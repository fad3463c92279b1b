"""Runs a module as ``python -m`` would and writes what it took: peak resident memory and seconds, imports apart.

    python _peak.py ANSWER.json IMPORTS MODULE ARGUMENT...

Needs nothing but Python, so that any interpreter can be measured. IMPORTS (comma-separated) come first: what the
process holds after them is the idle size, and the clock starts there.
"""

import importlib
import json
import runpy
import sys
import time


def status(field):
    """A size of this process from the kernel, in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def main():
    answer, imports, module, *arguments = sys.argv[1:]
    for name in imports.split(","):
        importlib.import_module(name)
    idle, start, failed = status("VmRSS"), time.monotonic(), ""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as done:
        failed = str(done.code) if done.code not in (None, 0) else ""
    finally:
        measured = {"peak_bytes": status("VmHWM"), "idle_bytes": idle, "seconds": time.monotonic() - start}
        with open(answer, "w", encoding="utf-8") as file:
            json.dump(measured, file)
    sys.exit(failed or 0)


main()
