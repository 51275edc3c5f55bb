from .batch import Batch as Batch
from .config import RunConfig as RunConfig
from .config import read_run_config as read_run_config
from .launcher import main as main
from .options import TrainOptions as TrainOptions
from .recipe import Generators as Generators
from .recipe import MotionWeighted as MotionWeighted
from .recipe import Recipe as Recipe
from .trainer import Trainer as Trainer
from .trainer import train as train

__version__: str
