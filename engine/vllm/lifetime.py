"""No process of a supervised vLLM server outlives its supervisor, however the supervisor ends.

The supervisor starts the launcher in its own process group and gives it the read end of a pipe
(`TOKENMILL_PARENT_FD`). Two independent means follow from that:

- The launcher watches the pipe. The kernel closes the other end when the supervisor is gone, whatever killed
  it; the launcher then asks its process group to end and, after a grace period, kills it.
- Each process that vLLM starts asks the kernel to be killed together with its own parent, which also covers a
  launcher that is itself killed.

Without `TOKENMILL_PARENT_FD` nothing here acts: a plain `vllm serve` keeps vLLM's own behaviour.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
import time

from tokenmill import env
from tokenmill.errors import ConfigurationError

#: Seconds between asking the process group to end and killing it.
GRACE_SECONDS = 5.0
#: `PR_SET_PDEATHSIG` of prctl(2).
_SET_PARENT_DEATH_SIGNAL = 1


def follow_parent_process() -> None:
    """In a process that vLLM started under a supervised launcher: die when the parent process does."""
    parent = multiprocessing.parent_process()
    if parent is None or not os.environ.get(env.PARENT_FD.name):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if not parent.is_alive():  # it went before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


def watch_supervisor() -> None:
    """In the launcher: start watching the pipe that `TOKENMILL_PARENT_FD` names; without it, do nothing.

    Raises:
        ConfigurationError: The variable does not name an open file descriptor.
    """
    descriptor = env.PARENT_FD.get()
    if descriptor is None:
        return
    try:
        os.set_inheritable(descriptor, False)
    except OSError:
        raise ConfigurationError(
            f"{env.PARENT_FD.name}={descriptor} is no open file descriptor; pass it on with pass_fds, or unset it"
        ) from None
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # ending the group must not reach whoever started us
    threading.Thread(target=_end_with, args=(descriptor,), name="supervisor-watch", daemon=True).start()


def _end_with(descriptor: int) -> None:
    """Blocks until the pipe closes, then ends this process and all others of its group."""
    while os.read(descriptor, 4096):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)
