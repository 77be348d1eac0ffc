"""A bar that shows how far a tool is."""

import sys
import time

_BAR = 30


class ProgressBar:
    """Shows progress on one line of a terminal, elsewhere as a line at the start of each part."""

    def __init__(self, stream=None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._title = ''
        self._width = 0
        self._start = 0.0

    def __call__(self, title: str, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` files of a part are through; 0 of 0 for a part that cannot be counted."""
        if title != self._title:
            self.clear()
            self._title, self._start = title, time.monotonic()
            if not self.terminal:
                self.stream.write(f'{title}{f": {total:,}" if total else ""}\n')
        if self.terminal:
            self._show(title, done, total)
        self.stream.flush()

    def _show(self, title: str, done: int, total: int) -> None:
        line = title
        if total:
            filled = _BAR * done // total
            left = (time.monotonic() - self._start) / done * (total - done) if done else 0
            line += f' [{"#" * filled}{"." * (_BAR - filled)}] {done:,} of {total:,}, {left:.0f} s left'
        self.stream.write(f'\r{line:<{self._width}}')
        self._width = len(line)

    def clear(self) -> None:
        """Removes the bar, before something else is written."""
        if self.terminal and self._width:
            self.stream.write('\r' + ' ' * self._width + '\r')
            self.stream.flush()
        self._width = 0
