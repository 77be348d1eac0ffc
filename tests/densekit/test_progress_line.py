"""The live line of training, on a real pseudo-terminal, and its absence elsewhere."""

import fcntl
import os
import re
import struct
import sys
import termios
import threading

import pytest
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from densekit.cli import RunStopped
from densekit.engine import progress_line
from densekit.engine.progress_line import Above, LiveLine, ProgressLine

COLUMNS = 60


def screen(text):
    """The lines that a terminal shows after ``text``, colours left out."""
    lines, column = [''], 0
    for piece in re.findall(r'\x1b\[K|\r|\n|[^\r\n\x1b]+', re.sub(r'\x1b\[[0-9;]*m', '', text)):
        if piece == '\x1b[K':
            lines[-1] = lines[-1][:column]
        elif piece == '\r':
            column = 0
        elif piece == '\n':
            lines.append('')
            column = 0
        else:
            lines[-1] = lines[-1][:column] + piece + lines[-1][column + len(piece) :]
            column += len(piece)
    return lines


class Terminal:
    """A pseudo-terminal, and all that was written to it."""

    def __init__(self):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, COLUMNS, 0, 0))
        self.stream = os.fdopen(slave, 'w')
        self._read = []
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()

    def __enter__(self):
        """Standard output and error go to it."""
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(sys, 'stdout', self.stream)
        self._patch.setattr(sys, 'stderr', self.stream)

    def __exit__(self, *_):
        self._patch.undo()

    def _drain(self):
        try:
            while data := os.read(self.master, 4096):
                self._read.append(data)
        except OSError:  # how Linux says that the other end is closed
            return

    def text(self):
        """Closes it; what was written."""
        self.stream.close()
        self._reader.join(timeout=30)
        assert not self._reader.is_alive()
        os.close(self.master)
        return b''.join(self._read).decode()


@pytest.fixture
def terminal(monkeypatch):
    made = Terminal()
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr(progress_line, 'PAUSE', 0.0)
    yield made
    if not made.stream.closed:
        made.text()


@HOOKS.register_module()
class Noise(Hook):
    """Writes to the terminal amid a run, after the log, and ends it."""

    priority = 'VERY_LOW'

    def before_train_iter(self, runner, batch_idx, **_):
        if runner.iter == 3:
            print('and the rest')

    def after_train_iter(self, runner, batch_idx, **_):
        if runner.iter == 1:
            sys.stderr.write('from standard error\n')
        if runner.iter == 2:
            print('half a line, ', end='')
        if runner.iter == 4:
            raise RunStopped('told to stop')


@pytest.fixture
def noisy(tiny, tmp_path):
    """A config with that hook."""
    path = tmp_path / 'noisy.py'
    path.write_text(f"_base_ = {tiny.seg!r}\ncustom_hooks = [dict(type='Noise')]\n")
    return path


@pytest.mark.usefixtures('quick_mmengine')
def test_a_run_on_a_terminal(noisy, tool, tmp_path, terminal):
    options = ['train_cfg.max_iters=9', 'train_cfg.val_interval=2']
    options += ['default_hooks.checkpoint.interval=100', 'randomness.seed=0']
    with terminal:
        assert tool('train', noisy, '--work-dir', tmp_path, '--cfg-options', *options) == 3
        assert sys.stdout is sys.stderr is terminal.stream
    written = terminal.text()
    states = [piece for piece in re.findall(r'\x1b\[K([^\r\n\x1b]*)', written) if piece]
    training = [state for state in states if 'loss' in state and 'Iter(train)' not in state]  # not the log
    assert [state.split()[0] for state in training] == ['1/9', '2/9', '4/9']  # not amid a line of somebody else's
    assert all(re.fullmatch(r'\d/9  loss \d\.\d{3}  ETA 0:\d\d:\d\d  \d+\.\d images/s.*', state) for state in training)
    assert sum(bool(re.match(r'validation 3/3  ETA 0:00:00  \d+\.\d images/s', state)) for state in states) == 2
    live = [state for state in states if 'Iter(' not in state]
    assert max(map(len, live)) < COLUMNS  # lr and memory have no room
    shown = screen(written)
    assert shown[-2:] == ['error: told to stop', '']
    assert 'from standard error' in shown and 'half a line, and the rest' in shown
    assert sum('Iter(train) [' in line for line in shown) == 5  # the log is what it is without the line
    left = [line for line in shown if 'ETA' in line or line.startswith('validation')]
    assert not left
    (log,) = tmp_path.glob('*/*.log')
    assert '\x1b' not in log.read_text() and '\r' not in log.read_text()


@pytest.mark.usefixtures('quick_mmengine')
def test_without_making_way_the_screen_is_garbled(noisy, tool, tmp_path, terminal, monkeypatch):
    monkeypatch.setattr(LiveLine, 'clear', lambda self: None)
    options = ['train_cfg.max_iters=2', 'train_cfg.val_interval=100']
    with terminal:
        assert tool('train', noisy, '--work-dir', tmp_path, '--cfg-options', *options) == 0
    shown = screen(terminal.text())
    assert any('images/s' in line and 'Iter(train) [2/2]' in line for line in shown)


@pytest.mark.usefixtures('quick_mmengine')
def test_a_pipe_gets_the_log_alone(tiny, tool, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv('TERM', 'xterm')
    reading, writing = os.pipe()
    with os.fdopen(writing, 'w') as stream, monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', stream)
        assert tool('train', tiny.seg, '--work-dir', tmp_path, '--cfg-options', 'train_cfg.max_iters=2') == 0
    with os.fdopen(reading) as pipe:
        written = pipe.read()
    assert written.count('Iter(train) [') == 2
    assert '\r' not in written and '\x1b[K' not in written


@pytest.mark.parametrize(('rank', 'term', 'shown'), [(0, 'xterm', True), (1, 'xterm', False), (0, 'dumb', False)])
def test_where_it_is_shown(terminal, monkeypatch, rank, term, shown):
    monkeypatch.setenv('TERM', term)
    with terminal:
        assert ProgressLine.is_of_use(rank) is shown


def test_what_has_no_room_is_left_out_from_the_end(terminal):
    line = LiveLine(terminal.stream)
    stream = Above(terminal.stream, line)
    line.show(['a' * 30, 'b' * 27, 'c'])  # 30 + 2 + 27 are one column less than there are
    stream.writelines(['one\n', 'two\n'])
    line.show(['a' * 30, 'b' * 28, 'c'])
    assert stream.isatty() and stream.fileno() == terminal.stream.fileno()
    shown = screen(terminal.text())
    assert shown == ['one', 'two', 'a' * 30]
