"""The networks, each in a file of its own; `settings` holds what they can be configured with,
`table` which module a settings type builds. Nothing comes in but a settings object.

Importing `settings` imports no torch.
"""
