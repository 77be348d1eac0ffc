"""What tools/new_config.py does: from images and annotations to a config, or to the report of what is wrong."""

import os
import sys
from pathlib import Path

from densekit.cli import user_errors
from densekit.data.own_detection import plan_detection
from densekit.data.own_recipe import BASES, SIZES, config_text
from densekit.data.own_request import Output, Request, WrongData, check_request, tool_command
from densekit.data.own_segmentation import plan_segmentation
from densekit.engine.config import load_config
from densekit.files import whole_file, write_whole
from densekit.report.pictures import save_png


def new_config(request: Request) -> list[str]:
    """Checks data, says what is in it, and writes a config for it.

    Args:
        request: what was asked for.

    Returns:
        What is wrong with the data, if anything is; then no config is written.

    Raises:
        UserError: if the arguments do not go together, or name what is not there.
    """
    with user_errors():
        check_request(request)
        try:
            output = plan_detection(request) if request.annotations else plan_segmentation(request)
        except WrongData as report:
            sys.stdout.write(f'{report}\n\nNo config is written. Correct the data, and give the same command again.\n')
            return [str(report)]
        _write(request, output)
    return []


def _write(request: Request, output: Output) -> None:
    """Writes the files, the config only if it can be loaded; prints what is in the data and what next."""
    sys.stdout.write('\n'.join(output.lines) + '\n')
    shown = output.picture()
    base = request.checkout / BASES[output.recipe.task]
    folder = output.out.resolve().parent
    inside = folder.is_relative_to(request.checkout)
    base_path = os.path.relpath(base, folder) if inside else str(base)
    text = config_text(output.recipe, base_path, tool_command(request, 'train', str(output.out)))
    with whole_file(output.out) as draft:
        draft.write_text(text, encoding='utf-8')
        load_config(str(draft))
        for path, content in output.files.items():
            write_whole(path, content)
    picture = output.out.with_suffix('.png')
    save_png(picture, shown)
    sys.stdout.write(_summary(request, output, picture) + '\n')


def _summary(request: Request, output: Output, picture: Path) -> str:
    what, size = output.recipe.plan, SIZES[request.size]
    frozen = f'stem and first {what.frozen} stages frozen' if what.frozen > 1 else 'stem and first stage frozen'
    lines = ['', 'Written:', f'  {output.out}']
    lines[-1] += f'  ({what.iterations:,} iterations of {what.batch} images, learning rate {what.rate}, '
    lines[-1] += f'{frozen if what.frozen else "all stages trained"})'
    lines += [f'  {path}' for path in output.files]
    lines += [f'  {picture}  (classes, sizes, examples: have a look)']
    if 'nc' in size.license:
        lines.append(f'It starts from {size.weights}, whose license is {size.license}: no commercial use.')
    config, run = str(output.out), f'work_dirs/{output.out.stem}'
    checkpoint = f'{run}/iter_{what.iterations}.pth'
    lines += [
        '',
        'Next:',
        f'  {tool_command(request, "train", config)}',
        f'  {tool_command(request, "report", run)}',
        f'  {tool_command(request, "predict", config, checkpoint, *output.examples, "--out", f"{run}/pictures")}',
    ]
    return '\n'.join(lines)
