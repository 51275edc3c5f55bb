import json
import logging
import os
import sys

import pytest

from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.loading.quarantine import Quarantine


def test_what_was_listed_is_known_to_the_next_run(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"bad")
    first = Quarantine(tmp_path / "list.jsonl")
    assert first.reason(str(video), 5) is None
    first.add(DecodeError(str(video), "is bad"), 5)
    first.add(DecodeError(str(video), "is bad"), 5)  # once is enough
    for quarantine in (first, Quarantine(tmp_path / "list.jsonl")):
        assert quarantine.reason(str(video), 5) == "is bad"
        assert quarantine.reason(str(video), 6) is None  # another clip of the same video
        assert len(quarantine) == 1
    (line,) = (tmp_path / "list.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "path": str(video),
        "start_frame_idx": 5,
        "reason": "is bad",
        "is_partial": False,
        "size": 3,
        "mtime_ns": os.stat(video).st_mtime_ns,
    }


def test_a_clip_of_which_other_frames_may_be_readable_is_listed_once_and_tried_again(tmp_path):
    quarantine = Quarantine(tmp_path / "list.jsonl")
    for frame in (7, 9):
        quarantine.add(DecodeError("a.mp4", f"frame {frame} cannot be decoded", is_partial=True), 0)
    for known in (quarantine, Quarantine(tmp_path / "list.jsonl")):
        assert known.reason("a.mp4", 0) is None
        assert len(known) == 1


def test_a_file_that_hangs_a_decoder_is_listed_whole(tmp_path):
    quarantine = Quarantine(tmp_path / "list.jsonl")
    quarantine.add(DecodeError("gone.mp4", "no answer"), None)
    assert quarantine.reason("gone.mp4", 0) == quarantine.reason("gone.mp4", 7) == "no answer"


def test_a_file_that_has_changed_is_tried_again(tmp_path):
    video, missing = tmp_path / "a.mp4", tmp_path / "b.mp4"
    video.write_bytes(b"bad")
    quarantine = Quarantine(tmp_path / "list.jsonl")
    quarantine.add(DecodeError(str(video), "is bad"), 0)
    quarantine.add(DecodeError(str(missing), "is missing"), 0)
    video.write_bytes(b"better")
    missing.write_bytes(b"here")
    assert len(Quarantine(tmp_path / "list.jsonl")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_path_need_not_be_unicode(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")
    with open(path, "wb"):
        Quarantine(tmp_path / "list.jsonl").add(DecodeError(path, "is bad"), 0)
    assert Quarantine(tmp_path / "list.jsonl").reason(path, 0) == "is bad"


def test_a_list_that_cannot_be_written_is_kept_in_memory_with_one_warning(tmp_path, caplog):
    quarantine = Quarantine(tmp_path / "nowhere" / "list.jsonl")
    for number in range(2):
        quarantine.add(DecodeError(f"{number}.mp4", "is bad"), 0)
    assert quarantine.reason("1.mp4", 0) == "is bad"
    (message,) = caplog.messages
    assert "unreadable clips cannot be listed: No such file or directory" in message
    assert caplog.records[0].levelno == logging.WARNING


def test_a_line_that_is_being_written_is_left_to_its_writer(tmp_path):
    Quarantine(tmp_path / "list.jsonl").add(DecodeError("gone.mp4", "is gone"), 0)
    with open(tmp_path / "list.jsonl", "a") as file:
        file.write('{"path": "ot')
    assert len(Quarantine(tmp_path / "list.jsonl")) == 1


@pytest.mark.parametrize("text", ["no json\n", '{"path": "a.mp4"}\n', "[]\n", "[" * 100_000 + "\n"])
def test_another_file_of_that_name_is_refused(tmp_path, text):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(InputError, match="is not a list of unreadable clips, remove it"):
        Quarantine(tmp_path / "list.jsonl")


def test_a_pipe_of_that_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "list.jsonl")
    with pytest.raises(InputError, match=r"is not a list of unreadable clips, remove it: .*not a regular file"):
        Quarantine(tmp_path / "list.jsonl")
