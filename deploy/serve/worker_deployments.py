"""The workers of a model as Ray Serve is to run them."""

from __future__ import annotations

from ray import serve

from offramp.deploy.classifying.classifying_worker import ClassifyingWorker
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.deploy.serve.replica import ServedWorker
from offramp.deploy.serve.settings import Settings
from offramp.worker.classifying.sequence_model import SequenceModel, check_classifier
from offramp.worker.model.loading import check_model, parse_dtype, require_device

HEALTH_S = 1.0
"""Seconds between two questions of Ray Serve to a worker how it is."""

FROZEN_S = 4.0
"""A worker that does not answer them for so long is replaced."""

ENDING_S = 5.0
"""Beyond the time for requests to end: Serve waits 2 s before it has a worker end them."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""What Ray Serve's processes log in files of theirs."""


def workers_of(config: PoolConfig, model: PoolModel, front: str) -> serve.Application:
    """The workers of one model: with heads they classify, else they decode.

    Args:
        config: Whom they follow.
        model: What they load.
        front: Name of the front that they belong to.
    """
    kind = ServedWorker if model.heads is None else ClassifyingWorker
    workers = serve.deployment(kind).options(
        name=model.deployment,
        **model.size,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=FROZEN_S,
        graceful_shutdown_timeout_s=config.limits.drain_s + ENDING_S,
        ray_actor_options={"num_cpus": model.cpus},
        logging_config=QUIET,
    )
    return workers.bind(config, model, front)


def require_classifier(model: PoolModel, settings: Settings) -> None:
    """Refuse a model that cannot be served with its heads, before Ray is started for it.

    Raises:
        ModelError: the model folder cannot be served.
        ConfigError: the dtype is unknown, the device is not there, or the heads are none, or
            another model's.
    """
    require_model(model)
    dtype = parse_dtype(model.worker.dtype)
    if settings.ray_address is None:  # a cluster's workers may have devices that we lack
        require_device(model.worker.device)
    if model.heads is not None:  # only the weights tell whether these are theirs
        SequenceModel.load(model.worker.model, dtype).heads(model.heads)


def require_model(model: PoolModel) -> None:
    """Refuse a model that cannot be served as it is to be, without loading its weights.

    Raises:
        ModelError: the model folder cannot be served.
        ConfigError: the folder of heads holds none.
    """
    if model.heads is None:
        check_model(model.worker.model)
    else:
        check_classifier(model.worker.model, model.heads)
