from .scenes import (
    Scene as Scene,
    centres as centres,
    render as render,
    sample_scene as sample_scene,
    write_shapes as write_shapes,
)
from .stories import Story as Story, sample_story as sample_story, write_stories as write_stories
from .watching import Verdict as Verdict, watch as watch
