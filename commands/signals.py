"""Signals that end the program. torch need not be loaded."""

import os
import signal
import stat
from contextlib import contextmanager


@contextmanager
def handle_signals(numbers, handler):
    """Handle these signals with `handler` for a while."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def signals_to_stop():
    """Ctrl-C, SIGTERM, and SIGHUP where it exists and is not ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([] if ignored else [hangup])


def interrupt(number, frame):
    """A signal handler: what Ctrl-C does."""
    mute_lost_terminal()
    raise KeyboardInterrupt


def mute_lost_terminal():
    """If the terminal is gone, as after SIGHUP, print into nothing: printing to it would raise an
    exception before the run is saved."""
    for number in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        except OSError:  # it is closed
            pass


def leave_quietly_on_ctrl_c():
    """Until another handler is set: while torch loads, Ctrl-C ends the program without a traceback.
    An exception could not do it, because C extensions swallow it or turn it into another."""

    def leave(*_):
        os.write(1, b"stopped; nothing had started\n")
        os._exit(130)

    signal.signal(signal.SIGINT, leave)
