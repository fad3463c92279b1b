"""How a process of a launch ends: with its own exit code, whatever threads its libraries leave behind.

gloo's threads outlive the process group wherever DDP or DeepSpeed hold on to it, and now and then end a finished run
with SIGABRT when the interpreter is taken down around them; the launcher then reports a failure.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def with_own_exit_code() -> Iterator[None]:
    """Around a whole command: a process of several ends after Python's own exit handlers, without C++'s.

    Enter it before torch is imported: exit handlers run in reverse order, and this one has to be the last.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # What an exception that nobody catches ends with.
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        yield
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        raise
    else:
        code = 0
