import sys
from pathlib import Path

# At the end: the folders beside it must not shadow installed packages.
sys.path.append(str(Path(__file__).parents[2]))
