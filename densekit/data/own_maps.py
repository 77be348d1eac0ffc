"""Label maps of one's own and their images: which belongs to which, and what values there are."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from densekit.data.convert import image_files
from densekit.data.image_files import Progress, probe_all

IGNORED = 255


@dataclass
class MapData:
    """Images and their label maps, of which those without an image are left out.

    Attributes:
        images: folder.
        maps: folder.
        names: of the images, relative to their folder and without suffix, ascending.
        suffixes: of images and of label maps.
        values: of each label map that is there and has one channel of whole numbers, by name.
        unused: label maps without an image.
        together: whether images and label maps share a folder and a last suffix, so that the names have to be listed.
    """

    images: str
    maps: str
    names: list[str]
    suffixes: tuple[str, str]
    values: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unused: int = 0
    together: bool = False

    def image(self, name: str) -> str:
        """Path of an image."""
        return str(Path(self.images, name + self.suffixes[0]))

    def map(self, name: str) -> str:
        """Path of its label map."""
        return str(Path(self.maps, name + self.suffixes[1]))

    def all_values(self) -> set[int]:
        """The values in any of the maps."""
        return set().union(*self.values.values())


def find_maps(images: str, maps: str, progress: Progress | None = None) -> MapData:
    """Pairs images with label maps by their names, and reads the values of all maps.

    Args:
        images: folder.
        maps: folder; may be the same.
        progress: see :func:`densekit.data.image_files.probe_all`.

    Raises:
        FileNotFoundError: if a folder is missing or without images, or no label map has the name of an image.
        ValueError: if the images have several suffixes.
    """
    paths = image_files(images).paths
    files = image_files(maps, 'label maps').paths
    same = Path(images).resolve() == Path(maps).resolve()
    stems = {path[: -len(Path(path).suffix)]: Path(path).suffix for path in paths}
    owners = {path: owner for path in files if (owner := _owner(path, stems, same)) is not None}
    if not owners:
        raise FileNotFoundError(
            f'no label map in {maps} has the name of an image in {images}: the first are {files[0]} and {paths[0]}. A '
            'label map is called as its image is, with something after it if need be (a.jpg: a.png, a_mask.png)'
        )
    # What follows the name of the image is the same for all maps.
    suffix = Counter(path[len(owner) :] for path, owner in owners.items()).most_common(1)[0][0]
    pictures = [path for path in paths if not (same and owners.get(path, path) + suffix == path)]
    kinds = Counter(Path(path).suffix for path in pictures)
    if len(kinds) > 1:
        counts = ', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())
        cure = 'Rename them' if len({kind.lower() for kind in kinds}) == 1 else 'Save them alike'
        raise ValueError(f'the images of {images} have several suffixes ({counts}); mmseg reads one. {cure}')
    kind = next(iter(kinds))
    names = [path[: -len(kind)] for path in pictures]
    known = set(files)
    found = MapData(images, maps, names, (kind, suffix), together=same and suffix.endswith(kind))
    there = [name for name in names if name + suffix in known]
    found.unused = len(files) - len(there) - (len(pictures) if same else 0)
    probes = probe_all(
        [found.map(name) for name in there],
        [True] * len(there),
        title='label maps',
        progress=progress,
        label_maps=True,
    )
    for name, probe in zip(there, probes, strict=True):
        if probe.values is not None:
            found.values[name] = probe.values
    return found


def _owner(path: str, stems: dict[str, str], same: bool) -> str | None:
    """The image that a label map is named after: the longest name that the path begins with."""
    folder = path.rfind('/') + 1
    for end in range(len(path), folder, -1):
        rest = path[end:]
        if path[:end] in stems and rest and not (same and rest == stems[path[:end]]):
            return path[:end]
    return None


def label_problem(
    data: MapData, classes: Sequence[str] | None, ignore_zero: bool, learned: Collection[int] = ()
) -> str:
    """What is wrong with the values of label maps as numbers of classes, in words; empty if nothing is.

    Args:
        data: with values.
        classes: names by label, if they are known.
        ignore_zero: whether 0 is no class, and the classes count from 1.
        learned: values in the label maps to train on, where those of ``data`` are to validate.
    """
    if not data.values:
        return ''  # not even one can be read as labels, which the checks tell file by file
    every = data.all_values().union(learned)
    values = sorted(every - {IGNORED} - ({0} if ignore_zero else set()))
    low = int(ignore_zero)
    held = f'The label maps in {data.maps} hold '
    how = 'Save them as labels: 0 for the first class, 1 for the next, ..., 255 for what is not to count'
    convert = f'`tools/convert_data.py colours --annotations {data.maps} --out NEW_FOLDER`'
    grey = f'{how}; {convert} makes each shade a label'
    if not values:
        return f'{held}nothing but {"0 and " if ignore_zero else ""}255, which is not learned. {how}'
    if len(values) == 1 and IGNORED in every:  # names for two classes would not make them two
        written = ', '.join(f'{value} as {label}' for label, value in enumerate(sorted(every)))
        return (
            f'{held}only {values[0]} and 255, which is never learned or scored: there are no two classes to tell '
            f'apart. If 255 is a class, {convert} writes {written}'
        )
    if len(values) == 1 and not classes:
        return f'{held}only {values[0]}: there are no two classes to tell apart. {grey}'
    shown = ', '.join(map(str, values[:12])) + (', ...' if len(values) > 12 else '')
    if classes is not None and values[-1] - low >= len(classes):
        return f'{held}{shown}; the {len(classes)} names given are for {low} to {len(classes) - 1 + low}. {how}'
    if values[0] < 0 or values[-1] > IGNORED or (classes is None and len(values) * 2 < values[-1] + 1 - low):
        return f'{held}{shown}, which look like shades of grey and not like numbers of classes. {grey}'
    return ''
