from .errors import InputError as InputError
from .errors import SamplingError as SamplingError
from .execution import Execution as Execution
from .files.export import read_record as read_record
from .files.export import save_video as save_video
from .files.export import write_mp4 as write_mp4
from .files.video_grid import film_strip as film_strip
from .files.video_grid import video_grid as video_grid
from .output import FlashI2VPipelineOutput as FlashI2VPipelineOutput
from .pipeline import FlashI2VPipeline as FlashI2VPipeline
from .pipeline import denoise as denoise
from .placement import place as place
from .settings import SamplingSettings as SamplingSettings
from .speed import SamplingPlan as SamplingPlan

__version__: str
