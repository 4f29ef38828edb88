"""One fit: the Lightning module, its loop, and the observer that follows it.

The only room that imports Lightning. It records nothing: `records` is its neighbour.
"""
