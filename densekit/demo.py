"""From nothing to a trained, evaluated and pictured detector and segmentor: ``make demo``.

Runs the tools as a user would, on generated data, without a GPU. Results go to work_dirs/demo. Given two cores or more,
the two models train side by side, on half of the cores each: small models make poor use of several threads.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

OUT = Path('work_dirs/demo')
DETECTION = 'configs/detection/mask_rcnn_convnext_mini_shapes.py'
SEGMENTATION = 'configs/segmentation/upernet_convnext_mini_shapes.py'
NUM_PICTURED = 5


def main() -> int:
    """Runs the demo from the folder of a checkout.

    Returns:
        0, or 1 if a step failed.
    """
    if not Path(DETECTION).is_file():
        print('error: run the demo from the folder of the densekit checkout, where configs/ lies')
        return 1
    started = time.monotonic()
    side_by_side = _cores() > 1
    threads = max(_cores() // 2, 1)
    where = f'side by side, {threads} of {_cores()} cores each' if side_by_side else 'one after the other'
    print(f'\n== Mask R-CNN and UperNet on the same generated shapes, {where}', flush=True)
    running: list[subprocess.Popen] = []
    try:
        _all(
            [
                lambda: _train_and_test('detection', DETECTION, threads, running),
                lambda: _train_and_test('segmentation', SEGMENTATION, threads, running),
            ],
            side_by_side,
            running,
        )
    except subprocess.CalledProcessError as error:
        print(
            f'\nerror: {" ".join(error.cmd)} ended with status {error.returncode}; its output is in {_log(error.cmd)}'
        )
        return 1
    minutes = (time.monotonic() - started) / 60
    from densekit.report.curves import plot_curves

    predictions, curves = OUT / 'predictions.png', OUT / 'curves.png'
    _draw_predictions(predictions)
    plot_curves({task: OUT / task for task in ('detection', 'segmentation')}, curves)
    print(f'\n== Results on 100 held-out images, after {minutes:.1f} minutes\n{_table()}\n')
    print(f'predictions  {predictions}\ncurves       {curves}')
    return 0


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _all(jobs: Sequence[Callable[[], None]], side_by_side: bool, running: list[subprocess.Popen]) -> None:
    """Does all jobs; when one fails, ends what the others run and raises its error."""
    if not side_by_side:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            if future.exception() is not None:
                for process in running:
                    process.terminate()
                future.result()


def _train_and_test(task: str, config: str, threads: int, running: list[subprocess.Popen]) -> None:
    work_dir = str(OUT / task)
    _run(running, task, threads, 'tools/train.py', config, '--work-dir', work_dir)
    checkpoint = (OUT / task / 'last_checkpoint').read_text().strip()
    out = str(_metrics_file(task))
    _run(running, task, threads, 'tools/test.py', config, checkpoint, '--work-dir', work_dir, '--out', out)


def _run(running: list[subprocess.Popen], task: str, threads: int, tool: str, *arguments: str) -> None:
    """Runs a tool, keeps all of its output in a file and shows the lines that matter."""
    command = [sys.executable, tool, *arguments]
    _say(task, '$ python ' + ' '.join(command[1:]))
    log = _log(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open('w', encoding='utf-8') as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_env(threads)
        ) as process,
    ):
        running.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            shown = _shown(line)
            if shown:
                _say(task, shown)
    running.remove(process)
    _check_status(command, process.returncode)


def _say(task: str, text: str) -> None:
    print(f'{task:<12}  {text}\n', end='', flush=True)  # in one piece: two threads write


def _check_status(command: list[str], status: int) -> None:
    if status:
        raise subprocess.CalledProcessError(status, command)


def _env(threads: int) -> dict[str, str]:
    return {'OMP_NUM_THREADS': str(threads), **os.environ, 'PYTHONUNBUFFERED': '1'}


def _log(command: list[str]) -> Path:
    work_dir = command[command.index('--work-dir') + 1]
    return Path(work_dir, Path(command[1]).stem + '.log')


def _shown(line: str) -> str | None:
    """The part of a log line worth showing: progress every 50 iterations, and metrics."""
    train = re.search(r'Iter\(train\) \[\s*(\d+)/(\d+)\].*?eta: ([\d:]+).*?loss: ([\d.]+)', line)
    if train:
        return (
            f'iteration {train[1]:>4} of {train[2]}  loss {train[4]}  eta {train[3]}'
            if int(train[1]) % 50 == 0
            else None
        )
    box = re.search(r'bbox_mAP: ([\d.]+).*segm_mAP: ([\d.]+)', line)
    if box:
        return f'validation: box mAP {box[1]}, mask mAP {box[2]}'
    iou = re.search(r'mIoU: ([\d.]+)', line)
    return f'validation: mIoU {iou[1]} %' if iou else None


def _metrics_file(task: str) -> Path:
    return OUT / task / 'metrics.json'


def _table() -> str:
    from densekit.report.tables import metrics_table

    metrics: dict[str, float] = {}
    for task in ('detection', 'segmentation'):
        metrics.update(json.loads(_metrics_file(task).read_text(encoding='utf-8')))
    return metrics_table(metrics)


def _draw_predictions(out: Path) -> None:
    """Four columns: the truth and the prediction of the detector, then of the segmentor, on the same images."""
    from mmengine.config import Config
    from pycocotools.coco import COCO

    from densekit.predictor import Predictor, draw
    from densekit.report.pictures import comparison_sheet, read_image, save_png

    data_root = Path(Config.fromfile(DETECTION).data_root)
    detector = Predictor(DETECTION, (OUT / 'detection' / 'last_checkpoint').read_text().strip())
    segmentor = Predictor(SEGMENTATION, (OUT / 'segmentation' / 'last_checkpoint').read_text().strip())
    coco = COCO(data_root / 'coco/annotations/instances_val.json')
    rows = []
    for image_id in coco.getImgIds()[:NUM_PICTURED]:
        name = coco.loadImgs(image_id)[0]['file_name']
        image = read_image(data_root / 'coco/val' / name)
        rows.append(
            [
                _true_instances(image, coco, image_id, detector),
                draw(image, detector(image), detector, 0.5),
                _true_labels(image, data_root, image_id, segmentor),
                draw(image, segmentor(image), segmentor, 0.5),
            ]
        )
    titles = ['objects: truth', 'Mask R-CNN', 'classes: truth', 'UperNet']
    save_png(out, comparison_sheet(rows, titles))


def _true_instances(image: Any, coco: Any, image_id: int, detector: Any) -> Any:
    import numpy as np

    from densekit.report.pictures import draw_instances

    found = coco.loadAnns(coco.getAnnIds(image_id))
    corners = [(x, y, x + w, y + h) for x, y, w, h in (a['bbox'] for a in found)]
    labels = [detector.classes.index(coco.loadCats(a['category_id'])[0]['name']) for a in found]
    masks = [coco.annToMask(a).astype(bool) for a in found]
    return draw_instances(
        image,
        boxes=np.array(corners, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        masks=np.array(masks, bool).reshape(-1, *image.shape[:2]),
        ignored=np.array([bool(a['iscrowd']) for a in found], bool),
        classes=detector.classes,
        palette=detector.palette,
    )


def _true_labels(image: Any, data_root: Path, image_id: int, segmentor: Any) -> Any:
    import numpy as np
    from PIL import Image

    from densekit.report.pictures import draw_label_map

    path = data_root / 'ade/annotations/validation' / f'ADE_val_{image_id:08d}.png'
    labels = np.array(Image.open(path)).astype(np.int64)
    shifted = np.where(labels == 0, 255, labels - 1)  # 0 is ignored
    return draw_label_map(image, shifted, classes=segmentor.classes, palette=segmentor.palette)


if __name__ == '__main__':
    sys.exit(main())
