"""What every tool does around its action; imports the standard library only, so that ``--help`` answers at once."""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # as a shell has it after Ctrl-C

# What mmengine, mmdet and mmseg raise while they build things from a config that cannot be built.
_BUILD_ERRORS = (TypeError, KeyError, AttributeError, AssertionError, IndexError)


class UserError(Exception):
    """Something the user gave cannot be used; the text says what, what is allowed, and what to do."""


class RunStopped(Exception):
    """A run ended itself; the text says why, what is safe, and what to do."""

    status = 3


class Interrupted(RunStopped):
    """A run was told to stop and saved a checkpoint first; the same command with --resume=auto goes on."""

    status = 75  # sysexits.h: EX_TEMPFAIL, try again later


@contextmanager
def user_errors() -> Iterator[None]:
    """Within this context, errors come from what the user gave: arguments, config, weights, data."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error) or type(error).__name__) from error
    except _BUILD_ERRORS as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(
            f'{type(error).__name__}: {text}\nDENSEKIT_TRACEBACK=1 before the command shows where.'
        ) from error


def exit_status(action: Callable[[], object]) -> int:
    """Runs a tool's action, which imports what it needs.

    Args:
        action: called without arguments; its result is not used.

    Returns:
        0; 2 after a user's mistake, 3 if a run ended itself, 75 if it was told to and saved a checkpoint first, and 130
        after Ctrl-C, with a message on standard error. With DENSEKIT_TRACEBACK=1 the traceback goes there as well.
    """
    # OpenMP threads that wait actively take the processor from the data loaders and from whatever else runs: on two
    # shared cores a training step was 5 to 8 times slower. Read when torch is first imported.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    try:
        action()
    except (UserError, RunStopped, ImportError) as error:
        if os.environ.get('DENSEKIT_TRACEBACK') == '1':
            traceback.print_exc()
        sys.stdout.flush()  # the log first, then the message
        sys.stderr.write(f'error: {error}\n')
        if isinstance(error, ImportError):
            sys.stderr.write('`python -m densekit.doctor` shows what is installed and what is missing.\n')
        return error.status if isinstance(error, RunStopped) else USER_ERROR_STATUS
    except KeyboardInterrupt:
        sys.stderr.write('\ninterrupted\n')
        return INTERRUPTED_STATUS
    return 0


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``, the same in every tool."""
    parser.add_argument(
        '--cfg-options', nargs='+', action='extend', default=[], metavar='k=v', help='change keys of the config'
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``, likewise."""
    parser.add_argument('--device', metavar='D', help='such as cpu or cuda:1 (default: the first GPU if there is one)')


def check_writable(folder: str, argument: str) -> None:
    """Checks that a folder can be written, or made, before work is done that it is to hold.

    Args:
        folder: path; nothing is made.
        argument: of the command, for the message.

    Raises:
        ValueError: if it cannot.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f'folder {folder} cannot be written ({existing}: {error.strerror}); give another one: {argument} FOLDER'
        ) from error
