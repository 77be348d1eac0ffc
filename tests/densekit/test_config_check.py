from pathlib import Path

import pytest

from densekit.engine.config import load_config, parse_options
from densekit.engine.config_check import accepted_keys

CONFIGS = Path(__file__).parents[2] / 'configs'
MASK_RCNN = str(CONFIGS / 'detection/mask_rcnn_convnext_t_coco.py')
CASCADE = str(CONFIGS / 'detection/cascade_convnext_t_coco.py')
UPERNET = str(CONFIGS / 'segmentation/upernet_convnext_t_ade20k.py')
RECIPES = sorted(path for path in CONFIGS.glob('*/*.py') if path.parent.name != '_base_')


class Closed:
    def __init__(self, width, depth=3):
        pass


class Passes(Closed):
    def __init__(self, *args, height, **kwargs):
        super().__init__(*args, **kwargs)


class Inherits(Passes):
    pass


class Other:
    def __init__(self, colour, **kwargs):
        pass


class TwoBases(Passes, Other):
    def __init__(self, **kwargs):
        Other.__init__(self, **kwargs)


def a_function(width):
    pass


class ClosedAgain(Passes):
    def __init__(self, height):
        super().__init__(height=height, width=1)


@pytest.mark.parametrize(
    ('cls', 'names', 'open_ended'),
    [
        (Closed, {'width', 'depth'}, False),
        (Passes, {'height', 'width', 'depth'}, True),
        (Inherits, {'height', 'width', 'depth'}, True),
        (TwoBases, {'height', 'width', 'depth', 'colour'}, True),
        (ClosedAgain, {'height'}, False),
        (a_function, {'width'}, False),
    ],
)
def test_accepted_keys(cls, names, open_ended):
    assert accepted_keys(cls) == (names, open_ended)


def test_accepted_keys_of_upstreams_chains():
    from mmdet.models.dense_heads import RPNHead
    from mmseg.models.decode_heads import UPerHead

    names, _ = accepted_keys(RPNHead)
    assert {'num_convs', 'anchor_generator', 'feat_channels', 'init_cfg'} <= names
    names, _ = accepted_keys(UPerHead)
    assert {'pool_scales', 'in_channels', 'dropout_ratio', 'norm_cfg'} <= names
    assert 'pool_scale' not in names


@pytest.mark.parametrize('path', RECIPES, ids=[path.stem for path in RECIPES])
def test_our_configs_pass(path):
    cfg = load_config(str(path))
    assert cfg.work_dir == f'work_dirs/{path.stem}'
    assert cfg.runner_type == 'DensekitRunner'


@pytest.mark.parametrize(
    ('config', 'option', 'said'),
    [
        (MASK_RCNN, 'model.backbone.drop_path_rat=0.3', r'backbone\.drop_path_rat: did you mean drop_path_rate\?'),
        (MASK_RCNN, 'model.backbone.colour=red', r'model\.backbone\.colour: ConvNeXt takes act_cfg, arch, '),
        (MASK_RCNN, 'model.test_cfg.rcnn.max_per_imgg=5', r'max_per_imgg\. Did you mean max_per_img\?'),
        (MASK_RCNN, 'model.train_cfg.rcnn.sampler.numm=5', r'sampler\.numm: did you mean num\?'),
        (CASCADE, 'model.roi_head.bbox_head.1.num_clases=5', r'bbox_head\.1\.num_clases: did you mean num_classes\?'),
        (CASCADE, 'model.roi_head.bbox_head.3.num_classes=5', r'model\.roi_head\.bbox_head is a list of 3 entries'),
        (MASK_RCNN, 'model.backbnoe.arch=small', r'model\.backbnoe: did you mean backbone\?'),
        (UPERNET, 'model.decode_head.dropout_rate=0', r'decode_head\.dropout_rate: did you mean dropout_ratio\?'),
        (UPERNET, 'model.test_cfg.crop_siz=(64,64)', r'model\.test_cfg\.crop_siz\. Did you mean crop_size\?'),
        (UPERNET, 'train_dataloder.batch_size=2', r'no train_dataloder\. Did you mean train_dataloader\?'),
        (UPERNET, 'train_dataloader.bath_size=2', r'no train_dataloader\.bath_size\. Did you mean batch_size\?'),
        (UPERNET, 'train_cfg.max_iter=2', r'train_cfg\.max_iter: did you mean max_iters\?'),
        (UPERNET, 'val_evaluator.iou_metric=mIoU', r'val_evaluator\.iou_metric: did you mean iou_metrics\?'),
        (UPERNET, 'default_hooks.checkpoint.intervall=9', r'checkpoint\.intervall: did you mean interval\?'),
        (UPERNET, 'param_scheduler.0.start_facto=1', r'param_scheduler\.0\.start_facto: did you mean start_factor\?'),
        (UPERNET, 'optim_wrapper.clip_grads=None', r'optim_wrapper\.clip_grads: did you mean clip_grad\?'),
        (UPERNET, 'optim_wrapper.optimizer.type=AdamWW', r'there is no optimizer AdamWW\. Did you mean AdamW\?'),
        (UPERNET, 'something=1', r'--cfg-options something: the config has no something'),
        (UPERNET, 'log_level.x=1', r'--cfg-options cannot be applied'),
        (UPERNET, 'model.backbone.arch', r"'model\.backbone\.arch' is no key=value"),
        (UPERNET, '=3', r"'=3' is no key=value"),
    ],
)  # fmt: skip
def test_a_misspelt_option_is_an_error(config, option, said):
    with pytest.raises(ValueError, match=said):
        load_config(config, [option])


def test_options_that_are_right():
    options = ['model.backbone.arch=small', 'model.test_cfg.rcnn.score_thr=0.1', 'train_dataloader.batch_size=4']
    options += ['find_unused_parameters=True', 'model.backbone.with_cp=True', 'custom_hooks=[dict(type=EMAHook)]']
    options += ['optim_wrapper.accumulative_counts=2', 'randomness.seed=1', 'env_cfg.dist_cfg.timeout=60']
    cfg = load_config(MASK_RCNN, options[:-4] + options[-3:])
    assert cfg.model.backbone.arch == 'small'
    assert cfg.model.backbone.with_cp is True
    assert cfg.model.test_cfg.rcnn.score_thr == 0.1
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.optim_wrapper.accumulative_counts == 2


def test_the_values_of_options():
    texts = ['a=1', 'b=0.5', 'c=word', 'd=[1,2]', 'e=(1,2)', 'f=True', 'g=None', 'h=k=v']
    assert parse_options(texts) == dict(a=1, b=0.5, c='word', d=[1, 2], e=(1, 2), f=True, g=None, h='k=v')


def config_file(folder, text, base=UPERNET):
    path = folder / 'mine.py'
    path.write_text(f"_base_ = '{base}'\n{text}\n")
    return str(path)


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('model = dict(backbone=dict(drop_path_rat=0.3))', r'drop_path_rat: did you mean drop_path_rate\?'),
        ('model = dict(test_cfg=dict(crop_siz=(64, 64)))', r'model\.test_cfg\.crop_siz: did you mean crop_size\?'),
        ('optim_wraper = dict(clip_grad=None)', r'optim_wraper, which nothing reads\. Did you mean optim_wrapper\?'),
        ('test_dataloader = dict(dataset=dict(data_rot=1))', r'dataset\.data_rot: did you mean data_root\?'),
        ('model = = 3', r'a mistake in line 2: invalid syntax: model = = 3'),
        ('model = modle', r"mine\.py, line 2: NameError: name 'modle' is not defined"),
        ('custom_imports = dict(imports=["not_there"])', r'Failed to import custom modules .*not_there'),
    ],
)
def test_a_mistake_in_a_file_is_an_error(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        load_config(config_file(tmp_path, text))


def test_all_misspelt_keys_are_named_at_once(tmp_path):
    text = 'model = dict(backbone=dict(drop_path_rat=0.3), decode_head=dict(channel=1))'
    with pytest.raises(ValueError, match=r'drop_path_rat: .*\n  model\.decode_head\.channel: '):
        load_config(config_file(tmp_path, text))


def test_variables_of_a_users_own_are_left_alone(tmp_path):
    path = config_file(tmp_path, "my_pipeline = []\nbatch_size = 3\ntest_pipelines = ['a']\nmodels = 1")
    assert load_config(path).batch_size == 3


def test_a_file_that_is_missing_or_no_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nearest names are looked for in configs/ as well
    with pytest.raises(
        FileNotFoundError, match=r'cascade_convnxt_t_coco\.py does not exist\. Did you mean .*cascade_con'
    ):
        load_config(CASCADE.replace('convnext', 'convnxt'))
    with pytest.raises(FileNotFoundError, match=r'does not exist\. Configs lie in configs/detection'):
        load_config(str(tmp_path / 'nothing/cascade.py'))
    with pytest.raises(ValueError, match=r'nothing\.py, which it names, does not exist'):
        load_config(config_file(tmp_path, '', base='nothing.py'))
    (tmp_path / 'no_model.py').write_text('a = 1\n')
    with pytest.raises(ValueError, match='without a model'):
        load_config(str(tmp_path / 'no_model.py'))
    (tmp_path / 'config.yaml').write_text('model: !!python/object/apply:os.getcwd []\n')
    with pytest.raises(ValueError, match=r'config\.yaml is no \.py file'):  # mmengine reads YAML unsafely
        load_config(str(tmp_path / 'config.yaml'))


@pytest.mark.parametrize(
    ('config', 'option', 'message'),
    [
        (
            'detection/mask_rcnn_convnext_t_coco.py',
            'model.test_cfg.rcnn.max_det=5',
            r'test_cfg\.rcnn\.max_det: allowed',
        ),
        (
            'detection/mask_rcnn_convnext_t_coco.py',
            'model.test_cfg.rcnn.score_threshold=0.1',
            r'Did you mean score_thr',
        ),
        (
            'detection/mask_rcnn_convnext_t_coco.py',
            'model.test_cfg.rcnn.nms.iou_treshold=0.1',
            r'nms\.iou_treshold: all',
        ),
        ('detection/cascade_convnext_t_coco.py', 'model.train_cfg.rcnn.1.masksize=14', r'Did you mean mask_size'),
        (
            'segmentation/upernet_convnext_t_ade20k.py',
            'model.test_cfg.window=512',
            r'test_cfg\.window: allowed are crop',
        ),
        ('detection/mask_rcnn_convnext_t_coco.py', 'auto_scale_lr.enabel=True', r'enabel'),
        (
            'detection/cascade_convnext_t_coco.py',
            'data_root=/big/coco/',
            r'variable.*set train_dataloader\.dataset\.data_root',
        ),
        ('detection/cascade_convnext_t_coco.py', 'max_epochs=12', r'variable.*set train_cfg\.max_epochs'),
        (
            'detection/cascade_convnext_t_coco.py',
            'num_classes=3',
            r'variable.*set model\.roi_head\.bbox_head\.0\.num_classes',
        ),
    ],
)
def test_options_that_nothing_would_read(config, option, message):
    with pytest.raises(ValueError, match=message):
        load_config(f'configs/{config}', [option])


BATCHED = 'model.type=BatchedSlideEncoderDecoder'


@pytest.mark.parametrize(
    ('config', 'options', 'said'),
    [
        (
            UPERNET,
            ['model.type=EncoderDecoder'],
            r'window_batch: EncoderDecoder computes windows one by one; with model\.type=BatchedSlide',
        ),
        (UPERNET, ['model.type=CascadeEncoderDecoder'], r'window_batch: CascadeEncoderDecoder computes windows one by'),
        (MASK_RCNN, [], r'window_batch: MaskRCNN computes windows one by one'),
        (UPERNET, [BATCHED, 'model.test_cfg.mode=whole'], r"window_batch: there are windows with .*mode='slide' only"),
        (UPERNET, [BATCHED, 'model.test_cfg.stride_=8'], r'Did you mean stride'),
    ],
)
def test_batches_of_windows_that_nothing_would_compute(config, options, said):
    with pytest.raises(ValueError, match=said):
        load_config(config, [*options, 'model.test_cfg.window_batch=4'])


def test_batches_of_windows(tmp_path):
    """Also in a class of a user's own that is derived from ours."""
    (tmp_path / 'my_segmentor.py').write_text(
        'from mmengine.registry import MODELS\nfrom densekit.models.slide import BatchedSlideEncoderDecoder\n'
        '@MODELS.register_module(force=True)\nclass MySegmentor(BatchedSlideEncoderDecoder):\n    pass\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        __import__('my_segmentor')
    for kind in ('BatchedSlideEncoderDecoder', 'MySegmentor'):
        load_config(UPERNET, [f'model.type={kind}', 'model.test_cfg.window_batch=4'])
    with pytest.raises(ValueError, match=r'test_cfg\.stride_size: allowed are crop_size, .*window_batch'):
        load_config(
            config_file(tmp_path, "model = dict(type='BatchedSlideEncoderDecoder', test_cfg=dict(stride_size=8))")
        )


@pytest.mark.parametrize('name', ['modle', 'train_cgf', 'load_form', 'auto_scal_lr'])
def test_misspelt_top_level_names(tmp_path, name):
    base = Path('configs/detection/mask_rcnn_convnext_mini_shapes.py').resolve()
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {str(base)!r}\n{name} = dict(a=1)\n')
    with pytest.raises(ValueError, match=f'{name}, which nothing reads'):
        load_config(str(path))


def test_a_part_of_recipes_is_no_recipe():
    with pytest.raises(ValueError, match='a part of recipes'):
        load_config('configs/_base_/models/upernet.py')
