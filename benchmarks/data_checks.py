"""Time and memory of tools/check_data.py on sets as large as COCO's train2017 and ADE20K, which this script makes.

    python benchmarks/data_checks.py FOLDER

118,287 images of 640 x 480 and 480 x 640 pixels (names of four files), 860,001 boxes of 80 classes in polygons of as
many coordinates as make the annotation file as large as COCO's, 1 % of them crowds in run lengths. 20,210 images
of 683 x 512 pixels with label maps of 150 classes. FOLDER takes 0.5 GB.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

import densekit.ops  # noqa: F401

# isort: split
from mmdet.datasets import CocoDataset

ROOT = Path(__file__).resolve().parents[1]
IMAGES, BOXES = 118_287, 860_001
LABEL_MAPS = 20_210
NO_OTHER_LOOPS = """
val_dataloader = None
val_cfg = None
val_evaluator = None
test_dataloader = None
test_cfg = None
test_evaluator = None
"""
COCO_CONFIG = """
_base_ = '{root}/configs/detection/mask_rcnn_convnext_t_coco.py'
data_root = '{folder}/'
train_dataloader = dict(dataset=dict(data_root=data_root, ann_file='train.json', data_prefix=dict(img='train/')))
"""
ADE_CONFIG = """
_base_ = '{root}/configs/segmentation/upernet_convnext_t_ade20k.py'
prefix = dict(img_path='images', seg_map_path='maps')
train_dataloader = dict(dataset=dict(data_root='{folder}', data_prefix=prefix))
"""


def make_images(folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Names of a few photographs of noise; a file system takes no more than 65,000 names of one file."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    masters: dict[tuple, str] = {}
    for number, size in enumerate(sizes):
        path = folder / f'{number + 1:012d}.jpg'
        key = (size, number // 50_000)
        if key in masters:
            os.link(masters[key], path)
            continue
        small = noise.integers(0, 256, (size[1] // 16, size[0] // 16, 3), np.uint8)
        Image.fromarray(small).resize(size).save(path, quality=90)
        masters[key] = str(path)


def annotation(number: int, image: int, size: tuple[int, int], crowd: bool, random: np.random.Generator) -> dict:
    side = random.uniform(8, 200, 2)
    low = random.uniform(0, 1, 2) * (np.array(size) - side)
    box = [round(float(v), 2) for v in (*low, *side)]
    entry = {'id': number, 'image_id': image, 'category_id': int(random.integers(1, 81)), 'bbox': box}
    entry |= {'area': round(box[2] * box[3] / 2, 4), 'iscrowd': 0}
    if crowd:
        height, width = size[1], size[0]
        entry |= {'iscrowd': 1, 'segmentation': {'counts': [height * width - 1000, 1000], 'size': [height, width]}}
    else:
        points = np.round(random.uniform(0, 1, (int(random.gamma(2, 12.5)) + 3, 2)) * side + low, 2)
        entry['segmentation'] = [points.ravel().tolist()]
    return entry


def make(folder: Path, images: int) -> None:
    random = np.random.default_rng(0)
    sizes = [(640, 480) if flip else (480, 640) for flip in random.random(images) < 0.7]
    make_images(folder / 'train', sizes)
    counts = random.multinomial(BOXES, np.full(images, 1 / images))
    entries = [
        {'id': i + 1, 'file_name': f'{i + 1:012d}.jpg', 'width': width, 'height': height}
        for i, (width, height) in enumerate(sizes)
    ]
    with open(folder / 'train.json', 'w', encoding='utf-8') as file:
        names = CocoDataset.METAINFO['classes']
        categories = [{'id': i + 1, 'name': name} for i, name in enumerate(names)]
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        number = 0
        for image, count in enumerate(counts):
            for i in range(count):
                number += 1
                entry = annotation(number, image + 1, sizes[image], i > 0 and number % 100 == 0, random)
                file.write((', ' if number > 1 else '') + json.dumps(entry))
        file.write(']}')


def make_label_maps(folder: Path, count: int) -> None:
    make_images(folder / 'images', [(683, 512)] * count)
    (folder / 'maps').mkdir()
    coarse = np.random.default_rng(0).integers(0, 151, (16, 21), np.uint8)
    master = folder / 'master.png'
    Image.fromarray(coarse).resize((683, 512), Image.Resampling.NEAREST).save(master)
    for i in range(count):
        os.link(master, folder / 'maps' / f'{i + 1:012d}.png')


def measure(config: Path, *options: str) -> None:
    """Runs the tool, and says what it took; the peak is that of the largest run until then."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, str(ROOT / 'tools/check_data.py'), str(config), *options]
    done = subprocess.run(command, check=False)
    after, took = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = f'{config.name} {" ".join(options)}: status {done.returncode}, {took:.1f} s, {cpu:.1f} s of processor time'
    print(f'{told}, {after.ru_maxrss / 2**20:.2f} GB', flush=True)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    if not folder.exists():
        make(folder / 'coco', IMAGES)
        make_label_maps(folder / 'ade', LABEL_MAPS)
    for name, text in (('ade', ADE_CONFIG), ('coco', COCO_CONFIG)):
        (folder / f'{name}.py').write_text(text.format(root=ROOT, folder=folder / name) + NO_OTHER_LOOPS)
    print(f'{(folder / "coco/train.json").stat().st_size / 1e6:.0f} MB of annotations', flush=True)
    for options in ([], ['--headers']):
        measure(folder / 'ade.py', *options)
    for options in ([], ['--headers']):
        measure(folder / 'coco.py', *options)


if __name__ == '__main__':
    main()
