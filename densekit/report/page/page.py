"""Puts the page together, and what tools/report.py does."""

import base64
import hashlib
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from densekit.cli import UserError, check_writable, user_errors
from densekit.engine.launch import run_errors
from densekit.files import write_whole
from densekit.predictor import device_of
from densekit.report.page.detection import Detection, detection
from densekit.report.page.markup import Html, join, note, number, table, tag
from densekit.report.page.predictions import predictions
from densekit.report.page.run_folder import Run, names_of, read_run
from densekit.report.page.scores import confusion_section, errors_section, images_section, scores_section
from densekit.report.page.segmentation import Segmentation, mean, segmentation
from densekit.report.page.style import CSS, SCRIPT
from densekit.report.page.training import (
    environment_section,
    loss_section,
    rates_section,
    speed_section,
    validation_section,
)

CONTENTS = {
    'loss': 'Loss',
    'validation': 'Validation',
    'rates': 'Learning rates',
    'scores': 'Scores',
    'confusion': 'Confusion',
    'errors': 'Errors',
    'images': 'Images',
    'speed': 'Speed',
    'environment': 'Environment',
}

Evaluation = Detection | Segmentation | str  # or why there is none


def report(
    folders: Sequence[str],
    *,
    out: str | None = None,
    images: int = 500,
    checkpoints: Sequence[str] = (),
    results: Sequence[str] = (),
    score_thr: float = 0.3,
    device: str | None = None,
) -> Path:
    """Writes the page.

    Args:
        folders: one work folder, or two to compare.
        out: file of the page; default report.html in the first folder.
        images: evaluate on at most as many images of the validation set; 0: do not evaluate.
        checkpoints: one for each folder; default the newest of each.
        results: predictions, one for each folder: COCO's file of results or a folder of label maps. Nothing is run.
        score_thr: from which score an object counts as found in an image.
        device: of the model; default the first GPU if there is one.

    Returns:
        The file.

    Raises:
        UserError: if something given cannot be used, such as a checkpoint or results of something else. That the
            newest checkpoint cannot be evaluated is said in the page and on standard error.
    """
    with user_errors():
        path = Path(out) if out is not None else Path(folders[0], 'report.html')
        _check(folders, path, images, checkpoints, results, score_thr)
        names = names_of([Path(folder) for folder in folders])
        titles = names if len(names) == 1 else ['A', 'B']
        given: list[str | None] = [*checkpoints] or [None] * len(folders)
        runs = [
            read_run(Path(folder), title, name, checkpoint)
            for folder, title, name, checkpoint in zip(folders, titles, names, given, strict=True)
        ]
        check_writable(str(path.parent), '--out')
        if device is not None:
            device_of(device)
    evaluations = []
    files: list[str | None] = [*results] or [None] * len(runs)
    for run, result in zip(runs, files, strict=True):
        evaluation = _evaluate(run, images, result, score_thr, device)
        if isinstance(evaluation, str) and (result is not None or (checkpoints and images)):
            why = 'because this was asked for by --checkpoint or --results'
            raise UserError(f'{run.name}: {evaluation}\nNo page is written, {why}.')
        if isinstance(evaluation, str):
            sys.stderr.write(f'{run.name} is not evaluated: {evaluation}\n')
        evaluations.append(evaluation)
    with user_errors():
        write_whole(path, page(runs, evaluations))
    return path


def page(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> Html:
    """The page.

    Args:
        runs: one or two.
        evaluations: of each.
    """
    title = f'Report of {" and ".join(run.name for run in runs)}'
    scored = [(r.title, found) for r, found in zip(runs, evaluations, strict=True) if not isinstance(found, str)]
    missing = [
        note(f'{r.title}: {found}') for r, found in zip(runs, evaluations, strict=True) if isinstance(found, str)
    ]
    body = [
        tag('h1', title),
        tag('p', f'Written {datetime.now():%d %B %Y, %H:%M} by densekit.', class_='note'),
        _overview(runs, evaluations),
        *(note(f'{run.title}: {remark}') for run in runs for remark in run.remarks),
        tag(
            'nav',
            *_key(runs),
            *(tag('a', said, href=f'#{name}') for name, said in CONTENTS.items()),
            aria_label='Sections',
        ),
        tag(
            'main',
            loss_section(runs),
            validation_section(runs),
            rates_section(runs),
            scores_section(scored, missing),
            confusion_section(scored, missing),
            errors_section(scored, missing),
            images_section(scored, missing),
            speed_section(runs),
            environment_section(runs),
        ),
        tag('div', id='hint', hidden=''),
        tag('script', Html(SCRIPT)),
    ]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # Nothing may be fetched, and no script runs but this one, whatever names of classes or files hold.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        'head',
        tag('meta', charset='utf-8'),
        tag('meta', http_equiv='Content-Security-Policy', content=policy),
        tag('meta', name='viewport', content='width=device-width, initial-scale=1'),
        tag('link', rel='icon', href='data:,'),
        tag('title', title),
        tag('style', Html(CSS)),
    )
    return Html(f'<!DOCTYPE html>\n{tag("html", head, tag("body", join(body, chr(10))), lang="en")}\n')


def _key(runs: Sequence[Run]) -> list[Html]:
    """Which run is which, always in view."""
    if len(runs) == 1:
        return []
    return [
        tag('span', tag('span', class_=f'swatch c{i + 1}'), f' {run.title}: {run.name}') for i, run in enumerate(runs)
    ]


def _overview(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> Html:
    header = ['run', 'iterations', 'last loss', 'checkpoint', 'images evaluated', 'box AP', 'mask AP', 'mIoU']
    rows = []
    for run, found in zip(runs, evaluations, strict=True):
        ap = {kind: s.summary['mAP'] for kind, s in found.scores.items()} if isinstance(found, Detection) else {}
        miou = mean(found.scores['IoU']) if isinstance(found, Segmentation) else None
        last = run.training[-1] if run.training else {}
        rows.append(
            [
                run.name if run.title == run.name else f'{run.title}: {run.name}',
                number(last.get('iter'), 0),
                number(last.get('loss'), 3),
                run.checkpoint.name if run.checkpoint else 'none',
                number(None if isinstance(found, str) else found.images, 0),
                *(number(ap[kind] if ap.get(kind, -1) >= 0 else None, 1, 100) for kind in ('bbox', 'segm')),
                number(miou, 2, 100),
            ]
        )
    shown = [i for i in range(len(header)) if i < 5 or any('data-value' in row[i] for row in rows)]
    return table('Overview (figures in %)', [header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _evaluate(run: Run, images: int, result: str | None, score_thr: float, device: str | None) -> Evaluation:
    if images == 0 and result is None:
        return 'No evaluation was asked for (--images 0).'
    try:
        with user_errors(), run_errors():
            found = predictions(run, images, result, device)
            return detection(found, score_thr) if found.is_detection else segmentation(found)
    except UserError as error:
        return f'It cannot be evaluated: {error}'


def _check(
    folders: Sequence[str],
    path: Path,
    images: int,
    checkpoints: Sequence[str],
    results: Sequence[str],
    score_thr: float,
) -> None:
    if len(folders) not in (1, 2):
        raise ValueError(f'{len(folders)} work folders given; a report is of one, or compares two')
    for name, given in (('--checkpoint', checkpoints), ('--results', results)):
        if given and len(given) != len(folders):
            raise ValueError(f'{name} has {len(given)} paths for {len(folders)} work folders; give one for each')
    if images < 0 or not 0 <= score_thr <= 1:
        raise ValueError(f'--images is {images}, --score-thr {score_thr}; give 0 or more, and 0 to 1')
    if path.is_dir():
        raise ValueError(f'--out {path} is a folder; give the name of a file for the page')
