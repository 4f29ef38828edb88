"""What a run can be configured with: `types` holds every setting with its limits, `schema` their
rules in words; `compose` lets Hydra in, `recorded` reads and writes YAML.

Other rooms get typed objects. `study.space` alone reads ranges by Hydra's grammar, too.
"""
