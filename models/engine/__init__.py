"""What computes a stage: the contract (base), onnxruntime, and torch as the reference.

onnxruntime from 1.29 on reports the names and shapes of models to its maker, from Linux too, and writes to the user's
home for it, from the moment of its import. A board of ours tells nobody; whoever wants it sets the variable to 0.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
