"""A sequence whose steps lie on several devices: shards of time, meshes, and exchange.

Nothing in here runs for a sequence on one device, outside of all meshes.
"""
