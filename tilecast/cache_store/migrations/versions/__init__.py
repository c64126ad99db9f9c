"""One module per revision, numbered in order; never edited once released."""
