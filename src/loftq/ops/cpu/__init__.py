"""Products with packed weights on a CPU: a small C++ library, built by `loftq doctor --build`.

Importing this package loads nothing: the library is looked for when a product first asks for it.
"""
