"""Videos from an image and a prompt with FlashI2V."""

from typing import TYPE_CHECKING

from flashi2v_model.lazy import public_names

if TYPE_CHECKING:
    from flashi2v_data.errors import InputError
    from flashi2v_data.video.strips import film_strip
    from flashi2v_infer.errors import SamplingError
    from flashi2v_infer.execution import Execution
    from flashi2v_infer.files.export import read_record, save_video, write_mp4
    from flashi2v_infer.files.video_grid import video_grid
    from flashi2v_infer.pipeline import FlashI2VPipeline, FlashI2VPipelineOutput
    from flashi2v_infer.placement import place
    from flashi2v_infer.settings import SamplingSettings
    from flashi2v_model.sampling import denoise

__version__ = "0.1.0"

__all__ = [
    "Execution",
    "FlashI2VPipeline",
    "FlashI2VPipelineOutput",
    "InputError",
    "SamplingError",
    "SamplingSettings",
    "denoise",
    "film_strip",
    "place",
    "read_record",
    "save_video",
    "video_grid",
    "write_mp4",
]

__getattr__, __dir__ = public_names(
    __name__,
    {
        "Execution": "flashi2v_infer.execution",
        "FlashI2VPipeline": "flashi2v_infer.pipeline",
        "FlashI2VPipelineOutput": "flashi2v_infer.pipeline",
        "InputError": "flashi2v_data.errors",
        "SamplingError": "flashi2v_infer.errors",
        "SamplingSettings": "flashi2v_infer.settings",
        "denoise": "flashi2v_model.sampling",
        "film_strip": "flashi2v_data.video.strips",
        "place": "flashi2v_infer.placement",
        "read_record": "flashi2v_infer.files.export",
        "save_video": "flashi2v_infer.files.export",
        "video_grid": "flashi2v_infer.files.video_grid",
        "write_mp4": "flashi2v_infer.files.export",
    },
)
