from .errors import InputError as InputError
from .transformer import FlashI2VTransformer3DModel as FlashI2VTransformer3DModel
from .weights.conversion import convert_state_dict as convert_state_dict
from .weights.conversion import load_weights as load_weights

__version__: str
