"""From a mask head's output to COCO's table: densekit against mmdet's head and metric, on a CPU.

    python benchmarks/scoring.py                  # 200 images, both, in turn
    python benchmarks/scoring.py --images 5000 --who ours --rounds 1
    python benchmarks/scoring.py --engines        # pycocotools against hotcoco on what was found in 1000 images

Images are generated: 0 to 14 objects of COCO's sizes each, 100 detections of them with 80 classes of 28 x 28 masks.
Each measurement has a process of its own; making the images is not counted. scoring.md has what was measured.
"""

import argparse
import contextlib
import io
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 80
DETECTIONS = 100
MEGABYTE = 1_000_000


def kilobytes_at_most() -> int:
    """The most memory that this process has had."""
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])


def random_boxes(rng: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    """About 40 % smaller than 32 x 32, a quarter larger than 96 x 96, as in COCO."""
    side = np.exp(rng.normal(np.log(45), 1.1, (n, 1)))
    aspect = np.exp(rng.normal(0, 0.4, (n, 1)))
    half = np.clip(np.concatenate([side * aspect, side / aspect], axis=1), 4, (width, height)) / 2
    centre = half + rng.random((n, 2)) * ((width, height) - 2 * half)
    return np.concatenate([centre - half, centre + half], axis=1)


def truth_of(image: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and labels of the objects."""
    rng = np.random.default_rng([1, image])
    number = int(rng.integers(0, 15))
    return random_boxes(rng, number, height, width), rng.integers(0, CLASSES, number)


def annotations(images: int, height: int, width: int) -> dict[str, Any]:
    """A COCO file of ellipses."""
    from pycocotools import mask as coco_mask

    found: dict[str, Any] = {
        'images': [{'id': i, 'height': height, 'width': width, 'file_name': f'{i}.jpg'} for i in range(images)],
        'categories': [{'id': i + 1, 'name': f'class{i}'} for i in range(CLASSES)],
        'annotations': [],
    }
    turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(turns), np.sin(turns)], axis=1) / 2 + 0.5
    for i in range(images):
        for (x1, y1, x2, y2), label in zip(*truth_of(i, height, width), strict=True):
            outline = [(circle * (x2 - x1, y2 - y1) + (x1, y1)).ravel().round(2).tolist()]
            area = float(coco_mask.area(coco_mask.frPyObjects(outline, height, width))[0])
            found['annotations'].append(
                {
                    'id': len(found['annotations']) + 1,
                    'image_id': i,
                    'category_id': int(label) + 1,
                    'bbox': [x1, y1, x2 - x1, y2 - y1],
                    'area': area,
                    'iscrowd': 0,
                    'segmentation': outline,
                }
            )
    return found


class Network:
    """Stands for a detector: objects found several times, and others that are not there."""

    def __init__(self, height: int, width: int) -> None:
        import torch

        self.size = height, width
        self.logits = torch.randn(DETECTIONS, CLASSES, 28, 28, generator=torch.Generator().manual_seed(0)) - 3
        y, x = np.mgrid[:28, :28] / 27 * 2 - 1
        self.ellipse = 6 * (1 - x**2 - y**2)

    def __call__(self, image: int) -> tuple[Any, Any]:
        import torch
        from mmengine.structures import InstanceData

        rng = np.random.default_rng([2, image])
        boxes, labels = truth_of(image, *self.size)
        chosen = rng.integers(0, max(len(boxes), 1), 3 * len(boxes))
        moved = boxes[chosen]
        moved += 0.06 * rng.uniform(-1, 1, moved.shape) * np.tile(moved[:, 2:] - moved[:, :2], 2)
        others = DETECTIONS - len(moved)
        boxes = np.concatenate([moved, random_boxes(rng, others, *self.size)])
        boxes = np.clip(boxes, 0, (self.size[1], self.size[0]) * 2)
        labels = np.concatenate([labels[chosen], rng.integers(0, CLASSES, others)])
        scores = np.concatenate([rng.uniform(0.3, 1, len(moved)), rng.uniform(0.05, 0.5, others)])
        wobble = rng.normal(size=(DETECTIONS, 7, 7)).repeat(4, axis=1).repeat(4, axis=2)
        self.logits[np.arange(DETECTIONS), labels] = torch.tensor(self.ellipse + 1.5 * wobble, dtype=torch.float32)
        found = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            scores=torch.tensor(scores, dtype=torch.float32),
            labels=torch.tensor(labels),
        )
        return found, self.logits


def score_once(who: str, images: int, size: tuple[int, int], file: str) -> dict[str, Any]:
    """All images by one of the two, after five to warm up."""
    import densekit.ops  # noqa: F401

    # isort: split
    from mmdet.evaluation import CocoMetric
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmengine.config import ConfigDict

    from densekit.evaluation.coco import FastCocoMetric
    from densekit.models.mask_head import RleMaskHead

    logging.disable(logging.INFO)
    head = FCNMaskHead(num_convs=0) if who == 'mmdet' else RleMaskHead(num_convs=0)
    head.run_lengths = True
    metric = (CocoMetric if who == 'mmdet' else FastCocoMetric)(
        ann_file=file, metric=['bbox', 'segm'], proposal_nums=(1, 10, 100)
    )
    metric.dataset_meta = {'classes': [f'class{i}' for i in range(CLASSES)]}
    network, cfg = Network(*size), ConfigDict(mask_thr_binary=0.5)
    meta = {'scale_factor': (1.0, 1.0), 'ori_shape': size}

    def look(image: int) -> None:
        head.predict_by_feat((logits,), [found], [meta], cfg, rescale=True)
        metric.process({}, [{'img_id': image, 'ori_shape': size, 'pred_instances': found}])

    for image in range(5):
        found, logits = network(image)
        look(image)
    metric.results.clear()
    before = kilobytes_at_most()
    seconds = processor = 0.0
    for image in range(images):
        found, logits = network(image)
        start, busy = time.perf_counter(), time.process_time()
        look(image)
        seconds, processor = seconds + time.perf_counter() - start, processor + time.process_time() - busy
    start, busy = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = metric.evaluate(images)
    table = time.perf_counter() - start
    return {
        'paste and encode, s an image': seconds / images,
        'table, s an image': table / images,
        'in all, s an image': (seconds + table) / images,
        'processor, s an image': (processor + time.process_time() - busy) / images,
        'memory, MB': (kilobytes_at_most() - before) * 1024 / MEGABYTE,
        'most memory, MB': kilobytes_at_most() * 1024 / MEGABYTE,
        'box AP': round(metrics['coco/bbox_mAP'], 3),
        'mask AP': round(metrics['coco/segm_mAP'], 3),
    }


def compare_engines(images: int, size: tuple[int, int], file: str) -> None:
    """Evaluation alone, in turn, three times; the arrays have to be equal."""
    import densekit.ops  # noqa: F401

    # isort: split
    from mmengine.config import ConfigDict

    from densekit.evaluation import coco_engine
    from densekit.evaluation.coco import FastCocoMetric
    from densekit.models.mask_head import RleMaskHead

    head = RleMaskHead(num_convs=0)
    head.run_lengths = True
    network, cfg, found = Network(*size), ConfigDict(mask_thr_binary=0.5), []
    meta = {'scale_factor': (1.0, 1.0), 'ori_shape': size}
    metric = FastCocoMetric(proposal_nums=(1, 10, 100))
    for image in range(images):
        result, logits = network(image)
        head.predict_by_feat((logits,), [result], [meta], cfg, rescale=True)
        part = {'img_id': image, 'masks': result.masks.rles}
        found.append(part | {key: result[key].numpy() for key in ('bboxes', 'scores', 'labels')})
    ids = list(range(1, CLASSES + 1))
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(3):
        arrays = {}
        for engine in coco_engine.ENGINES:
            truth = coco_engine.load(file, engine)
            for kind in ('box', 'mask'):
                start = time.perf_counter()
                columns = coco_engine.columns(found, ids, masks=kind == 'mask')
                arrays[engine, kind] = coco_engine.score(
                    truth,
                    columns,
                    category_ids=ids,
                    image_ids=list(range(images)),
                    limits=metric.limits,
                    thresholds=metric.iou_thrs,
                )
                times.setdefault((engine, kind), []).append(time.perf_counter() - start)
        for kind in ('box', 'mask'):
            assert all(map(np.array_equal, arrays['hotcoco', kind], arrays['pycocotools', kind]))
    for (engine, kind), values in times.items():
        print(f'{engine}, {kind}: median {statistics.median(values):.3f} s ({", ".join(f"{v:.3f}" for v in values)})')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=200)
    parser.add_argument('--size', type=int, nargs=2, default=(480, 640), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--who', choices=['mmdet', 'ours'], help='one of them; default both in turn')
    parser.add_argument('--engines', action='store_true')
    parser.add_argument('--once', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(score_once(args.who, args.images, tuple(args.size), args.once)))
        return
    with tempfile.TemporaryDirectory() as folder:
        images = 1000 if args.engines else args.images
        file = Path(folder, 'truth.json')
        file.write_text(json.dumps(annotations(images, *args.size)))
        if args.engines:
            compare_engines(images, tuple(args.size), str(file))
            return
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(args.rounds):
            for who in [args.who] if args.who else ['mmdet', 'ours']:
                size = map(str, args.size)
                command = [sys.executable, __file__, '--once', str(file), '--who', who, '--images', str(images)]
                done = subprocess.run([*command, '--size', *size], check=True, stdout=subprocess.PIPE, text=True)
                found.setdefault(who, []).append(json.loads(done.stdout.splitlines()[-1]))
    for who, rounds in found.items():
        for name in rounds[0]:
            values = [part[name] for part in rounds]
            shown = ', '.join(f'{value:.4g}' for value in values)
            print(f'{who}: {name}: median {statistics.median(values):.4g} ({shown})')


if __name__ == '__main__':
    main()
