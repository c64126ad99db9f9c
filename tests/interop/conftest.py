"""The command line's fixtures, here too: an own cache folder, and running commands in this process."""

from tests.cli.conftest import _own_cache, cli  # noqa: F401
