"""An executor for Orion that runs trials on a Ray cluster. Orion 0.2.7 has none.

Orion finds it by the name ``ray``. Every user of Orion imports this module with Orion, so Ray itself is
imported only when an executor is made.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from orion.executor.base import AsyncException, AsyncResult, BaseExecutor, ExecutorClosed, Future


class _RayFuture(Future):  # type: ignore[misc]
    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def get(self, timeout: float | None = None) -> Any:
        import ray

        try:
            return ray.get(self.reference, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError from None
        except ray.exceptions.RayTaskError as error:
            # Raise the original exception. Ray's copy of it has lost its attributes.
            if isinstance(cause := getattr(error, "cause", None), Exception):
                raise cause from None
            raise

    def wait(self, timeout: float | None = None) -> None:
        import ray

        ray.wait([self.reference], timeout=timeout)

    def ready(self) -> bool:
        import ray

        return bool(ray.wait([self.reference], timeout=0)[0])

    def successful(self) -> bool:
        if not self.ready():
            raise ValueError("the call is not done yet")
        try:
            self.get()
        except Exception:
            return False
        return True


class Ray(BaseExecutor):  # type: ignore[misc]
    """Trials on a Ray cluster.

    Args:
        n_workers: number of trials that run at a time. 0 or less means the number of CPUs of the cluster.
        address: address of the cluster (``auto``, ``host:6379``, ``ray://host:10001``). None starts a cluster
            on this machine, unless this process has one already.
        num_cpus: CPUs for each trial.
        num_gpus: GPUs for each trial, which may be a fraction.
        retries: number of times that a trial is started again after its worker process died.
        **config: further arguments of ``ray.init``.
    """

    def __init__(
        self, n_workers: int = -1, address: str | None = None, num_cpus: float = 1, num_gpus: float = 0,
        retries: int = 0, **config: Any,
    ) -> None:  # fmt: skip
        super().__init__(n_workers)
        try:
            import ray
        except ImportError:
            raise ImportError("Ray is not installed: pip install 'ppo-hpo[ray]'.") from None
        self._owner = not ray.is_initialized()
        if self._owner:
            if address is None:
                cpus = n_workers if n_workers > 0 else None
                config = {"num_cpus": cpus, "include_dashboard": False, **config}
            ray.init(address=address, **config)
        if n_workers <= 0:
            self.n_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": retries}
        self._open: list[_RayFuture] = []
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"n_workers": self.n_workers, "resources": self._resources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # This is unpickled in a task on the cluster, so the cluster exists.
        self.n_workers, self._resources = state["n_workers"], state["resources"]
        self._owner, self._open, self._closed = False, [], False

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> _RayFuture:
        """Let the cluster call ``function(*args, **kwargs)``."""
        import cloudpickle
        import ray

        if self._closed:
            raise ExecutorClosed
        # The arguments are pickled here. Ray would replace its own references among them by their values.
        payload = cloudpickle.dumps((function, args, kwargs))
        future = _RayFuture(ray.remote(**self._resources)(_call).remote(payload))
        self._open.append(future)
        return future

    def wait(self, futures: list[_RayFuture]) -> list[Any]:
        """Wait for all results and return them; raise the first error."""
        return [future.get() for future in futures]

    def async_get(self, futures: list[_RayFuture], timeout: float | None = 0.01) -> list[Any]:
        """Remove the calls that are done from ``futures``, and return their results.

        If none is done yet, this waits at most ``timeout`` seconds.
        """
        import ray

        if not futures:
            return []
        # Without num_returns, Ray returns at most one reference at a time.
        references = [future.reference for future in futures]
        if not ray.wait(references, timeout=timeout)[0]:
            return []
        ready = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
        results: list[Any] = []
        for future in [one for one in futures if one.reference in ready]:
            futures.remove(future)
            self._open.remove(future)
            try:
                results.append(AsyncResult(future, future.get()))
            except Exception as error:
                results.append(AsyncException(future, error, traceback.format_exc()))
        return results

    def close(self) -> None:
        """Stop the trials that run, and the cluster if this executor started it."""
        if getattr(self, "_closed", True):
            return
        import ray

        self._closed = True
        if not ray.is_initialized():
            return
        for future in self._open:
            ray.cancel(future.reference)
        if self._owner:
            ray.shutdown()

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def _call(payload: bytes) -> Any:
    import pickle

    function, args, kwargs = pickle.loads(payload)
    return function(*args, **kwargs)
