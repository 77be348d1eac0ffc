"""Real photographs, where DENSEKIT_SAMPLES names the folder that holds them (see CONTRIBUTING.md)."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from recipes import CONFIGS, build_model, build_wrapper, losses_of, recipe, scope_of

SAMPLES = os.environ.get('DENSEKIT_SAMPLES')
pytestmark = pytest.mark.skipif(not SAMPLES, reason='DENSEKIT_SAMPLES names no folder of sample photographs')

COCO = dict(
    data_root=f'{SAMPLES}/coco_val2017_sample/',
    ann_file='annotations/instances_val2017.json',
    data_prefix=dict(img='val2017/'),
)
ADE20K = dict(
    data_root=f'{SAMPLES}/ade20k_val_sample',
    data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
)
RECIPES = [
    ('detection/mask_rcnn_convnext_t_coco.py', COCO, 2),
    ('detection/cascade_convnext_t_coco.py', COCO, 2),
    ('segmentation/upernet_convnext_t_ade20k.py', ADE20K, 3),
]


def dataset_of(cfg, loader, where):
    dataset = cfg[loader].dataset
    dataset.update(where)
    with scope_of(cfg):
        return DATASETS.build(dataset)


@pytest.mark.parametrize(('path', 'where', 'number'), RECIPES)
def test_a_recipe_loads_its_data(path, where, number):
    cfg = recipe(CONFIGS / path)
    for loader in ('train_dataloader', 'test_dataloader'):
        dataset = dataset_of(cfg, loader, where)
        assert len(dataset) == number
        sample = dataset[0]
        assert sample['inputs'].dtype == torch.uint8
        assert sample['inputs'].shape[1:] == sample['data_samples'].img_shape[:2]
    if 'ann_file' in where:  # the test pipeline: the short side becomes 800, or the long one 1333
        assert 800 in sample['inputs'].shape or 1333 in sample['inputs'].shape
        truth = [dataset[i]['data_samples'].gt_instances for i in range(number)]
        content = json.loads(Path(where['data_root'], where['ann_file']).read_text())
        assert sum(map(len, truth)) == sum(not annotation['iscrowd'] for annotation in content['annotations'])
    else:
        labels = sample['data_samples'].gt_sem_seg.data.unique().tolist()
        assert set(labels) <= {*range(150), 255}
        assert sample['data_samples'].gt_sem_seg.shape == sample['data_samples'].ori_shape  # scored at this size


@pytest.mark.parametrize(('path', 'where', 'number'), [RECIPES[0], RECIPES[2]])
def test_a_recipe_takes_a_step(path, where, number):
    torch.manual_seed(0)
    cfg = recipe(CONFIGS / path)
    dataset = dataset_of(cfg, 'train_dataloader', where)
    model = build_model(cfg, 'cpu').train()
    wrapper = build_wrapper(cfg, model, 'off')
    batch = pseudo_collate([dataset[i] for i in range(1 if 'ann_file' in where else 2)])
    losses = losses_of(model, wrapper, batch)
    before = model.backbone.downsample_layers[0][0].weight.detach().clone()
    wrapper.step()
    assert all(math.isfinite(value) for value in losses.values())
    assert not torch.equal(before, model.backbone.downsample_layers[0][0].weight)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ('config', 'metric', 'bar'),
    [
        ('overfit_mask_rcnn.py', 'coco/bbox_mAP_50', 0.9),
        ('overfit_upernet.py', 'mIoU', 90),
    ],
)
def test_photographs_are_learned_by_heart(config, metric, bar, command, tmp_path):
    """As processes, with the thread settings of the tools; benchmarks/overfit_photos.md has what was measured."""
    path = Path(__file__).with_name(config)
    tools = Path(__file__).parents[2] / 'tools'
    threads = dict(OMP_NUM_THREADS=str(os.cpu_count()))
    trained = command(tools / 'train.py', path, '--work-dir', tmp_path / 'run', **threads)
    assert trained.returncode == 0, trained.stderr
    checkpoint = max((tmp_path / 'run').glob('iter_*.pth'))
    tested = command(
        tools / 'test.py', path, checkpoint, '--work-dir', tmp_path / 'run', '--out', tmp_path / 'scores.json'
    )
    assert tested.returncode == 0, tested.stderr
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert scores[metric] >= bar, scores
