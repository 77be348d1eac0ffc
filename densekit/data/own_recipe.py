"""The recipe for data of one's own, as the text of a config.

None of it is from a paper. Detectors inherit mask_rcnn_convnext_t_quick_coco, segmentors upernet_convnext_t_80k_ade20k;
what follows from the number of images is in :func:`plan`.
"""

import math
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from backbones.convnext import ARCHS
from backbones.zoo import ZOO

BASES = {
    'detection': 'configs/detection/mask_rcnn_convnext_t_quick_coco.py',
    'segmentation': 'configs/segmentation/upernet_convnext_t_80k_ade20k.py',
}
FEW, SOME = 1000, 4000  # images, below which two stages and one are frozen

_V1 = 'https://dl.fbaipublicfiles.com/convnext/convnext_{arch}_{data}_224.pth'


@dataclass(frozen=True)
class Size:
    """A backbone and how it is trained.

    Attributes:
        arch: its name.
        weights: that it starts from.
        pretraining: what they were trained on.
        drop_path: with few images, and with many (that of the COCO recipes).
        layer_decay: of a detector, from layer to layer.
        v2: whether it is ConvNeXt V2.
        float32: whether mixed precision is off, as in the papers.
    """

    arch: str
    weights: str
    pretraining: str
    drop_path: tuple[float, float] = (0.1, 0.2)
    layer_decay: float = 0.8
    v2: bool = False
    float32: bool = False

    @property
    def channels(self) -> list[int]:
        """Of the four stages."""
        return list(ARCHS[self.arch][1])

    @property
    def license(self) -> str:
        """Of the weights, where the catalogue knows them by this name."""
        return next((w.license for w in _CATALOGUE if w.name == self.weights or w.address == self.weights), '')


_CATALOGUE = list(ZOO.values()) if isinstance(ZOO, dict) else list(ZOO)


def _v1(arch: str, data: str, *others: object, **settings: object) -> Size:
    pretraining = f'ImageNet-{data.upper()}'
    return Size(arch, _V1.format(arch=arch, data=data), pretraining, *others, **settings)  # type: ignore[arg-type]


def _v2(arch: str, **settings: object) -> Size:
    weights = f'convnextv2_{arch}.fcmae_ft_in1k'
    return Size(arch, weights, 'FCMAE, fine-tuned on ImageNet-1K', v2=True, **settings)  # type: ignore[arg-type]


SIZES: dict[str, Size] = {
    'a': _v2('atto'),
    'f': _v2('femto'),
    'p': _v2('pico'),
    'n': _v2('nano'),
    't': _v1('tiny', '1k', (0.2, 0.4)),
    's': _v1('small', '1k', (0.2, 0.6), 0.7),
    'b': _v1('base', '1k', (0.2, 0.7)),
    'l': _v1('large', '22k', (0.2, 0.7), 0.7, float32=True),
    'xl': _v1('xlarge', '22k', (0.2, 0.8), 0.7, float32=True),
    'h': _v2('huge', drop_path=(0.2, 0.5), float32=True),
}


@dataclass(frozen=True)
class Plan:
    """What the number of images decides.

    Attributes:
        batch: images a step, of all GPUs together.
        iterations: of training.
        warmup: iterations of it in which the learning rate rises.
        interval: iterations between validations.
        frozen: stages that are not trained, beside the stem; 0 trains all.
        rate: learning rate.
    """

    batch: int
    iterations: int
    warmup: int
    interval: int
    frozen: int
    rate: float


def plan(task: str, images: int, batch: int) -> Plan:
    """Schedule, learning rate and frozen stages.

    Detectors see every image 40 times, from 1,000 on less and 12 times at least, as in COCO's 1x schedule, and 4,000
    images in any case; segmentors 80 times and 8,000. The learning rate is that of the recipes for COCO and ADE20K,
    1e-4 for batches of 16, by the square root of the batch, as AdamW's noise goes.

    Args:
        task: 'detection' or 'segmentation'.
        images: to train on.
        batch: images a step.
    """
    if task == 'detection':
        seen = max(4000.0, images * max(12.0, 40 * min(1.0, math.sqrt(FEW / images))))
    else:
        seen = max(8000.0, images * 80.0)
    iterations = math.ceil(seen / batch)
    step = 10 ** max(1, math.floor(math.log10(iterations)) - 1)  # two digits, and divisible by 5
    iterations = math.ceil(iterations / step) * step
    return Plan(
        batch=batch,
        iterations=iterations,
        warmup=min(1000, max(1, iterations // 150 * 10)),
        interval=iterations // 5,
        frozen=2 if images < FEW else 1 if images < SOME else 0,
        rate=float(f'{1e-4 * math.sqrt(batch / 16):.2g}'),
    )


@dataclass(frozen=True)
class Part:
    """Files of a data set.

    Attributes:
        count: of its images.
        images: folder.
        annotations: COCO file, or folder of label maps.
        names: file that lists the images of a data set of label maps; empty for all.
    """

    count: int
    images: str
    annotations: str
    names: str = ''


@dataclass(frozen=True)
class Recipe:
    """All that a config is made of.

    Attributes:
        task: 'detection' or 'segmentation'.
        size: key of :data:`SIZES`.
        classes: names by label.
        palette: RGB by label.
        train: to learn from.
        val: to validate and to test with.
        batch: images a step.
        masks: whether there are masks beside the boxes.
        suffixes: of images and of label maps.
        ignore_zero: whether label 0 of label maps is no class.
        command: that it is written by.
    """

    task: str
    size: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    train: Part
    val: Part
    batch: int
    masks: bool = True
    suffixes: tuple[str, str] = ('.jpg', '.png')
    ignore_zero: bool = False
    command: Sequence[str] = field(default_factory=tuple)

    @property
    def plan(self) -> Plan:
        """For the number of images."""
        return plan(self.task, self.train.count, self.batch)


def config_text(recipe: Recipe, base: str, train_command: str) -> str:
    """The config.

    Args:
        recipe: what it is to be.
        base: path of the config that it inherits, as it is to stand there.
        train_command: for its docstring.

    Returns:
        Python in UTF-8.
    """
    parts = [_docstring(recipe, base, train_command), f'_base_ = {base!r}', '']
    parts += [_classes(recipe), f'max_iters = {recipe.plan.iterations}  # {_epochs(recipe)}', '']
    detection = recipe.task == 'detection'
    parts += _detector(recipe) if detection else _segmentor(recipe)
    return '\n'.join([*parts, *_schedule(recipe)]) + '\n'


def _epochs(recipe: Recipe) -> str:
    seen = recipe.plan.iterations * recipe.batch / recipe.train.count
    return f'each of the {recipe.train.count:,} images about {seen:.0f} times, in batches of {recipe.batch}'


def _method(recipe: Recipe) -> str:
    if recipe.task == 'segmentation':
        return 'UperNet'
    return 'Mask R-CNN' if recipe.masks else 'Faster R-CNN'


def _docstring(recipe: Recipe, base: str, train_command: str) -> str:
    size = SIZES[recipe.size]
    name = f'ConvNeXt{" V2" if size.v2 else ""}-{recipe.size.upper()}'
    number = len(recipe.classes)
    first = f'{_method(recipe)}, {name} ({size.pretraining}), {number} class{"es" if number > 1 else ""}.'
    told = (
        f'Written on {date.today().isoformat()} for {recipe.train.count:,} images to train and {recipe.val.count:,} to '
    )
    told += f'validate, by\n    {_shown(shlex.join(recipe.command))}\n' if recipe.command else 'validate.\n'
    why = f'Not from a paper: what differs from {Path(base).name} follows from the number of images and the batch.'
    if size.license and 'nc' in size.license:
        why += f' The license of the weights is {size.license}: no commercial use.'
    told += textwrap.fill(why, 118) + f'\n\n    {_shown(train_command)}\n'
    return f'"""{first}\n\n{told}"""\n'


def _shown(text: str) -> str:
    """Text for a docstring."""
    return text.replace('\\', '\\\\').replace('"""', '\\"\\"\\"')


def _classes(recipe: Recipe) -> str:
    return '\n'.join(
        [
            'metainfo = dict(',
            '    classes=(',
            *_filled(recipe.classes),
            '    ),',
            '    palette=[',
            *_filled(recipe.palette),
            '    ],',
            ')',
            f'num_classes = {len(recipe.classes)}',
        ]
    )


def _filled(items: Sequence[object]) -> list[str]:
    """Lines of as many items as fit; textwrap would break within the names."""
    lines = ['']
    for item in items:
        if len(lines[-1]) + len(f' {item!r},') > 110 and lines[-1]:
            lines.append('')
        lines[-1] += f' {item!r},' if lines[-1] else f'        {item!r},'
    return lines


def _backbone(recipe: Recipe) -> str:
    """The backbone, as far as it is not the T of the base."""
    size, frozen = SIZES[recipe.size], recipe.plan.frozen
    options = [f'frozen_stages={frozen}', f'drop_path_rate={size.drop_path[0 if frozen else 1]}']
    if size.arch != 'tiny':
        options.insert(0, f'arch={size.arch!r}')
        options.append(f'init_cfg=dict(checkpoint={size.weights!r})')
    if size.v2:
        options[1:1] = ['use_grn=True', 'layer_scale_init_value=0.0']
    trained = (
        f'  # the stem and {frozen} stage{"s" if frozen > 1 else ""} stay as they are: few images' if frozen else ''
    )
    lines = [f'        {option},' + (trained if option.startswith('frozen') else '') for option in options]
    return '\n'.join(['    backbone=dict(', *lines, '    ),'])


def _detector(recipe: Recipe) -> list[str]:
    size = SIZES[recipe.size]
    heads = ['bbox_head=dict(num_classes=num_classes)']
    heads += (
        ['mask_head=dict(num_classes=num_classes)'] if recipe.masks else ['mask_roi_extractor=None', 'mask_head=None']
    )
    model = ['model = dict(', *([] if recipe.masks else ["    type='FasterRCNN',"]), _backbone(recipe)]
    model += [f'    neck=dict(in_channels={size.channels}),'] if size.arch != 'tiny' else []
    model += [f'    roi_head=dict({", ".join(heads)}),', ')', '']
    pipelines: tuple[list[str], list[str]] = ([], [])
    if not recipe.masks:
        pipelines = ['        pipeline=train_pipeline,'], ['        pipeline=test_pipeline,']
        model += [
            '# Boxes only.',
            'train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline',
            "train_pipeline[1]['with_mask'] = test_pipeline[2]['with_mask'] = False",
        ]
    for loop, part, pipeline in zip(('train', 'val'), (recipe.train, recipe.val), pipelines, strict=True):
        model += [
            f'{loop}_dataloader = dict(',
            *([f'    batch_size={recipe.batch},'] if loop == 'train' else []),
            '    dataset=dict(',
            "        data_root='',",
            f'        ann_file={part.annotations!r},',
            f'        data_prefix=dict(img={part.images!r}),',
            '        metainfo=metainfo,',
            *pipeline,
            '    ),',
            ')',
        ]
    scored = '' if recipe.masks else ", metric='bbox'"
    model += ['test_dataloader = val_dataloader']
    return [
        *model,
        f'val_evaluator = dict(ann_file={recipe.val.annotations!r}{scored})',
        'test_evaluator = val_evaluator',
        '',
    ]


def _segmentor(recipe: Recipe) -> list[str]:
    size = SIZES[recipe.size]
    inputs = ['', '']
    if size.arch != 'tiny':
        inputs = [f'in_channels={size.channels}, ', f'in_channels={size.channels[2]}, ']
    lines = ['model = dict(', _backbone(recipe)]
    for head, channels in zip(('decode_head', 'auxiliary_head'), inputs, strict=True):
        lines.append(f'    {head}=dict({channels}num_classes=num_classes),')
    lines += [')', '']
    common = [f'img_suffix={recipe.suffixes[0]!r}', f'seg_map_suffix={recipe.suffixes[1]!r}']
    common += [f'reduce_zero_label={recipe.ignore_zero}']
    lines += ['dataset = dict(', "    type='BaseSegDataset',", "    data_root='',", '    metainfo=metainfo,']
    lines += [*(f'    {option},' for option in common), ')']
    for loop, part in (('train', recipe.train), ('val', recipe.val)):
        lines += [
            f'{loop}_dataloader = dict(',
            *([f'    batch_size={recipe.batch},'] if loop == 'train' else []),
            '    dataset=dict(',
            *([f'        ann_file={part.names!r},'] if part.names else []),
            f'        data_prefix=dict(img_path={part.images!r}, seg_map_path={part.annotations!r}),',
            '        **dataset,',
            '    ),',
            ')',
        ]
    return [*lines, 'test_dataloader = val_dataloader', '']


def _schedule(recipe: Recipe) -> list[str]:
    what, size = recipe.plan, SIZES[recipe.size]
    wrapper = [f'optimizer=dict(lr={what.rate})']
    if recipe.task == 'detection':
        wrapper += [f'paramwise_cfg=dict(decay_rate={size.layer_decay})'] if size.layer_decay != 0.8 else []
    wrapper = (["type='OptimWrapper'"] if size.float32 else []) + wrapper
    return [
        f'train_cfg = dict(max_iters=max_iters, val_interval={what.interval})',
        'param_scheduler = [',
        f"    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end={what.warmup}),",
        f"    dict(type='PolyLR', power=1.0, begin={what.warmup}, end=max_iters, eta_min=0.0, by_epoch=False),",
        ']',
        f'optim_wrapper = dict({", ".join(wrapper)})',
        f'auto_scale_lr = dict(base_batch_size={recipe.batch})  # the batch that this learning rate is for',
        f'default_hooks = dict(logger=dict(interval={min(50, what.interval)}), '
        f'checkpoint=dict(interval={what.interval}))',
    ]
