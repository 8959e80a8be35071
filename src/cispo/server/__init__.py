"""`cispo serve`: the Tinker API on your own machine (extra `server`).

from cispo.server import ServeOptions, serve, status
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cispo.server.options import ServeOptions
from cispo.types import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ServeOptions", "serve", "status"]


def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. With `options.status`, ask the one that runs.

    Raises ConfigError where the extra is not installed.
    """
    return _main("status" if options.status else "serve")(options)


def status(options: ServeOptions) -> int:
    """Print how the server at this host and port does; 0 where it is well."""
    return _main("status")(options)


def _main(name: str) -> Callable[[ServeOptions], int]:
    try:
        from cispo.server import main
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("cispo"):
            raise
        raise ConfigError(f"cispo serve needs {error.name}; run pip install 'cispo[server]'") from None
    return getattr(main, name)
