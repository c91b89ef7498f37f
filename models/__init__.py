"""The ground floor of what is learned: networks, tasks, transforms, and the numbers and pages made of them.

This floor knows nothing of privacy, Flower or hospitals. `validate` says what is wrong with a specification and what
to write instead; it loads neither torch nor MONAI, so that every command may call it.
"""

from models.fields import Problem
from models.specification import validate

__all__ = ["Problem", "validate"]
