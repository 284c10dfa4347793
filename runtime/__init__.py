"""What surrounds a run: command line, settings, errors, signals and files."""

import os
import sys
import warnings

# Must be set before torch loads. Nothing is compiled, and the compiler takes a second to load.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# PEFT 0.21 uses the deprecated name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# Tensors of many different lengths would fragment GPU memory. Supported only on Linux.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
