"""For all tests, those in docstrings of the package among them."""

import torchvision_operators  # noqa: F401
