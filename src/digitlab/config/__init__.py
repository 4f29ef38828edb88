"""What a run can be configured with: every setting with its type and limits, composed by Hydra or
read from a record.

Hydra and OmegaConf stay in this room; other rooms get typed objects.
"""
