"""One string for all that a run has come to, to compare runs by."""

import hashlib
import json

from tests.distributed.training import Training


def digest(training: Training, *, state: bool = True) -> str:
    """Of weights in full precision and, if asked for, SL-SAM's state; the same on every rank. Called by every rank."""
    found = hashlib.sha256()
    for name, weight in sorted(training.weights().items()):
        found.update(name.encode())
        found.update(weight.contiguous().numpy().tobytes())
    if state:
        found.update(json.dumps(training.slsam.state_dict(), sort_keys=True).encode())
    return found.hexdigest()
