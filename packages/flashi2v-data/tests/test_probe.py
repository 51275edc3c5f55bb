import errno
import os
import signal
import threading
import time
from contextlib import closing

import av
import numpy as np
import pytest

from flashi2v_data.curation.probing import ProbeCache, Probed, ProbeFile, Prober
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.video.probe import VideoInfo, probe
from flashi2v_data.video.write import write_video

INFO = VideoInfo(32, 48, 16.0, 13)


@pytest.fixture
def video(shapes):
    return shapes / "videos" / "000000.mp4"


def _audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def _truncated(path, video):
    path.write_bytes(video.read_bytes()[:-200])


def test_a_video_says_its_size_rate_and_length(video):
    assert probe(video) == INFO


def test_a_single_frame_is_a_video(tmp_path):
    write_video(tmp_path / "one.mp4", np.zeros((1, 32, 48, 3), np.uint8), 16)
    assert probe(tmp_path / "one.mp4")[:2] == (32, 48)
    assert probe(tmp_path / "one.mp4").num_frames == 1


def test_frames_are_counted_where_the_header_does_not_say(tmp_path, video):
    path = tmp_path / "a.mkv"
    with av.open(str(video)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path) == INFO


def test_a_turned_video_has_the_size_in_which_it_is_shown(tmp_path, video):
    # The matrix in the track's header, which telephones write: by a quarter to the right.
    data, unit = bytearray(video.read_bytes()), 1 << 16
    at = data.index(b"tkhd") + 4 + 40
    identity = [unit, 0, 0, 0, unit, 0, 0, 0, 1 << 30]
    assert [int.from_bytes(data[at + 4 * n : at + 4 * n + 4], "big") for n in range(9)] == identity
    turned = [0, unit, 0, -unit, 0, 0, 32 << 16, 0, 1 << 30]
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    assert probe(path) == INFO._replace(height=48, width=32)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path, video: None, "No such file"),
        (lambda path, video: path.write_bytes(b""), "Invalid data"),
        (lambda path, video: path.write_text("hello " * 100), "Invalid data"),
        (lambda path, video: path.mkdir(), "is a directory"),
        (lambda path, video: _audio(path), "no video stream"),
        (_truncated, "is cut short"),
        (lambda path, video: path.write_bytes(video.read_bytes()[:100]), "no video stream"),
    ],
    ids=["missing", "empty", "text", "directory", "audio", "truncated", "header cut"],
)
def test_what_is_no_video_says_why(tmp_path, video, make, reason):
    path = tmp_path / "clip.mp4"
    make(path, video)
    with pytest.raises(DecodeError, match=reason):
        probe(path)
    with closing(Prober(1)) as prober, pytest.raises(DecodeError, match=reason):
        prober.result(prober.submit(str(path)))


def test_a_video_whose_frames_are_damaged_cannot_be_read(tmp_path, video):
    data = bytearray(video.read_bytes())
    at = data.index(b"mdat") + 4
    data[at : at + 2000] = bytes(len(data[at : at + 2000]))
    (tmp_path / "zeros.mp4").write_bytes(data)
    with pytest.raises(DecodeError):
        probe(tmp_path / "zeros.mp4")


def test_a_name_that_is_not_utf8_is_opened(tmp_path, video):
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    with open(path, "wb") as file:
        file.write(video.read_bytes())
    with closing(Prober(1)) as prober:
        assert prober.result(prober.submit(os.fsdecode(path))) == INFO


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DecodeError, match="is not a regular file"):
        probe(tmp_path / "pipe.mp4")


def test_a_file_that_never_answers_costs_its_time_alone(tmp_path, video, write_hanging_video):
    write_hanging_video(tmp_path / "hangs.mp4")
    with closing(Prober(2, timeout=5.0)) as prober:
        probings = [prober.submit(str(path)) for path in (tmp_path / "hangs.mp4", video, video.with_name("000001.mp4"))]
        with pytest.raises(DecodeError, match="no answer within 5 s"):
            prober.result(probings[0])
        assert [prober.result(probing) for probing in probings[1:]] == [INFO, INFO]
        assert prober.result(prober.submit(str(video.with_name("000002.mp4")))) == INFO


def _has_open(process: int, path) -> bool:
    try:
        return any(os.readlink(entry.path) == str(path) for entry in os.scandir(f"/proc/{process}/fd"))
    except FileNotFoundError:  # closed meanwhile
        return False


def test_a_file_that_ends_its_processes_costs_itself_alone(tmp_path, video, write_hanging_video):
    write_hanging_video(tmp_path / "crashes.mp4")

    def crash():
        for _ in range(2):
            workers = []
            while not workers:
                time.sleep(0.01)
                workers = [w for w in prober._pool._workers if _has_open(w.process.pid, tmp_path / "crashes.mp4")]
            os.kill(workers[0].process.pid, signal.SIGSEGV)
            while workers[0] in prober._pool._workers:
                time.sleep(0.01)

    with closing(Prober(1)) as prober:
        crashing = prober.submit(str(tmp_path / "crashes.mp4"))
        other = prober.submit(str(video))
        killer = threading.Thread(target=crash, daemon=True)
        killer.start()
        with pytest.raises(DecodeError, match=r"ended the process that read it 2 times \(SIGSEGV\)"):
            prober.result(crashing)
        assert prober.result(other) == INFO


def _poison(path):
    """Change a file's content but neither size nor time: whoever opens it again fails."""
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _probe_all(paths, cache, **options):
    with closing(Prober(2, cache=cache, **options)) as prober:
        found = []
        for probing in [prober.submit(str(path)) for path in paths]:
            try:
                found.append(prober.result(probing))
            except DecodeError as error:
                found.append(error.reason)
        return found


def test_no_video_is_opened_twice_as_long_as_it_does_not_change(tmp_path, video):
    good, bad = tmp_path / "good.mp4", tmp_path / "bad.mp4"
    good.write_bytes(video.read_bytes())
    bad.write_bytes(b"no video")
    first = _probe_all([good, bad, good], tmp_path / "cache")
    assert first[0] == first[2] == INFO
    _poison(good)
    bad_time = bad.stat().st_mtime_ns
    bad.write_bytes(video.read_bytes()[:8])
    os.utime(bad, ns=(bad_time, bad_time))
    assert _probe_all([good, bad], tmp_path / "cache") == first[:2]
    assert _probe_all([good], tmp_path / "cache", readonly=True) == [INFO]
    os.utime(good, (1, 1))
    assert _probe_all([good], tmp_path / "cache") != [INFO]  # it has changed, so it is opened
    good.write_bytes(video.read_bytes())
    assert _probe_all([good], tmp_path / "cache") == [INFO]


def test_a_cache_is_only_read_where_nothing_may_be_written(tmp_path, video):
    assert _probe_all([video], tmp_path / "none", readonly=True) == [INFO]
    assert not (tmp_path / "none").exists()


def test_what_is_no_cache_says_so(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"x" * 10_000)
    prober = Prober(1, cache=tmp_path)
    with pytest.raises(InputError, match="is not a probe cache, or damaged: remove it"):
        prober.submit("a.mp4")


def test_a_cache_that_was_cut_short_says_so_and_is_not_mapped(tmp_path, video):
    assert _probe_all([video], tmp_path / "cache") == [INFO]
    data = tmp_path / "cache/data.mdb"
    for size in (data.stat().st_size - 1, 8192):
        os.truncate(data, size)
        with pytest.raises(InputError, match="is not a probe cache, or damaged: remove it"):
            _probe_all([video], tmp_path / "cache")
    for size in (4096, 100, 0):  # a run was killed as it made the cache, of which nothing is lost
        os.truncate(data, size)
        assert _probe_all([video], tmp_path / "cache") == [INFO]


@pytest.mark.parametrize("garbage", [b"\xff" * 4096, bytes(4096), b"\x10" * 4096])
def test_a_cache_of_garbage_says_so_and_no_video_is_blamed(tmp_path, video, garbage):
    status = os.stat(video)
    with closing(ProbeCache(tmp_path / "cache")) as cache:
        for number in range(300):
            cache.put(f"{number}.mp4", Probed(status.st_size, status.st_mtime_ns, INFO, ""))
        cache.put(str(video), Probed(status.st_size, status.st_mtime_ns, INFO, ""))
    data = tmp_path / "cache/data.mdb"
    whole = data.read_bytes()
    data.write_bytes(whole[:8192] + garbage * (len(whole) // 4096 - 2))
    with pytest.raises(InputError, match="cache: is damaged: remove it, and videos are opened again"):
        _probe_all([video], tmp_path / "cache")


def test_what_a_cache_has_of_a_video_is_not_believed_when_bits_have_flipped(tmp_path, video):
    assert _probe_all([video], tmp_path / "cache") == [INFO]
    status, data = os.stat(video), tmp_path / "cache/data.mdb"
    good = data.read_bytes()
    place = good.rindex(INFO.height.to_bytes(1, "big") + INFO.width.to_bytes(1, "big"))
    for bit in range(8):
        data.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        with closing(ProbeCache(tmp_path / "cache", readonly=True)) as cache:
            assert cache.get(str(video), status) is None
    assert _probe_all([video], tmp_path / "cache") == [INFO]
    with closing(ProbeCache(tmp_path / "cache", readonly=True)) as cache:
        assert cache.get(str(video), status).info == INFO


def test_a_machine_that_cannot_open_files_is_not_taken_for_bad_videos(tmp_path, video):
    resource = pytest.importorskip("resource")  # of Unix
    assert ProbeFile(None)(str(video))[0].info == INFO
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            ProbeFile(None)(str(video))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_a_disk_says_of_itself_is_not_kept_of_a_video(video, monkeypatch):
    def fail(path):
        raise DecodeError(path, "Input/output error") from OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("flashi2v_data.curation.probing.probe", fail)
    with pytest.raises(DecodeError, match="Input/output error"):
        ProbeFile(None)(str(video))


def test_a_cache_grows(tmp_path):
    cache = ProbeCache(tmp_path / "cache")
    cache._environment.set_mapsize(1 << 16)
    status = os.stat(tmp_path)
    for number in range(2000):
        cache.put(f"{number}.mp4", Probed(status.st_size, status.st_mtime_ns, INFO, ""))
    assert cache.get("1999.mp4", status).info == INFO
    cache.close()
