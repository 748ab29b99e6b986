"""Makes the harness, which is not installed, and the toy case importable."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
# At the end: the clone's rlkern must not hide an installed one.
sys.path += [str(HERE), str(HERE.parent.parent)]
