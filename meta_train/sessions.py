"""Runs of either kind, of a rule or of a few-shot algorithm, from what a user names: a configuration or a folder."""

from collections.abc import Sequence
from pathlib import Path

from learned_optim.meta_train.config.load import config_from_tables, load_tables
from learned_optim.meta_train.config.settings import Config
from learned_optim.meta_train.few_shot.settings import FewShotConfig, few_shot_config, is_few_shot
from learned_optim.meta_train.few_shot.trainer import FewShotTrainer
from learned_optim.meta_train.inner.distributed import World
from learned_optim.meta_train.trainer.checkpoint import read_checkpoint
from learned_optim.meta_train.trainer.record import search_modules_of
from learned_optim.meta_train.trainer.trainer import Trainer


def load_any_config(
    source: str | Path, overrides: Sequence[str] = (), *, resuming: bool = False
) -> Config | FewShotConfig:
    """As :func:`load_config`, of either kind."""
    tables = load_tables(source, overrides)
    build = few_shot_config if is_few_shot(tables) else config_from_tables
    return build(tables, str(source), resuming=resuming)


def begin(config: Config | FewShotConfig, folder: Path, world: World) -> Trainer | FewShotTrainer:
    """A run at its start."""
    if isinstance(config, FewShotConfig):
        return FewShotTrainer(config, folder, world.device, world)
    return Trainer(config, folder, world.device, world=world)


def go_on(folder: Path, world: World) -> Trainer | FewShotTrainer:
    """The run in ``folder`` at its checkpoint; errors as of :meth:`Trainer.resume`."""
    search_modules_of(folder)
    few_shot = is_few_shot(read_checkpoint(folder, with_tensors=False).config)
    return (FewShotTrainer if few_shot else Trainer).resume(folder, world.device, world)
