"""What a run can be configured with: `types` holds every setting with its limits, `schema` their
rules in words; `compose` lets Hydra in, `recorded` reads and writes YAML.

Hydra and OmegaConf stay in this room; other rooms get typed objects.
"""
