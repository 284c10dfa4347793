"""Signals that end the program. Imports only the standard library."""

import os
import signal
import stat
import sys
from contextlib import contextmanager


class Stopped(Exception):
    """Raised on Ctrl-C, SIGTERM or SIGHUP, before any update of the step."""


@contextmanager
def stop_signals():
    """Append signals to the yielded list, which the loop checks between groups. A second Ctrl-C
    ends the program immediately."""
    stop = []

    def handler(number, frame):
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        mute_lost_terminal()
        stop.append(number)

    with handle_signals(signals_to_stop(), handler):
        yield stop


@contextmanager
def handle_signals(numbers, handler):
    """Handle these signals with `handler` within the block."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def signals_to_stop():
    """SIGINT, SIGTERM, and SIGHUP if it exists and is not ignored (nohup ignores it)."""
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([] if ignored else [hangup])


def interrupt(number, frame):
    """A signal handler that acts like Ctrl-C."""
    mute_lost_terminal()
    raise KeyboardInterrupt


def mute_lost_terminal():
    """If the terminal is gone, e.g. after SIGHUP, discard output. Printing to it would raise an
    exception before the run is saved."""
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        except OSError:  # already closed
            pass


def leave(code):
    """End the process without destructors: those of torch.distributed's threads can abort it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def leave_quietly_on_ctrl_c():
    """Make Ctrl-C end the program without a traceback while torch loads. An exception would not
    work, because C extensions swallow or replace it. Later handlers override this one."""

    def leave(*_):
        os.write(1, b"stopped; nothing was changed\n")
        os._exit(130)

    signal.signal(signal.SIGINT, leave)
