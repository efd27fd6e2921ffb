"""The methods that are more than a cache, one folder each.

The `__init__` of a folder describes the method, see `flowaccel.recipe.registry`.
"""
