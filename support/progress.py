"""Progress: a bar on a terminal, a line a minute in a log file."""
import math
import sys

from tqdm import tqdm


class progress(tqdm):
    """tqdm's bar on a terminal; elsewhere, in a log file say, one line a minute and none for short work."""

    def __init__(self, *args, **kwargs):
        self.live = sys.stderr.isatty()
        slow = {} if self.live else {"mininterval": 60, "maxinterval": math.inf, "delay": 60, "miniters": 1}
        super().__init__(*args, **{"leave": False, "dynamic_ncols": self.live, **slow, **kwargs})

    def display(self, msg=None, pos=None):
        """Draw the bar, or print it as a line."""
        if self.live:
            return super().display(msg, pos)
        if msg is None:
            print(str(self), file=sys.stderr, flush=True)
