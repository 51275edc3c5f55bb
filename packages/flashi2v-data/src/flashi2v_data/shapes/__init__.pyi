from .scenes import (
    Scene as Scene,
    centres as centres,
    render as render,
    sample_scene as sample_scene,
    write_shapes as write_shapes,
)
from .tracking import Motion as Motion, look as look, track as track
