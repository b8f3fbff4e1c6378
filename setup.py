"""What the wheel is called inside; everything else is in pyproject.toml.

In a checkout the library is imported as `hyperopt`. The wheel installs it as
`ultimate_hyperoptimizer`, because the well-known Hyperopt on PyPI installs a folder `hyperopt` too:
pip would mix both packages in one folder, without a warning.
"""

import sys

from setuptools import setup

PACKAGES = ("", "._engine")
EDITABLE = "editable_wheel" in sys.argv  # so that, installed with -e, the checkout can be imported
NAME = "hyperopt" if EDITABLE else "ultimate_hyperoptimizer"

setup(
    packages=[NAME + package for package in PACKAGES],
    package_dir={"": "."} if EDITABLE else {NAME: "hyperopt"},
    package_data={NAME: ["py.typed"]},
)
