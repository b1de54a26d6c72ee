"""``resu train``: a configuration, a plain loop with a :class:`~resu.training.Sparsifier`, a folder of results."""

from resu.experiments.train.config import Config
from resu.experiments.train.interrupt import Interrupted
from resu.experiments.train.loop import run
from resu.experiments.train.lost import LostProcess
from resu.experiments.train.reading import apply_settings, as_config, load_config
from resu.experiments.train.result import Result, read_result
from resu.experiments.train.typed import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "Interrupted",
    "LostProcess",
    "Result",
    "apply_settings",
    "as_config",
    "load_config",
    "read_result",
    "run",
]
