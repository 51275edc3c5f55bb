from .decode import read_frames as read_frames, resolve_backend as resolve_backend
from .measures import (
    motion as motion,
    psnr as psnr,
    stillness as stillness,
)
from .probe import VideoInfo as VideoInfo
from .strips import film_strip as film_strip, stack as stack
from .write import write_video as write_video
