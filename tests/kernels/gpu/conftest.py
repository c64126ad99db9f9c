from __future__ import annotations

from tests.interpreter import patch_once

patch_once()
