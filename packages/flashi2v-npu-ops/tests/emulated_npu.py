"""The emulations of Ascend's operators on the CPU, under their real schemas.

Names and defaults of arguments are those of the oldest torch_npu that is supported.
"""

import json
from pathlib import Path
from typing import Any

import torch

from flashi2v_npu_ops.testing import emulate, emulations

SCHEMAS = json.loads(Path(__file__).with_name("npu_schemas.json").read_text())
OLDEST, NEWEST = "2.6.0", "2.13.0"

calls: list[str] = []  # the operators that were run, in order


def _emulate(schema: str) -> None:
    name = schema.partition("(")[0]
    function, num_results = getattr(emulations, name), len(torch._C.parse_schema(schema).returns)

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        found = function(*args, **kwargs)
        return found[:num_results] if isinstance(found, tuple) else found

    emulate(schema, run)


for line in SCHEMAS[OLDEST]:
    _emulate(line)
