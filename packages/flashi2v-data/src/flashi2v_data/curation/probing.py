"""Probing many videos: in parallel, within a time, and each once."""

from collections import OrderedDict
from pathlib import Path

from flashi2v_data.curation.probe_cache import ProbeCache, Probed, ProbeFile, damaged
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.store.environments import is_begun
from flashi2v_data.video.probe import VideoInfo
from flashi2v_data.workers import Limits, Task, WorkerLost, WorkerPool

PROBE_TIMEOUT_SECONDS = 60.0
# Many clips of one long video usually stand together: so many videos are remembered without a look into the cache.
_REMEMBERED = 10_000

Probing = Task[str | None, tuple[Probed, bool] | None]


class Prober:
    """Reads what entries leave out from their videos.

    Args:
        jobs: worker processes, which start with the first video.
        timeout: seconds for one file; a file that takes longer, or crashes the decoder, cannot be read.
        cache: directory that keeps what was learned; a file is opened again only if its size or time of change differs.
        readonly: look into the cache, if there is one, without writing to it.
    """

    def __init__(
        self, jobs: int, timeout: float = PROBE_TIMEOUT_SECONDS, cache: Path | None = None, *, readonly: bool = False
    ) -> None:
        self._is_filled = cache is not None and is_begun(cache)
        if readonly and not self._is_filled:
            cache = None
        self._path = cache
        self._readonly = readonly
        self._is_open = False
        self._cache: ProbeCache | None = None
        self._pool = WorkerPool(ProbeFile(cache), jobs, Limits(timeout), on_result=self._keep)
        self._recent: OrderedDict[str, Probing] = OrderedDict()

    def submit(self, path: str) -> Probing:
        """Start to probe a video, or join a probing that was started lately.

        Raises:
            InputError: the cache is none, or damaged.
        """
        if not self._is_open:
            self._open()
        probing = self._recent.get(path)
        if probing is None:
            probing = self._recent[path] = self._pool.submit(path)
            if len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
        return probing

    def _open(self) -> None:
        """Open the cache, after a worker has looked through it: damaged pages may end whoever reads them."""
        self._is_open = True
        if self._path is None:
            return
        if self._is_filled:
            try:
                self._pool.result(self._pool.submit(None))
            except WorkerLost as lost:
                if not lost.is_late:
                    raise InputError(damaged(self._path, lost)) from None
        if not self._readonly:
            self._cache = ProbeCache(self._path)

    def result(self, probing: Probing) -> VideoInfo:
        """Wait for a video.

        Raises:
            DecodeError: it cannot be read.
        """
        path = probing.argument
        assert path is not None
        try:
            found = self._pool.result(probing)
        except WorkerLost as error:
            # Not kept: a disk that hung may answer next time.
            raise DecodeError(path, str(error)) from None
        assert found is not None
        probed, _ = found
        if probed.info is None:
            raise DecodeError(path, probed.fault)
        return probed.info

    def _keep(self, probing: Probing) -> None:
        if probing.argument is not None and probing.result is not None and self._cache is not None:
            probed, is_new = probing.result
            if is_new:
                self._cache.put(probing.argument, probed)

    def close(self) -> None:
        """End the workers and keep what they learned."""
        self._pool.close()
        if self._cache is not None:
            self._cache.close()
