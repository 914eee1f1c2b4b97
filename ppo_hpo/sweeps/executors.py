"""Makes the executor of a sweep, which runs its trials.

| name | what runs the trials |
|---|---|
| `workers` | worker processes of this machine (`ppo_hpo.orion.workers`); the default |
| `single` | this process, one trial after the other |
| `joblib`, `poolexecutor` | Orion's pools: forks of this process (its threads with ``backend: threading``) |
| `dask` | a Dask cluster, by its address, or a local one |
| `ray` | a Ray cluster, by its address, or a local one |

A worker process that dies is replaced. Orion's pools cannot replace one: there the sweep ends with an error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ppo_hpo.spec.errors import UserError
from ppo_hpo.trial.options import RunOptions

_NAMES = "workers, single, joblib, poolexecutor, dask or ray"
_ALIASES = {"single": "singleexecutor", "pool": "poolexecutor"}
_SCHEMES = {"tcp": "dask", "tls": "dask", "ucx": "dask", "ray": "ray"}


def make(executor: Any, n_workers: int | None, options: RunOptions | None = None, *, threads: int = 1) -> Any:
    """Make an Orion executor.

    Args:
        executor: a name of the table above, a cluster's address (``tcp://...``, ``ray://...``), a mapping of
            one of these to its settings, or an executor, which is returned. None means ``workers``.
        n_workers: how many trials run at a time. None means the usable cores, 1 for ``single``, and all
            workers of a cluster.
        options: what is asked of each trial.
        threads: threads of each trial.

    Raises:
        UserError: there is no such executor, it is not installed, or its settings are wrong.
    """
    if executor is not None and not isinstance(executor, str | Mapping):
        return executor
    options = options or RunOptions()
    from ppo_hpo.orion.workers import Workers, usable_cores

    name, settings = _name_and_settings(executor)
    if n_workers is None and "address" not in settings:
        n_workers = 1 if name == "singleexecutor" else usable_cores()
    try:
        if name == "dask":
            return _dask(n_workers, settings)
        if name == "ray":
            return _ray(n_workers, settings, options)
        if name == "workers":
            return Workers(n_workers or usable_cores(), **{"retries": options.retries, **settings})
        from orion.executor.base import executor_factory

        if name in ("joblib", "poolexecutor"):
            _prepare_pool(name, settings, threads)
        return executor_factory.create(name, n_workers=n_workers, **settings)
    except NotImplementedError:
        raise UserError(
            f"An executor must be {_NAMES}, or a cluster's address, but got {executor!r}."
        ) from None
    except ImportError as error:
        raise UserError(f"The executor {name!r} cannot be used: {error}") from None
    except (TypeError, ConnectionError, OSError) as error:
        raise UserError(f"The executor {name!r} cannot be started with {settings!r}: {error}.") from None


def _name_and_settings(executor: str | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    settings: dict[str, Any] = {}
    if isinstance(executor, Mapping):
        if len(executor) != 1:
            raise UserError(f"An executor is given as {{name: options}}, but got {dict(executor)!r}.")
        ((executor, given),) = executor.items()
        settings = dict(given or {})
    name = str(executor or "workers")
    scheme, separator, _ = name.partition("://")
    if not separator:
        return _ALIASES.get(name.lower(), name.lower()), settings
    if scheme not in _SCHEMES:
        raise UserError(f"A cluster's address begins with tcp://, tls:// or ray://, but got {name!r}.")
    return _SCHEMES[scheme], {"address": name, **settings}


def _dask(n_workers: int | None, settings: dict[str, Any]) -> Any:
    try:
        import dask
        from dask.distributed import Client
    except ImportError:
        raise ImportError("Dask is not installed. Install it: pip install 'ppo-hpo[dask]'") from None
    from orion.executor.dask_backend import Dask

    if "address" not in settings:
        # Dask's worker processes are daemons by default. Daemons cannot start processes for environments.
        dask.config.set({"distributed.worker.daemon": False})
        settings = {"n_workers": n_workers, "threads_per_worker": 1, "dashboard_address": None, **settings}
    client = Client(**settings)
    return Dask(n_workers=n_workers or max(1, sum(client.nthreads().values())), client=client)


def _ray(n_workers: int | None, settings: dict[str, Any], options: RunOptions) -> Any:
    from ppo_hpo.orion.ray import Ray

    settings = {"retries": options.retries, **settings}
    if options.device.startswith("cuda"):
        # Ray hands out the GPUs itself, and hides them from a trial that does not ask for one.
        if options.device != "cuda":
            raise UserError(f"Ray chooses GPUs itself: the device must be cuda, but got {options.device!r}.")
        settings.setdefault("num_gpus", 1 / (options.trials_per_device or 1))
    return Ray(-1 if n_workers is None else n_workers, **settings)


def _prepare_pool(name: str, settings: Mapping[str, Any], threads: int) -> None:
    if settings.get("backend", "loky") not in ("loky", "multiprocess"):
        return
    from orion.executor import multiprocess_backend

    # Daemons cannot start processes for environments.
    multiprocess_backend.Pool.ALLOW_DAEMON = False
    if threads > 1 and "torch" in sys.modules:
        # A fork copies locks that torch's threads hold, but not the threads that would release them.
        raise UserError(
            f"The executor {name!r} forks this process, and with torch imported here a fork that trains with "
            f"task.threads = {threads} can hang. Leave out the executor, or set task.threads to 1."
        )
