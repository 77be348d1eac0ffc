"""The results file of a machine: cases are added one by one, so that an interrupted run goes on where it stopped."""

import datetime
import json
from pathlib import Path
from typing import Any

from densekit.benchmark.case import Record
from densekit.benchmark.peaks import Peaks
from densekit.files import write_whole

_SAME = ('device', 'kind')


class Results:
    """What was measured on a machine, in ``<slug>.json``.

    Args:
        folder: of results files; made when the first case is saved.
        slug: name of the file.
        machine: as :func:`densekit.benchmark.machine.describe` gives it.
        revision: of the code.
        command: that measures now.

    Raises:
        ValueError: if there is a file that cannot be read, or of another machine or other versions of torch.
    """

    def __init__(self, folder: Path, slug: str, machine: dict[str, Any], revision: str, command: str) -> None:
        self.path = folder / f'{slug}.json'
        self._stamp = {'command': command, 'revision': revision}
        self.content: dict[str, Any] = {**machine, 'peaks': None, 'cases': {}}
        if self.path.exists():
            self.content = self._read(machine)

    @property
    def cases(self) -> dict[str, Record]:
        """Records by key."""
        return self.content['cases']

    def peaks(self) -> Peaks | None:
        """The measured rates, if they have been saved."""
        return Peaks(**self.content['peaks']) if self.content['peaks'] else None

    def save_peaks(self, peaks: Peaks) -> None:
        """Adds the measured rates."""
        self.content['peaks'] = peaks.as_dict()
        self._write()

    def save(self, key: str, tier: int, record: Record) -> None:
        """Adds a case, or replaces it."""
        today = datetime.date.today().isoformat()
        self.cases[key] = {'tier': tier, 'date': today, **self._stamp, **record}
        self._write()

    def _read(self, machine: dict[str, Any]) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding='utf-8'))
            found = {key: content[key] for key in _SAME} | {'torch': content['versions']['torch']}
            if not isinstance(content['cases'], dict) or 'peaks' not in content:
                raise TypeError('it has no cases or no peaks')
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{self.path} is no results file ({type(error).__name__}: {error}); remove it') from error
        here = {key: machine[key] for key in _SAME} | {'torch': machine['versions']['torch']}
        if found != here:
            raise ValueError(
                f'{self.path} is of {_listed(found)}, this is {_listed(here)}; figures of both in one table would '
                'mislead. Give another folder: --out FOLDER'
            )
        return content

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self.content, indent=1) + '\n')


def _listed(facts: dict[str, Any]) -> str:
    return ', '.join(f'{key} {value}' for key, value in facts.items())
