"""What is recorded of runs, where, and how it is read back.

The only room that imports mlflow. It trains nothing: `training` is its neighbour.
"""
