"""Documents in, passages out: parsing, splitting, embedding, the index, and the checks that keep a citation honest."""
