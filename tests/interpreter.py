"""Triton's interpreter, made fast enough for tests.

Every call of a jit function patches the whole language anew, a millisecond each, within a launch that has patched it
already. Here it is patched once for the process, which never compiles: compilers run in processes of their own.
"""

from __future__ import annotations

import os
from types import SimpleNamespace


def patch_once() -> None:
    """Patch Triton's language for the interpreter for good, if this process interprets. Safe to call again."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "patched_for_good", False):
        return
    # What `_patch_lang` patches are the language modules among a function's globals.
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(both)
    nothing = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: nothing
    interpreter.patched_for_good = True
