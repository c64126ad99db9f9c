"""The `tilecast` command."""
