"""The table of recipes in README.md, made from the metafiles: ``python -m densekit.report.recipes_table``."""

import sys
from pathlib import Path

from densekit.cli import exit_status, user_errors
from densekit.report.metafile import METAFILE, Recipe, read_metafile

ROOT = Path(__file__).parents[2]
BEGIN = '<!-- recipes: written by python -m densekit.report.recipes_table from configs/*/metafile.yml -->'
END = '<!-- end of recipes -->'


def recipes_table(root: Path) -> str:
    """The recipes of ``configs/*/metafile.yml`` below ``root`` as a table in Markdown.

    Raises:
        ValueError: if a metafile is not as it has to be.
    """
    lines = ['| recipe | data | params M | GFLOPs | paper | mmdet, mmseg | ours |', '|---|---|---|---|---|---|---|']
    for path in sorted(root.glob(f'configs/*/{METAFILE}')):
        folder = path.parent.relative_to(root).as_posix()
        lines += [f'| {" | ".join(_cells(folder, recipe))} |' for recipe in read_metafile(path)]
    return '\n'.join(lines)


def with_table(readme: str, table: str) -> str:
    """The text of a README with another table between the two comments.

    Raises:
        ValueError: if the comments are not there, each once, in this order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise ValueError(f'README.md has to have these two lines, each once, around the table:\n{BEGIN}\n{END}')
    return f'{before}{BEGIN}\n{table}\n{END}{after}'


def main() -> int:
    """Rewrites the table in the README of this checkout.

    Returns:
        0, or 2 if a metafile or the README is not as it has to be.
    """
    return exit_status(_rewrite)


def _rewrite() -> None:
    with user_errors():
        path = ROOT / 'README.md'
        text = with_table(path.read_text(encoding='utf-8'), recipes_table(ROOT))
        path.write_text(text, encoding='utf-8')


def _cells(folder: str, recipe: Recipe) -> list[str]:
    paper, zoo, ours = recipe.paper, recipe.zoo, recipe.ours
    data = f'{recipe.dataset}, {recipe.schedule}' + (', from random weights' if recipe.weights is None else '')
    measured = f'{_metrics(ours.metrics)} ([source]({ours.source}))' if ours else 'not run'
    return [
        f'`{folder}/{recipe.config}`',
        data,
        str(paper.parameters or '') if paper else '',
        str(paper.gflops or '') if paper else '',
        _metrics(paper.metrics) if paper else '',
        _metrics(zoo.metrics) if zoo else '',
        measured,
    ]


def _metrics(metrics: dict[str, float]) -> str:
    return ', '.join(f'{name} {value}' for name, value in metrics.items())


if __name__ == '__main__':
    sys.exit(main())
