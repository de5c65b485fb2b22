"""A vision encoder, a connector and a language model become one model: assembled, trained, used.

Importing the package makes transformers' Auto classes know the model, so that
`AutoModelForImageTextToText.from_pretrained(folder)` and `AutoProcessor.from_pretrained(folder)`
load what a stage saved.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# The `mllm` command registers when it first touches a model (mllm.models.assemble does), so that
# `mllm --help` and a refused recipe do not wait seconds for torch.
if Path(sys.argv[0] if sys.argv else "").stem != "mllm":
    import mllm.models.auto  # noqa: F401
