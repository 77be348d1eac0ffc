"""mmengine's CheckpointHook, except that nothing is deleted before what replaces it is safe."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import FileClient, LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from backbones.files import read_checkpoint
from densekit.engine import store

# In the message hub, and so in every checkpoint: what is going to be deleted once the next one is safe. A run that
# dies before it deletes them thus knows them when it is resumed.
_OUTDATED = 'outdated_ckpts'


@HOOKS.register_module()
class DensekitCheckpointHook(CheckpointHook):
    """Saves checkpoints as mmengine's does, with the same arguments.

    Differs from mmengine's:

    - an old checkpoint is deleted only after the new one is on disk and ``last_checkpoint`` names it, and so is an old
      best one; mmengine deletes first, and a crash in between leaves nothing. The disk must hold one more than
      ``max_keep_ckpts``;
    - what a crash kept from being deleted is deleted after the next save; a run that goes on from a checkpoint of
      another folder deletes nothing but what it saves itself;
    - checkpoints are published without executing anything in them, and the suffix of their name is the file's SHA-256.

    With an ``out_dir`` that is not a local folder it is mmengine's.
    """

    max_keep_ckpts: int
    last_ckpt: str | None

    def before_train(self, runner: Runner) -> None:
        """Finds the folder and, of a resumed run, what it has saved before."""
        where = self.out_dir or runner.work_dir
        self._local = _is_local(where, self.file_client_args, self.backend_args)
        if not self._local:
            runner.logger.warning(f'{where} is no local folder: checkpoints are saved there as mmengine does it')
            super().before_train(runner)
            return
        limit, self.max_keep_ckpts = self.max_keep_ckpts, -1  # mmengine would delete before there is anything new
        super().before_train(runner)
        self.max_keep_ckpts = limit
        known = runner.message_hub.runtime_info
        elsewhere = self._from_elsewhere(runner)
        if elsewhere:
            self._forget_files(known)
        self.keep_ckpt_ids: deque = deque(known.get('keep_ckpt_ids', ()))
        self._outdated: list[str] = list(known.get(_OUTDATED, ()))
        self._former_bests: dict[str, str | None] = {}
        self._set_bests({metric: path and self._here(path) for metric, path in self._bests().items()})
        if self.last_ckpt is None and 'last_ckpt' in known:  # else a resumed run saves less than one that never stopped
            self.last_ckpt = known['last_ckpt'] if elsewhere else self._here(known['last_ckpt'])
        if is_main_process() and (leftovers := store.clean(Path(self.out_dir))):
            runner.logger.warning(f'Removed what an interrupted save left behind: {", ".join(leftovers)}')

    def save_now(self, runner: Runner, meta: dict[str, Any]) -> None:
        """Saves a run that is told to stop, between the regular checkpoints, as ``iter_<n>.pth``.

        It is deleted when the next regular checkpoint is safe, unless all are kept.

        Args:
            runner: of the training process.
            meta: what the checkpoint says of itself, with ``epoch`` and ``iter``.
        """
        name = f'iter_{meta["iter"]}.pth'
        if self._local and self.max_keep_ckpts > 0 and name not in map(self.filename_tmpl.format, self.keep_ckpt_ids):
            self._set_outdated(runner, [*self._outdated, name])
        self._save_and_point(runner, name, meta, by_epoch=False)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        if not self._local:
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        before, outdated = list(self.keep_ckpt_ids), [*self._outdated, *self._replaced_bests()]
        if self.max_keep_ckpts > 0:
            kept = [*(each for each in before if each != step), step]
            outdated += [self.filename_tmpl.format(each) for each in kept[: -self.max_keep_ckpts]]
            self.keep_ckpt_ids = deque(kept[-self.max_keep_ckpts :])
            # The checkpoint must say what is kept after it is saved, not before.
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._set_outdated(runner, outdated)
        if self._save_and_point(runner, self.filename_tmpl.format(step), meta, by_epoch=self.by_epoch):
            self._delete_outdated(runner)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        if not self._local or not self.save_best:
            super()._save_best_checkpoint(runner, metrics)
            return
        # mmengine deletes the best one that it knows before it saves a better one; so it knows none for this long.
        self._former_bests = self._bests()
        self._set_bests(dict.fromkeys(self._former_bests))
        try:
            super()._save_best_checkpoint(runner, metrics)
            outdated = self._replaced_bests()
        finally:
            better = {metric: path for metric, path in self._bests().items() if path}
            self._set_bests({**self._former_bests, **better})
            self._former_bests = {}
        if outdated and self.last_ckpt is None:  # nothing was saved again; no checkpoint names the old one either
            self._set_outdated(runner, [*self._outdated, *outdated])
            self._delete_outdated(runner)

    def _save_and_point(self, runner: Runner, name: str, meta: dict[str, Any], by_epoch: bool) -> bool:
        """Saves, and tells whether ``last_checkpoint`` names what was saved."""
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return True
        self.last_ckpt = next((str(path) for path in self._forms(name) if path.exists()), self.last_ckpt)
        try:
            store.point_to(Path(runner.work_dir), self.last_ckpt)
        except OSError as error:
            runner.logger.warning(f'{self.last_ckpt} is saved, but {store.POINTER} cannot be written: {error}')
            return False
        return True

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str | None) -> None:
        if not self._local:
            super()._publish_model(runner, ckpt_path)
            return
        path = Path(ckpt_path or '')
        if not path.is_file():
            runner.logger.warning(f'{ckpt_path} is not published: it is no file')
            return
        content = read_checkpoint(path, trust_pickle=True)  # a run's own file is no stranger's
        published = {key: value for key, value in content.items() if key in (self.published_keys or ())}
        target = path.with_name(f'{path.stem}-{store.digest(published)[:8]}.pth')
        store.save(target, published, {'published_from': path.name})
        left_out = ', '.join(content.keys() - published.keys()) or 'nothing'
        runner.logger.info(f'{path} is published as {target}, without its: {left_out}')

    def _delete_outdated(self, runner: Runner) -> None:
        """Deletes what the newest checkpoint replaces, if that one is there."""
        if not is_main_process():
            self._set_outdated(runner, [])
            return
        newest = self.last_ckpt and Path(self.last_ckpt)
        if newest and (reason := store.problem(newest, quick=True)):
            runner.logger.warning(f'No checkpoint is deleted, because of the new one, {newest}: {reason}')
            return
        needed = {Path(path).name for path in (self.last_ckpt, *self._bests().values()) if path}
        left = []
        for name in self._outdated:
            try:
                for path in self._forms(name):
                    if path.name not in needed and path.exists():
                        store.remove(path)
            except OSError as error:
                runner.logger.warning(f'{name} is outdated and cannot be deleted: {error}')
                left.append(name)
        self._set_outdated(runner, left)

    def _from_elsewhere(self, runner: Runner) -> bool:
        """Whether the run goes on from a checkpoint of another folder."""
        source = getattr(runner, '_load_from', None)  # None: mmengine's own runner found it in the work folder
        return source is not None and Path(source).parent.resolve() != Path(self.out_dir).resolve()

    def _forget_files(self, known: dict[str, Any]) -> None:
        """Forgets what another folder's run was going to delete: here, files of these names are of another run."""
        for key in [key for key in known if key in ('keep_ckpt_ids', _OUTDATED) or key.startswith('best_ckpt')]:
            del known[key]
        self._set_bests(dict.fromkeys(self._bests()))

    def _set_outdated(self, runner: Runner, names: Sequence[str]) -> None:
        self._outdated = list(dict.fromkeys(names))
        runner.message_hub.update_info(_OUTDATED, self._outdated)

    def _forms(self, name: str) -> tuple[Path, ...]:
        """The file of a checkpoint, and the folder that it is when every process saves its own part."""
        file = Path(self.out_dir, name)
        folder = file.with_suffix('')
        return (file, folder) if folder != file and folder.is_dir() else (file,)

    def _here(self, path: str) -> str:
        """Where a file is that an earlier run saved, perhaps before the folder moved."""
        here = Path(self.out_dir, Path(path).name)
        return str(here) if here.exists() else path

    def _bests(self) -> dict[str, str | None]:
        """The best checkpoint of each metric; mmengine has another place for a single one."""
        if not self.save_best:
            return {}
        return {'': self.best_ckpt_path} if len(self.key_indicators) == 1 else dict(self.best_ckpt_path_dict)

    def _set_bests(self, bests: dict[str, str | None]) -> None:
        if bests and len(self.key_indicators) == 1:
            self.best_ckpt_path = bests['']
        elif bests:
            self.best_ckpt_path_dict = bests

    def _replaced_bests(self) -> list[str]:
        """The names of best checkpoints that have a successor."""
        now = self._bests()
        return [
            Path(old).name for metric, old in self._former_bests.items() if old and now[metric] and now[metric] != old
        ]


def _is_local(where: str, file_client_args: dict | None, backend_args: dict | None) -> bool:
    if file_client_args is not None:
        return isinstance(FileClient.infer_client(file_client_args, where).client, LocalBackend)
    return isinstance(get_file_backend(where, backend_args=backend_args), LocalBackend)
