"""Triton's interpreter, made fast enough for tests.

Every call of a jit function patches the whole language anew, a millisecond each, within a launch that has patched it
already. Here it is patched once for the process, which never compiles: compilers run in processes of their own.
For every sum and product of integers it also computes whether that overflows, a third of its time, and then does
nothing with it, as asserts are for debugging; and it builds the table of NumPy's types at every look into it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any


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
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "nothing looks at overflows"
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter.patched_for_good = True


def _remembered(numpy_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function of a scalar's or block's type, which asks once for each kind of scalar."""
    known: dict[str, Any] = {}

    def remembered(of: Any) -> Any:
        scalar = of.scalar
        if scalar.name not in known:
            known[scalar.name] = numpy_type(scalar)
        return known[scalar.name]

    return remembered
