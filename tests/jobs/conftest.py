"""The checker of the fault tests judges these outputs too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "chaos"))
