"""The recipes and sample data that come with the package."""

from __future__ import annotations

import os
import re
from pathlib import Path

from p3o_lightning.errors import InputError

_PACKAGE = Path(__file__).parent


def expanded(path: str) -> str:
    """`path` with ${NAME} replaced by the environment variable; an unset one is an InputError that names it."""
    for name in re.findall(r"\$\{(\w+)\}", path):
        if name not in os.environ:
            raise InputError(
                f"the path {path!r} needs the environment variable {name}, which is not set: export {name}=..., or give the path itself."
            )
        path = path.replace(f"${{{name}}}", os.environ[name])
    return path


def shipped(path: str) -> Path:
    """Where `path` is, its environment variables expanded.

    That is the path itself if it exists or does not begin with `configs/`, else the packaged file of that name, if any.
    """
    here = Path(expanded(path))
    packaged = _PACKAGE / here
    # `..` would lead out of configs/: only what lies inside it is meant
    named = here.parts[:1] == ("configs",) and ".." not in here.parts
    return packaged if named and not here.exists() and packaged.exists() else here
