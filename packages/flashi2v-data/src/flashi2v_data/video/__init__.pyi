from .decode import read_frames as read_frames, resolve_backend as resolve_backend
from .probe import VideoInfo as VideoInfo
from .strips import film_strip as film_strip, stack as stack
from .write import write_video as write_video
