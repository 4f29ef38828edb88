"""One fit: the Lightning module, its loop, and the observer that follows it.

The only room that imports Lightning, besides `data.datamodule`. `observer` and `evaluate` import
none of it. A fit records nothing: `records` is the neighbour of this room, and not known here.
"""
