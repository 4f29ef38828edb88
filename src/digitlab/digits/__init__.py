"""New images: decoded, prepared as MNIST was, predicted and explained.

Files are untrusted until `decode` has read them.
"""
