"""Every setting of every command but `label`'s, as frozen dataclasses. Imports no torch."""

from prefloop.config.inference import *  # noqa: F403
from prefloop.config.judging import *  # noqa: F403
from prefloop.config.monitoring import *  # noqa: F403
from prefloop.config.rollouts import *  # noqa: F403
from prefloop.config.training import *  # noqa: F403
