"""Other engines' tuning files: what vLLM and SGLang read for their fused expert GEMMs (docs/interop.md).

`names` builds and parses their file names, `rows` reads their files, `export` writes them from a table, `peers` keeps
imported ones and makes hints of them, `lint` finds what is wrong in a folder of them. Nothing here runs a kernel.
"""
