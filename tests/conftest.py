"""What all tests share: a hypothesis profile without deadlines, since test machines are slow at times."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("tilecast", deadline=None)
settings.load_profile("tilecast")
