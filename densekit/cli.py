"""What every tool does around its action; imports the standard library only, so that ``--help`` answers at once."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

USER_ERROR_STATUS = 2

# What mmengine, mmdet and mmseg raise while they build things from a config that cannot be built.
_BUILD_ERRORS = (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, OSError, SyntaxError)


class UserError(Exception):
    """Something the user gave cannot be used; the text says what, what is allowed, and what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Within this context, errors come from what the user gave: arguments, config, weights, data."""
    try:
        yield
    except _BUILD_ERRORS as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise UserError(text or type(error).__name__) from error


def exit_status(action: Callable[[], object]) -> int:
    """Runs a tool's action, which imports what it needs.

    Args:
        action: called without arguments; its result is not used.

    Returns:
        0, or 2 after a user's mistake, whose message goes to standard error. With DENSEKIT_TRACEBACK=1 the traceback
        goes there as well.
    """
    # OpenMP threads that wait actively take the processor from the data loaders and from whatever else runs: on two
    # shared cores a training step was 5 to 8 times slower. Read when torch is first imported.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    try:
        action()
    except UserError as error:
        if os.environ.get('DENSEKIT_TRACEBACK') == '1':
            traceback.print_exc()
        sys.stderr.write(f'error: {error}\n')
        return USER_ERROR_STATUS
    return 0
