"""A trained model onto other classes: the rows of its last layers go by the names of the classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mmengine.dist import broadcast
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from backbones.files import some
from densekit.report.tables import format_table

# Layers of mmdet's and mmseg's heads with rows for each class: how many, how many follow those of the last class, and
# the head's attribute that says that all classes share them.
_ROWS = {
    'fc_cls': (1, 1, ''),  # the background is last
    'fc_reg': (4, 0, 'reg_class_agnostic'),
    'conv_logits': (1, 0, 'class_agnostic'),
    'conv_seg': (1, 0, ''),
}
_LISTED = 20  # classes; of more, only the fresh ones are named


class ClassLayer(NamedTuple):
    """A layer whose shape depends on the classes."""

    name: str
    head: nn.Module
    module: nn.Module
    rows: int
    after: int


@dataclass(frozen=True)
class ClassTransfer:
    """Which rows of a checkpoint's last layers each class of a run takes.

    Attributes:
        classes: the run's, by label.
        sources: for each of them its label in the checkpoint, or None.
        count: number of classes of the checkpoint.
        layers: of the model.
        remark: how the checkpoint's names are known, empty if it has them.
        hint: on names that are nearly the same, empty if there are none.
    """

    classes: tuple[str, ...]
    sources: tuple[int | None, ...]
    count: int
    layers: tuple[ClassLayer, ...]
    remark: str = ''
    hint: str = ''

    @cached_property
    def changes_nothing(self) -> bool:
        """Whether the classes are the same ones in the same order."""
        return self.sources == tuple(range(self.count))

    def start_afresh(self) -> None:
        """Initializes the heads of classes that the checkpoint does not have, alike on every process."""
        if None not in self.sources:
            return
        for head in {layer.head: None for layer in self.layers}:
            initialize: Any = getattr(head, 'init_weights', None)
            if initialize is not None:
                initialize()
        for layer in self.layers:
            for tensor in layer.module.state_dict().values():
                if not isinstance(tensor, DTensor):  # of which each process has a part of its own
                    broadcast(tensor)

    def apply(self, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Puts the checkpoint's rows where the run has them; fresh rows are the model's.

        Args:
            weights: the checkpoint's, under the model's names.
            model: not changed.

        Returns:
            All weights. A layer that differs in more than its rows is left as it is in the checkpoint.
        """
        own = model.state_dict()
        moved = dict(weights)
        for layer in self.layers:
            here, there = self._rows(layer)
            for key in (f'{layer.name}.{name}' for name in layer.module.state_dict()):
                if key in weights and weights[key].shape[1:] == own[key].shape[1:]:
                    fresh = own[key]
                    moved[key] = fresh.full_tensor() if isinstance(fresh, DTensor) else fresh.clone()
                    moved[key][here] = weights[key][there].to(moved[key])
        return moved

    def __str__(self) -> str:
        """Per layer how many rows, and class by class which, are kept, moved and fresh."""
        if self.changes_nothing:
            return self.remark
        layers = []
        for layer in self.layers:
            here, there = self._rows(layer)
            kept = sum(row == source for row, source in zip(here, there, strict=True))
            total = len(self.classes) * layer.rows + layer.after
            layers.append([layer.name, total, kept, len(here) - kept, total - len(here)])
        return '\n'.join(
            [
                self.remark or 'The checkpoint is of other classes, which go by their names.',
                format_table(['rows of', 'all', 'kept', 'mapped by name', 'fresh'], layers),
                '',
                self._class_by_class(),
                *([self.hint] if self.hint else []),
            ]
        )

    def _rows(self, layer: ClassLayer) -> tuple[list[int], list[int]]:
        """The rows that are not fresh, and those of the checkpoint that go there."""
        pairs = [(i, j) for i, j in enumerate(self.sources) if j is not None]
        here = [layer.rows * i + k for i, _ in pairs for k in range(layer.rows)]
        there = [layer.rows * j + k for _, j in pairs for k in range(layer.rows)]
        here += [layer.rows * len(self.classes) + k for k in range(layer.after)]
        there += [layer.rows * self.count + k for k in range(layer.after)]
        return here, there

    def _class_by_class(self) -> str:
        fates = ['fresh' if j is None else 'kept' if i == j else 'mapped by name' for i, j in enumerate(self.sources)]
        if len(self.classes) <= _LISTED:
            sources = ['-' if j is None else j for j in self.sources]
            rows = [list(row) for row in zip(self.classes, range(len(self.classes)), sources, fates, strict=True)]
            return format_table(['class', 'label', 'in the checkpoint', ''], rows, align='<>><')
        counts = ', '.join(f'{fates.count(fate)} {fate}' for fate in ('kept', 'mapped by name', 'fresh'))
        fresh = [name for name, fate in zip(self.classes, fates, strict=True) if fate == 'fresh']
        return f'{len(self.classes)} classes: {counts}' + (f' ({", ".join(fresh)})' if fresh else '')


def plan_transfer(
    filename: str,
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    model: nn.Module,
    classes: Sequence[str],
) -> ClassTransfer | None:
    """Finds out which class of a checkpoint is which of a run.

    Args:
        filename: for the messages.
        checkpoint: the dictionary in the file, for the names in it.
        weights: those in it, under the model's names.
        model: a detector or segmentor.
        classes: the run's names, by label.

    Returns:
        What is to be done, or None where no head that is known here has the rows that its classes ask for; the weights
        then fit as they are or not at all.

    Raises:
        ValueError: if the file has rows for another number of classes than it names.
    """
    layers = class_layers(model)
    counts = {_classes_in(weights.get(f'{layer.name}.weight'), layer) for layer in layers}
    count = counts.pop() if len(counts) == 1 else None
    if count is None or any(layer.head.num_classes != len(classes) for layer in layers):
        return None
    named = checkpoint_classes(checkpoint)
    if named is not None and len(named) != count:
        raise ValueError(
            f'checkpoint {filename} names {len(named)} classes and has heads for {count}. Correct the names in its '
            'meta, or save its state_dict alone.'
        )
    names, remark = (named, '') if named is not None else _assumed(filename, count, layers, classes)
    sources: tuple[int | None, ...] = tuple(names.index(name) if name in names else None for name in classes)
    if names == tuple(classes):
        sources = tuple(range(count))  # whatever they are: a name may stand twice
    fresh = [name for name, source in zip(classes, sources, strict=True) if source is None]
    return ClassTransfer(tuple(classes), sources, count, tuple(layers), remark, _near_names(fresh, names))


def class_layers(model: nn.Module) -> list[ClassLayer]:
    """The layers of a model whose rows belong to classes: those of its box, mask, decode and auxiliary heads."""
    found = []
    for name, head in model.named_modules():
        number = getattr(head, 'num_classes', None)
        for layer, (rows, after, shared) in _ROWS.items():
            module = getattr(head, layer, None)
            if not isinstance(module, nn.Module) or (shared and getattr(head, shared, False)):
                continue
            candidate = ClassLayer(f'{name}.{layer}', head, module, rows, after)
            if number is not None and _classes_in(getattr(module, 'weight', None), candidate) == number:
                found.append(candidate)
    return found


def checkpoint_classes(checkpoint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of the classes in a checkpoint of mmengine (``meta.dataset_meta``) or mmdet 2 (``meta.CLASSES``)."""
    meta = checkpoint.get('meta') or {}
    dataset = meta.get('dataset_meta') or {}
    names = dataset.get('classes') or dataset.get('CLASSES') or meta.get('CLASSES')
    return tuple(map(str, names)) if names else None


def dataset_classes(dataloader: Any) -> tuple[str, ...] | None:
    """The names of the classes of a data loader's data set, which need not be built yet; None if it has none."""
    dataset = dataloader.get('dataset') if isinstance(dataloader, Mapping) else getattr(dataloader, 'dataset', None)
    while isinstance(dataset, Mapping) and (dataset.get('dataset') or dataset.get('datasets')):
        inner = dataset.get('dataset') or dataset['datasets']
        dataset = inner[0] if isinstance(inner, list | tuple) else inner
    if isinstance(dataset, Mapping):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(dataset['type']) if isinstance(dataset['type'], str) else dataset['type']
        # mmengine's own way from the class and the config to the names, which may stand in a file
        metainfo = kind._load_metainfo(dataset.get('metainfo')) if hasattr(kind, '_load_metainfo') else {}
    else:
        metainfo = getattr(dataset, 'metainfo', {})
    names = metainfo.get('classes')
    return tuple(map(str, names)) if names else None


def check_class_order(filename: str, checkpoint: Mapping[str, Any], classes: Sequence[str] | None) -> str:
    """Checks that the classes of a checkpoint have the labels that a data set gives them.

    Args:
        filename: for the messages.
        checkpoint: the dictionary in the file.
        classes: the data set's names, by label; without them nothing is checked.

    Returns:
        A warning where names differ and none of them stands elsewhere; empty if there is nothing to say.

    Raises:
        ValueError: if a name stands at another label: results would be those of other classes.
    """
    names = checkpoint_classes(checkpoint)
    if not classes or names is None or len(names) != len(classes):
        return ''
    moved = [
        f'{name} ({names.index(name)}, {i})' for i, name in enumerate(classes) if name in names and names[i] != name
    ]
    if moved:
        raise ValueError(
            f'checkpoint {filename} has other labels for the classes of the data set (there, here): {some(moved)}. '
            'Results would be those of other classes. Use the data set that it was trained on, or train on from it: '
            'tools/train.py --load-from maps classes by name.'
        )
    other = [f'{there} for {here}' for there, here in zip(names, classes, strict=True) if there != here]
    return (
        f'{filename} names classes otherwise than the data set, which is taken to mean the same: {some(other)}'
        if other
        else ''
    )


def _classes_in(weight: Any, layer: ClassLayer) -> int | None:
    """The number of classes that a weight has rows for, None if that is no whole number."""
    rows = len(weight) - layer.after if isinstance(weight, Tensor) and weight.ndim else -1
    return rows // layer.rows if rows > 0 and rows % layer.rows == 0 else None


def _assumed(
    filename: str, count: int, layers: Sequence[ClassLayer], classes: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    """Names for the classes of a file that has none, and what is to be said about that."""
    segmentor = layers[0].name.endswith('conv_seg')
    if count == 80 and not segmentor:
        from mmdet.datasets import CocoDataset

        return CocoDataset.METAINFO['classes'], f"{filename} names no classes; its 80 are taken to be COCO's."
    if count == 150 and segmentor:
        from mmseg.datasets import ADE20KDataset

        return ADE20KDataset.METAINFO['classes'], f"{filename} names no classes; its 150 are taken to be ADE20K's."
    if count == len(classes):
        return tuple(classes), f'{filename} names no classes; its {count} are taken to be those of the data set.'
    return (), f"{filename} names no classes, and its {count} are neither COCO's nor ADE20K's: all start afresh."


def _near_names(fresh: Sequence[str], names: Sequence[str]) -> str:
    """Says which fresh classes have a namesake but for case, spaces and hyphens."""

    def plain(name: str) -> str:
        return ''.join(character for character in name.casefold() if character.isalnum())

    spelt = {plain(name): name for name in names}
    near = [f'for {name!r} there is {spelt[plain(name)]!r}' for name in fresh if plain(name) in spelt]
    return f'Names have to be the same to the letter: {some(near)}' if near else ''
