"""Alembic's migrations of a live store. They run by themselves when an older store is opened for writing."""
