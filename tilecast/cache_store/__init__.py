"""The `Store` contract on SQL and in memory, and the exported file."""
