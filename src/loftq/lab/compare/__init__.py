"""`loftq lab compare`: a matrix of trained cells, its table and its picture.

recipe (YAML) -> cells (task x method x format x rank x seed) -> a row for each, trained
through `loftq.train` -> medians, spread and paired differences -> table, picture
"""
