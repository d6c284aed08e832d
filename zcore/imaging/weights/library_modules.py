"""Modules of diffusers, transformers, torchao, and bitsandbytes, imported when they are first needed.

Each takes seconds to import, and most processes need none: diffusers only reads GGUF files and renames the weights of a
single-file VAE, torchao and bitsandbytes quantize weights. None has complete types, so a module is typed `Any`.
"""

import importlib
import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_NOISY_LOGGERS = (
    "torchao",
    "torchao.kernel.intmm",
    "torch.utils._pytree",
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao",
)


def library_module(name: str) -> Any:
    """Import a module by its full name, without the libraries' log messages and deprecation warnings."""
    with quiet_imports():
        return importlib.import_module(name)


@contextmanager
def quiet_imports() -> Generator[None]:
    """Silence torchao and bitsandbytes, which diffusers imports: they log which optional kernels are missing."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
            warnings.filterwarnings("ignore", ".*invalid escape sequence")  # when torchao is first compiled
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
