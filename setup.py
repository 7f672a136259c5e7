"""Everything static stands in pyproject.toml; this file is where the native extension is built."""

from setuptools import setup

setup()
