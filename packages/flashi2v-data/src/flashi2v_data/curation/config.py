"""What the filter is told: the keys of `filter_config.yaml`."""

from typing import Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from flashi2v_data.settings import Settings
from flashi2v_data.video.frames import check_rate


class FilterConfig(Settings):
    """The filter's settings; the keys of the reference's `filter_config.yaml`."""

    ann_txt_path: str = Field(description="Annotation file: lines of `root of videos,meta JSON`.")
    save_path: str = Field(description="Directory for the LMDB and the report.")
    sample_height: PositiveInt
    sample_width: PositiveInt
    sample_num_frames: PositiveInt
    min_hxw: PositiveInt = Field(description="Least height * width that is left at the sample's aspect ratio.")
    train_fps: PositiveFloat | None = None
    sample_stride: PositiveInt | None = Field(None, description="Take every n-th frame, whatever the fps.")
    max_h_div_w_ratio: PositiveFloat
    min_h_div_w_ratio: PositiveFloat
    too_long_factor: PositiveFloat = 5.0
    max_motion_value: float = 1.0
    min_motion_value: float = 0.0
    # What `flashi2v-data score` measures; None is no limit.
    min_object_motion: NonNegativeFloat | None = Field(None, description="Percent of the shorter side per second.")
    max_object_motion: NonNegativeFloat | None = Field(None, description="Percent of the shorter side per second.")
    max_camera_motion: NonNegativeFloat | None = Field(None, description="Percent of the shorter side per second.")
    max_stillness: NonNegativeFloat | None = Field(None, description="Share of the picture that never changes.")
    max_black_share: NonNegativeFloat | None = Field(None, description="Share of frames.")
    max_bar_share: NonNegativeFloat | None = Field(None, description="Share of the picture.")
    max_num_loops: NonNegativeFloat | None = Field(None, description="How often the clip repeats itself; 1 is once.")
    max_text_area: NonNegativeFloat | None = Field(None, description="Share of the picture.")
    max_scene_cuts: NonNegativeInt | None = Field(None, description="Cuts within a clip.")
    drop_duplicates: bool = Field(False, description="Drop clips that show what an earlier one shows.")
    clean_captions: bool | Literal["reference"] = Field(True, description="As training will clean them: see data.json.")
    drop_empty_captions: bool = Field(
        False, description="Drop clips whose captions are empty, or become so by cleaning."
    )
    text_tokenizer_path: str | None = Field(
        None, description="Count captions that this tokenizer cuts, or does not know."
    )
    tokenizer_max_length: PositiveInt | None = Field(None, description="Tokens that training reads of a caption.")
    compression: Literal["zstd"] | None = Field(None, description="Compress every value of the LMDB.")
    geometry: Literal["upright", "reference"] = Field(
        "upright",
        description="Whether pictures are upright and of square pixels, or as the reference's decoder gives them.",
    )
    tone_map: bool = Field(False, description="Keep HDR videos, which training then shows as on other screens.")
    probe_cache_path: str | None = Field(
        None, description="Directory that keeps what videos said, for further filters; default <save_path>/probe_cache."
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> "FilterConfig":
        check_rate(self.train_fps, self.sample_stride)
        if self.min_h_div_w_ratio > self.max_h_div_w_ratio:
            raise ValueError("min_h_div_w_ratio exceeds max_h_div_w_ratio: swap them")
        if self.min_motion_value > self.max_motion_value:
            raise ValueError("min_motion_value exceeds max_motion_value: swap them")
        least, most = self.min_object_motion, self.max_object_motion
        if least is not None and most is not None and least > most:
            raise ValueError("min_object_motion exceeds max_object_motion: swap them")
        if (self.text_tokenizer_path is None) != (self.tokenizer_max_length is None):
            raise ValueError("text_tokenizer_path goes with tokenizer_max_length: set both or neither")
        return self
