"""Tokenmill: manufacture tokens on your own GPUs, on top of vLLM.

Importing this package initialises nothing: neither torch nor CUDA is touched
until a function that needs them is called.
"""

__version__ = "0.1.0"
