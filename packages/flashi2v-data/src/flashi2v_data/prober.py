"""Probing many videos: in parallel, within a time, and each once."""

from collections import OrderedDict
from pathlib import Path

from flashi2v_data.errors import DecodeError
from flashi2v_data.probe import VideoInfo
from flashi2v_data.probe_cache import ProbeCache, Probed, ProbeFile
from flashi2v_data.workers import Limits, Task, WorkerLost, WorkerPool

PROBE_TIMEOUT_SECONDS = 60.0
# Many clips of one long video usually stand together: so many videos are remembered without a look into the cache.
_REMEMBERED = 10_000

Probing = Task[str, tuple[Probed, bool]]


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
        if readonly and cache is not None and not (cache / "data.mdb").exists():
            cache = None
        self._written = None if readonly else cache
        self._cache: ProbeCache | None = None
        self._pool = WorkerPool(ProbeFile(cache), jobs, Limits(timeout), on_result=self._keep)
        self._recent: OrderedDict[str, Probing] = OrderedDict()

    def submit(self, path: str) -> Probing:
        """Start to probe a video, or join a probing that was started lately.

        Raises:
            InputError: the cache is none.
        """
        if self._cache is None and self._written is not None:
            self._cache = ProbeCache(self._written)
        probing = self._recent.get(path)
        if probing is None:
            probing = self._recent[path] = self._pool.submit(path)
            if len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
        return probing

    def result(self, probing: Probing) -> VideoInfo:
        """Wait for a video.

        Raises:
            DecodeError: it cannot be read.
        """
        path = probing.argument
        try:
            probed, _ = self._pool.result(probing)
        except WorkerLost as error:
            # Not kept: a disk that hung may answer next time.
            raise DecodeError(path, str(error)) from None
        if probed.info is None:
            raise DecodeError(path, probed.fault)
        return probed.info

    def _keep(self, probing: Probing) -> None:
        assert probing.result is not None
        probed, is_new = probing.result
        if is_new and self._cache is not None:
            self._cache.put(probing.argument, probed)

    def close(self) -> None:
        """End the workers and keep what they learned."""
        self._pool.close()
        if self._cache is not None:
            self._cache.close()
