"""densekit: ConvNeXt for detection and segmentation. Importing this package imports nothing else."""

from importlib import import_module
from typing import Any

__version__ = '0.1.0'

# Imported when first asked for: what they need takes seconds to import.
_LATE = {'Detections': 'densekit.predictor', 'Predictor': 'densekit.predictor'}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f'densekit has no {name}; from here come {", ".join(_LATE)} and the modules in it')
    return getattr(import_module(_LATE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATE])
