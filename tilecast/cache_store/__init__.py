"""The `Store` contract on SQL and in memory, and the exported file.

`store.open_store` opens a store, `bundle.export_table` and `bundle.import_table` write and read the exported file,
`match.match` looks a decision up and says why there is none. `merge.merge_files` makes one file of several,
`adopt.adopt_under` imports into a store, `resolve.resolve` settles what conflicts; `diff.diff` compares, `gc.collect`
cleans up, and `relax.relax_table` adopts what a named field keeps out.
"""
