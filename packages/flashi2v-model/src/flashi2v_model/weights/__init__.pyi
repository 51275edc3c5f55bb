from .comparing import compare as compare
from .conversion import (
    architecture as architecture,
)
from .conversion import (
    as_model as as_model,
)
from .conversion import (
    convert_state_dict as convert_state_dict,
)
from .conversion import (
    load_weights as load_weights,
)
from .conversion import (
    model_arguments as model_arguments,
)
from .key_names import (
    LAYOUTS as LAYOUTS,
)
from .key_names import (
    NEW_LAYERS as NEW_LAYERS,
)
from .key_names import (
    detect_layout as detect_layout,
)
from .key_names import (
    translate as translate,
)
from .reading import read_state_dict as read_state_dict
from .reading import weight_files as weight_files
from .writing import write_file as write_file
