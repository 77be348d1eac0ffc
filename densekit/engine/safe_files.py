"""Files that mmengine reads by itself, read without executing anything in them. Importing this registers the readers.

mmengine reads YAML with PyYAML's full loader and annotations in a pickle with ``pickle.load``, both of which run what
the file says; and its own loader of weights takes ``http://`` addresses. All three are reached from a config, by the
``ann_file`` of a data set, a ``_base_``, or ``init_cfg`` of a module that is not ours.
"""

import pickle
from typing import IO, Any

import yaml
from mmengine.fileio import register_handler
from mmengine.fileio.handlers.pickle_handler import PickleHandler
from mmengine.fileio.handlers.yaml_handler import YamlHandler
from mmengine.runner import CheckpointLoader

from backbones.files import read_checkpoint

_SAFE_YAML = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)  # libyaml's is ten times as fast

# What plain containers, bytes and NumPy arrays are made with in a pickle; none of it can run code of the file.
_PLAIN = {
    ('_codecs', 'encode'),  # how protocol 2 writes bytes
    *((module, name) for module in ('builtins', '__builtin__') for name in ('bytes', 'frozenset', 'set')),
    ('collections', 'OrderedDict'),
    ('numpy', 'dtype'),
    ('numpy', 'ndarray'),
    *(
        (f'{package}.multiarray', name)
        for package in ('numpy.core', 'numpy._core')
        for name in ('_reconstruct', 'scalar')
    ),
    *((f'{package}.numeric', '_frombuffer') for package in ('numpy.core', 'numpy._core')),
}


@register_handler(['yaml', 'yml'])
class SafeYamlHandler(YamlHandler):
    """YAML of plain data."""

    def load_from_fileobj(self, file: IO[str], **kwargs: Any) -> Any:
        """Reads a document.

        Raises:
            ValueError: if it is no YAML, or has tags for Python objects.
        """
        try:
            return yaml.load(file, Loader=_SAFE_YAML)
        except yaml.YAMLError as error:
            raise ValueError(
                f'a YAML file cannot be read: {error}. Only plain data is accepted: no tags for Python objects, which '
                'run code when they are read.'
            ) from error


@register_handler(['pickle', 'pkl'])
class PlainPickleHandler(PickleHandler):
    """Pickles of plain data and NumPy arrays, such as annotations in OpenMMLab's format."""

    def load_from_fileobj(self, file: IO[bytes], **kwargs: Any) -> Any:
        """Reads an object.

        Raises:
            ValueError: if the file is damaged or names anything that is not plain data.
        """
        try:
            return _PlainUnpickler(file).load()
        except Exception as error:  # a damaged file fails wherever its bytes happen to lead: IndexError, KeyError, ...
            raise ValueError(
                f'a pickle is not read: {error}. Only plain data and NumPy arrays are accepted, because a pickle can '
                'run code. If you trust it, load it yourself and save what is in it as JSON.'
            ) from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f'it holds {module}.{name}, which is no plain data')
        return super().find_class(module, name)


@CheckpointLoader.register_scheme(prefixes=('', 'http://', 'https://'), force=True)
def load_from_file_or_https(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Weights for a module that mmengine initializes, such as a stock ResNet.

    Args:
        filename: as :func:`backbones.files.read_checkpoint` takes it.
        map_location: device of the tensors.

    Returns:
        The dictionary in the file.
    """
    return read_checkpoint(filename, 'cpu' if map_location is None else map_location)
