"""Files of what a model found, as the test servers of COCO and ADE20K take them."""

from pathlib import Path

from mmengine.config import Config

from densekit.cli import check_writable

# What a metric calls the place of its files; COCO's is the path of a file but for its end.
PLACES = {
    'CocoMetric': 'outfile_prefix',
    'FastCocoMetric': 'outfile_prefix',
    'IoUMetric': 'output_dir',
    'ExactIoUMetric': 'output_dir',
}


def write_results(cfg: Config, results: str | None, format_only: str | None) -> None:
    """Has the metrics of a test write files.

    For COCO these are ``results.bbox.json`` and ``results.segm.json``, for ADE20K a PNG of labels for each image, which
    count from 1 where 0 is no class.

    Args:
        cfg: a config with ``test_evaluator``; changed in place.
        results: folder of the files.
        format_only: the same, and nothing is scored, nor are annotations loaded.

    Raises:
        ValueError: if both folders are given, or one that cannot be written, or a metric writes no files.
    """
    if results is not None and format_only is not None:
        raise ValueError('--results and --format-only both name a folder for the results; give one of them')
    folder, option = (results, '--results') if format_only is None else (format_only, '--format-only')
    assert folder is not None
    check_writable(folder, option)
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list | tuple) else [cfg.test_evaluator]
    cfg.test_evaluator = [dict(metric) for metric in metrics]
    for metric in cfg.test_evaluator:
        kind = str(metric['type']).rpartition('.')[2]
        if kind not in PLACES:
            raise ValueError(f'{option}: {kind} writes no files; those that do are {", ".join(PLACES)}')
        place = PLACES[kind]
        metric[place] = str(Path(folder, 'results')) if place == 'outfile_prefix' else folder
        metric['format_only'] = format_only is not None
    if format_only is not None:
        dataset = cfg.test_dataloader.dataset
        dataset.pipeline = [step for step in dataset.pipeline if not str(step['type']).endswith('Annotations')]
        dataset.get('data_prefix', {}).pop('seg_map_path', None)
